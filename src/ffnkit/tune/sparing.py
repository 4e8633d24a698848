"""Updates beside weights whose zeros come back at the end: what a model gives meanwhile is without them there, too.

Else a tuner would be judged by a model that nobody gets: what it learnt at the zeros goes when they come back.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffnkit.model.linear import PLAIN, is_transposed
from ffnkit.nn.adapter_layer import AdapterLayer, full_tensor
from ffnkit.nn.reparametrized import oriented
from ffnkit.ops.masks import unpacked

Places = dict[str, tuple[Tensor, torch.Size]]  # packed places of zeros and shapes, by parameter name (zeros.note)
_BUFFER = "ffnkit_zeros"
_HOOKS = "_ffnkit_spared"  # on a model: the hooks of :func:`spare`
_LATER = "_ffnkit_sparable"  # on a model: places of which it is not known yet whether their zeros come back


def of(places: Places, names: set[str]) -> Places:
    """The places of these weights alone."""
    return {name: entry for name, entry in places.items() if name in names}


def spare(model: nn.Module, places: Places) -> None:
    """Leave what updates put at these places out of what the model gives, by hooks that go with the layers.

    Adapters of peft are trained so; of other updates, whose steps are their own, only what is evaluated is so. Weights
    of experts in one 3-D parameter, and quantized ones below updates, are left as they are.

    Args:
        model: with updates on it, a peft model or not. places: of its weights before, by their names then.
    """
    base = cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model
    done: set[int] = set()
    handles = []
    for name, (bits, shape) in places.items():
        path, _, leaf = name.rpartition(".")
        layer = _at(base, path)
        if leaf != "weight" or layer is None or id(layer) in done or len(shape) != 2:
            continue
        hook = _hook(layer)
        if hook is None:
            continue
        done.add(id(layer))
        if hook is _adapted:
            zero = oriented(unpacked(bits, shape), is_transposed(layer)).contiguous()
            layer.register_buffer(_BUFFER, zero.to(next(layer.parameters()).device), persistent=False)
        handles.append(layer.register_forward_hook(hook))
    if handles and base is model:
        object.__setattr__(model, _HOOKS, handles)


def spare_later(model: nn.Module, places: Places) -> None:
    """Note the places for :func:`spare_noted`: updates that stay on a model fill its zeros."""
    if places:
        object.__setattr__(model, _LATER, places)


def spare_noted(model: nn.Module) -> None:
    """The model's updates will be merged, and its zeros come back."""
    if places := model.__dict__.pop(_LATER, None):
        spare(model, places)


def spare_nothing(model: nn.Module) -> None:
    """Updates stay on the model, and say what they say."""
    model.__dict__.pop(_LATER, None)
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()


def spare_trained(model: nn.Module, places: Places) -> list[Any]:
    """The same of linears whose own weights train; the hooks, to remove."""
    handles = []
    for name, (bits, shape) in places.items():
        layer = _at(model, name.rpartition(".")[0])
        if isinstance(layer, PLAIN) and layer.weight.requires_grad:
            zero = unpacked(bits, shape).to(layer.weight.device)
            handles.append(layer.register_forward_hook(partial(_masked, zero, is_transposed(layer))))
    return handles


def _masked(zero: Tensor, transposed: bool, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output - functional.linear(inputs[0], oriented(layer.weight.detach() * zero, transposed))


def _at(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _hook(layer: nn.Module) -> Any:
    """What corrects a layer's outputs; None where no update is on it."""
    if isinstance(layer, AdapterLayer):
        return _evaluated if layer.base.is_floating_point() else None
    if hasattr(layer, "lora_A") and hasattr(layer, "base_layer") and len(layer.lora_A):  # type: ignore[arg-type]
        for dropout in cast(Any, layer).lora_dropout.values():
            dropout.register_forward_hook(_seen)
        return _adapted
    return None


def _evaluated(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    if layer.training:
        return None
    zero = oriented(full_tensor(layer.base), layer.transposed) == 0  # the layer may have been cut since
    update = layer.update() * zero
    x = layer.weighed(inputs[0])
    return output - functional.linear(x.to(update.dtype), update).to(output.dtype)


def _seen(dropout: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    dropout.__dict__["_ffnkit_seen"] = output  # the very draw that the adapter is given


def _adapted(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    if layer.disable_adapters or layer.merged:
        return None
    given = output.dtype
    for name in layer.active_adapters:
        if name in layer.lora_A:
            x = layer.lora_dropout[name].__dict__.pop("_ffnkit_seen")
            gone = (layer.lora_B[name].weight @ layer.lora_A[name].weight) * layer.get_buffer(_BUFFER)
            output = output - functional.linear(x, gone.to(x.dtype)) * layer.scaling[name]
    return output.to(given)
