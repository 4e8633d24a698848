"""What writes into a residual stream behind a layer, and whether a factor of the stream may go into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, first_tensor, forward, prepared
from ffnkit.calibration.reading import is_norm
from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.model import running
from ffnkit.model.attention import attentions
from ffnkit.model.finding import block_name, ffns
from ffnkit.surgery.temporary import TemporaryPlan

SAME = 0.05  # of what doubling the stream alone does: the small constants in norms make less


def written_behind(model: nn.Module, few: Batch, behind: list[str], asked: str) -> Iterator[dict[str, int]]:
    """Choices of what to multiply so that all that these layers write is: by path, what it adds to its weight.

    First the output layers of attentions and FFNs, then the norms that read these, where there are such (Gemma 2).

    Raises:
        FfnkitError: a layer shares its weights with one that is not among these.
    """
    linears = _output_linears(model, behind, asked)
    yield dict.fromkeys(linears, 0)
    norms = _sandwiched(model, few, linears)
    offsets = {path: norm_offset(model.get_submodule(path)) for path in norms.values()}
    if norms and None not in offsets.values():
        rest = dict.fromkeys((path for path in linears if path not in norms), 0)
        yield rest | {path: offset for path, offset in offsets.items() if offset is not None}


def _output_linears(model: nn.Module, behind: list[str], asked: str) -> list[str]:
    found = []
    places = set(behind)
    for ffn in ffns(model):
        inside = [owner for owner in ffn.owners if block_name(owner) in places]
        if inside and len(inside) < len(ffn.owners) and "down" not in ffn.differing:
            what = f"{inside[0]} shares its weights with layers before it"
            raise FfnkitError(asked, what, "Leave refit out, or drop layers behind all that share")
        if inside and ffn.layout.experts:
            found.append(ffn.name)
        elif inside:  # of one weight one path will do
            own = inside if ffn.differing else inside[:1]
            found += [f"{owner}.{ffn.path('down')}" for owner in own]
    known = {f"{each.name}.{each.layout.o}".strip("."): each for each in attentions(model)}
    for path, each in known.items():
        inside = [name for name in (each.name, *each.tied) if block_name(name) in places]
        if inside and len(inside) < 1 + len(each.tied):
            raise FfnkitError(asked, f"{inside[0]} shares its weights with layers before it", "Leave refit out")
        found += [path] if inside else []
    return found


def _sandwiched(model: nn.Module, few: Batch, linears: list[str]) -> dict[str, str]:
    """By the path of a linear, that of the norm that reads what it gives, and nothing else."""
    given: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: given.update({path: y}))
        for path in linears
    ]
    handles += [
        norm.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
        for name, norm in norms.items()
    ]
    _run(model, few, handles)
    found: dict[str, str] = {}
    for path, y in given.items():
        if isinstance(y, Tensor):
            fits = [name for name, x in read.items() if x.numel() == y.numel() and torch.equal(x.reshape(y.shape), y)]
            found |= {path: fits[0]} if fits else {}
    return found


def norm_offset(norm: Any) -> int | None:
    """What a norm adds to its weight: 0, or 1 (Gemma); None where it has none that is a factor of each dimension."""
    if getattr(norm, "weight", None) is None:  # OLMo's
        return None
    weight = norm.weight.detach()
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    bias = getattr(norm, "bias", None)
    shift = torch.zeros_like(weight) if bias is None else bias.detach()

    def given(value: Tensor) -> Tensor:
        other = copy.copy(norm)
        other._parameters = {**norm._parameters, "weight": nn.Parameter(value, requires_grad=False)}
        with torch.no_grad():
            out: Tensor = other.forward(x) - shift
        return out.float()

    zero, one, two = given(torch.zeros_like(weight)), given(torch.ones_like(weight)), given(2 * torch.ones_like(weight))
    unit = one - zero
    room = 1e-2 * float(unit.norm())
    if float((two - one - unit).norm()) > room or not float(unit.norm()) > 0:
        return None
    return next((o for o in (0, 1) if float((zero - o * unit).norm()) <= room), None)


def halved_stream_is_the_same(model: nn.Module, few: Batch, layer: str, halved: Sequence[Edit]) -> bool:
    """Whether the model gives the same with the stream doubled behind a layer and with what is written later halved.

    Powers of two round nothing; what is left are the small constants in norms.
    """
    batch = {name: value for name, value in prepared(model, few).items() if not name.startswith("label")}
    plain = running.outputs(model, batch)
    handle = model.get_submodule(layer).register_forward_hook(_doubled)
    try:
        doubled = running.outputs(model, batch)
    finally:
        handle.remove()
    with TemporaryPlan(model, halved):
        tried = running.outputs(model, batch)
    moved = running.difference(doubled, plain)
    return running.difference(doubled, tried) <= max(SAME * moved, 10 * running.rounding(torch.float32))


def _doubled(_: nn.Module, __: Any, output: Any) -> Any:
    first = first_tensor(output)
    if isinstance(output, Tensor):
        return 2 * first
    return type(output)(2 * each if each is first else each for each in output)


@torch.no_grad()
def _run(model: nn.Module, few: Batch, handles: list[Any]) -> None:
    try:
        with evaluating(model):
            forward(model, prepared(model, few), logits=False)
    finally:
        for handle in handles:
            handle.remove()
