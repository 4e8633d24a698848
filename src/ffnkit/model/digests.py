"""Which weights a place of a model holds: what tells a plan that it stands before the model that it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.linear import walk
from ffnkit.nn.adapter_layer import AdapterLayer

# The dtypes in which a model is known again: its own, and those that it may be rounded to.
_ROUNDED = {
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
}
Digests = dict[str, dict[str, str]]


def digests(model: nn.Module, places: Iterable[str]) -> Digests:
    """Of the weights of FFNs, by name, and of modules, by path: a digest in each dtype that a model may have later.

    Updates that train beside weights play no part. Reads every weight once for each dtype.
    """
    found = _held(model, places)
    return {place: {_name(d): _digest(tensors, d) for d in _dtypes(tensors)} for place, tensors in found if tensors}


def other_weights(model: nn.Module, known: Digests) -> str | None:
    """The first place whose weights are not those that are known, up to a cast to or from a wider dtype."""
    for place, tensors in _held(model, known) if known else ():
        mine = [_name(d) for d in _dtypes(tensors)]
        if not mine:
            return place
        theirs = list(known[place])
        label = mine[0] if mine[0] in theirs else theirs[0]  # the narrower of the two dtypes
        if _digest(tensors, getattr(torch, label)) != known[place][label]:
            return place
    return None


def _held(model: nn.Module, places: Iterable[str]) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors of each place that is there."""
    named = {name: ffn for ffn in ffns(model) for name in ffn.owners} if has_ffns(model) else {}
    modules = dict(walk(model))
    for place in dict.fromkeys(places):
        ffn = named.get(place)
        if ffn is None and place in modules:
            yield place, list(_own(modules[place]))
        elif ffn is not None and ffn.layout.experts:
            yield place, list(ffn.parameters())
        elif ffn is not None:
            yield place, [t for site in ffn.sites for t in _own(ffn.linear(site))]


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module without those of updates; a frozen weight below one is its own."""
    for each in module.modules():
        updated = isinstance(each, AdapterLayer)
        for name, parameter in each.named_parameters(recurse=False):
            if not updated or name in ("base", "bias"):
                yield parameter


def _dtypes(tensors: list[Tensor]) -> tuple[torch.dtype, ...]:
    floats = [t.dtype for t in tensors if t.is_floating_point()]
    kinds = floats or [t.dtype for t in tensors]
    widest = max(kinds, key=lambda d: d.itemsize, default=None)
    return () if widest is None else _ROUNDED.get(widest, (widest,))


def _digest(tensors: list[Tensor], dtype: torch.dtype) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        for part in _plain(tensor):
            if part.is_floating_point() and part.dtype != dtype:
                part = part.to(dtype)
            if not part.is_meta:
                total.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def _plain(tensor: Tensor) -> list[Tensor]:
    """A tensor, or those that a quantized one is made of."""
    value = tensor.detach()
    if hasattr(value, "__tensor_flatten__"):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [value.as_subclass(Tensor)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
