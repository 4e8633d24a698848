"""meProp as it was first: of each token's gradient of a linear's outputs only the largest entries pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.model.targets import targets
from ffnkit.model.trainable import train_as_before, train_only
from ffnkit.tune import masks, sparing, zeros

if TYPE_CHECKING:
    from ffnkit.tune.kinds import MeProp
    from ffnkit.tune.lifecycle import Preparation

_HOOKS = "_ffnkit_meprop"  # on a prepared model: what takes the cuts away


class _Cut(torch.autograd.Function):
    """The identity; of the gradient the ``count`` entries of largest size pass, token by token.

    Source: Sun et al., meProp (arXiv 1706.06197), section 3: top-k of the output gradient, for weights and inputs.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, count: int) -> Tensor:
        ctx.count = count
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        places = grad.abs().topk(ctx.count, dim=-1, sorted=False).indices
        return torch.zeros_like(grad).scatter_(-1, places, grad.gather(-1, places)), None


def put_on(model: nn.Module, tuner: MeProp, preparation: Preparation) -> nn.Module:
    """Let the linears' weights train, by the cut gradients; the cuts are taken away by :func:`take_off`."""
    masked = masks.set_aside(model, preparation)
    names, experts = targets(model, tuner.targets, tuner.layers)
    if experts or tuner.adapter_dir is not None or tuner.apart_dir is not None:
        what = f"{experts[0]} is one 3-D parameter" if experts else "it trains whole weights, which lie nowhere apart"
        raise FfnkitError("meprop of outputs", what, "Name linears with targets" if experts else "Leave it out")
    if tuner.coefficients:
        raise FfnkitError("meprop of outputs", "coefficients are given, and no weight is frozen", "Leave them out")
    chosen = tuner.beside(model)
    handles = []
    for name in names:
        linear: Any = model.get_submodule(name)
        chosen |= {id(linear.weight)}
        handles.append(linear.register_forward_hook(_cutting(tuner.density)))
    train_only(model, lambda parameter: id(parameter) in chosen)
    if masked:
        handles += sparing.spare_trained(model, sparing.of(zeros.note(model), masked))
    model.__dict__[_HOOKS] = handles
    return model


def _cutting(share: float) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return _Cut.apply(output, max(1, round(share * output.shape[-1])))

    return hook


def take_off(model: nn.Module, tuner: MeProp) -> nn.Module:
    """The plain model."""
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()
    return masks.put_back(train_as_before(model))
