"""A fixed, untrained factor for each input of a linear: MLP Fusion's cluster sizes, kept apart while tuning."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class Scaled(nn.Module):
    """``y = W (scale * x) + b`` with trained W and b and a fixed ``scale``.

    It is no subclass of ``nn.Linear`` on purpose: an adapter that merged itself into ``weight`` would be multiplied
    by ``scale`` and change the outputs. Libraries that look for linears leave it alone or say so.

    Attributes:
        weight: (out, in), or (in, out) where it replaces a Conv1D.
        scale: buffer (in,), saved with the weights.

    Source: MLP Fusion (arXiv 2307.08941): P stands between the activation and W2.
    """

    def __init__(self, linear: nn.Linear | Conv1D, scale: Tensor) -> None:
        super().__init__()
        self.transposed = isinstance(linear, Conv1D)
        self.weight, self.bias = linear.weight, linear.bias
        # The emptied layer itself comes back when folding (Falcon and others use classes of their own). It is kept
        # out of the submodules, so that it appears in no state dict and in no search for linears.
        linear._parameters.update(weight=None, bias=None)
        self.__dict__["_shell"] = linear
        self.register_buffer("scale", scale.to(device=self.weight.device, dtype=self.weight.dtype, copy=True))
        self.scale: Tensor
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        return functional.linear(x * self.scale.to(x.dtype), weight, self.bias)

    def fold(self) -> nn.Linear | Conv1D:
        """The plain layer with equal outputs; it takes over the parameters."""
        with torch.no_grad():
            self.weight.mul_(self.scale[:, None] if self.transposed else self.scale)
        return unscaled(self)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, bias={self.bias is not None}, transposed={self.transposed}"


def unscaled(scaled: Scaled) -> nn.Linear | Conv1D:
    """The layer that was replaced, around the present parameters, the scale left out (not folded)."""
    plain: nn.Linear | Conv1D = scaled.__dict__["_shell"]
    for name, parameter in scaled.named_parameters(recurse=False):
        plain._parameters[name] = parameter
    return plain.train(scaled.training)


# --- experts: one 3-D parameter cannot be replaced by a module, so its owner's class serves the product -----------


# Not "<name>_scale": transformers' weight conversions match the parameters' names as patterns.
EXPERTS_SCALE = "neuron_scale"


@functools.cache
def _scaled_class(base: Any, name: str) -> type[nn.Module]:
    def product(self: nn.Module) -> Tensor:
        parameter: Any = self._parameters[name]
        scale: Tensor = getattr(self, EXPERTS_SCALE)
        # While a checkpoint is read, one of the two may be there and the other still empty.
        whole: Tensor = parameter if parameter.is_meta or scale.is_meta else parameter * scale[:, None, :]
        return whole

    def setter(self: nn.Module, value: Tensor) -> None:  # reached only for values that are no nn.Parameter
        raise TypeError(f"{name} must be an nn.Parameter")

    return type(base.__name__, (base,), {name: property(product, setter), "ffnkit_scaled": name})


def scale_experts(owner: nn.Module, name: str, scale: Tensor) -> None:
    """Make ``owner.name``, a 3-D parameter (E, d, ff), read as itself times a fixed ``scale`` (E, ff).

    The parameter keeps its name in the state dict and its gradient is that of P kept apart; every implementation of
    the experts' forward (loop, grouped products) sees the product. The buffer is called ``neuron_scale``.
    """
    parameter = getattr(owner, name)
    owner.register_buffer(EXPERTS_SCALE, scale.to(device=parameter.device, dtype=parameter.dtype, copy=True))
    owner.__class__ = _scaled_class(type(owner), name)  # type: ignore[arg-type]


def experts_scale(owner: nn.Module) -> Tensor | None:
    """The fixed scale of an owner of experts, or None."""
    return getattr(owner, EXPERTS_SCALE) if hasattr(type(owner), "ffnkit_scaled") else None


def unscale_experts(owner: nn.Module, *, fold: bool) -> None:
    """Undo :func:`scale_experts`, multiplying the scale into the parameter where ``fold`` is true."""
    name: str = type(owner).ffnkit_scaled  # type: ignore[attr-defined]
    if fold:
        with torch.no_grad():
            owner._parameters[name].mul_(getattr(owner, EXPERTS_SCALE)[:, None, :])  # type: ignore[union-attr]
    owner.__class__ = type(owner).__bases__[0]
    delattr(owner, EXPERTS_SCALE)
