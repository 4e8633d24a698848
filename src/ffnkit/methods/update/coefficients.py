"""Coefficients on attention heads and hidden neurons, learnt beside the updates of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from ffnkit.edits import Edit, Stage, UpdateLinear
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attentions
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.linear import PLAIN, features
from ffnkit.nn.quantized import is_quantized_linear
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.plans import Plan


def with_coefficients(model: nn.Module, plan: Plan, l1: float) -> Plan:
    """A plan of updates with coefficients besides: one for each head (or group of heads) and each hidden neuron.

    They start at 1, train with what the plan trains, and are drawn towards zero in every step. Those of a head stand
    before the attention's output linear, those of neurons before an FFN's second linear. Heads that cannot go alone
    and experts in one 3-D parameter have none.

    Args:
        plan: with edits ``Adapt`` and ``Train``, made for this model.
        l1: in each step of an optimizer coefficients move towards zero by the learning rate times this.

    Raises:
        FfnkitError: a linear is quantized or edited, or FFNs share their weights in linears of their own.
    """
    edits: list[Edit] = list(plan.edits)
    at = {id(model.get_submodule(e.target)): n for n, e in enumerate(edits) if e.stage is Stage.UPDATE}
    end = next((place for place, edit in enumerate(edits) if edit.stage is Stage.TRAIN), len(edits))
    made: list[Edit] = []
    for name, count in places(model):
        linear = model.get_submodule(name)
        ones = {"coefficients": torch.ones(count)}
        if (place := at.get(id(linear))) is None:
            given, shape = {"l1": float(l1), "trained": count}, list(features(linear))
            made.append(UpdateLinear(name, layer="coefficients", given=given, parts=ones, shape=shape))
            continue
        edits[place] = cast(UpdateLinear, edits[place]).with_coefficients(float(l1), torch.ones(count))
    return dataclasses.replace(plan, edits=(*edits[:end], *made, *edits[end:]))


def places(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The linears behind units that can go alone, by name, and how many units each has. Raises FfnkitError."""
    seen: set[int] = set()
    for attention in attentions(model):
        linear = attention.linear("o")
        if not attention.why and attention.units > 1 and id(linear) not in seen:
            seen.add(id(linear))
            name = f"{attention.name}.{attention.layout.o}".strip(".")
            _check(linear, name)
            yield name, attention.units
    for ffn in ffns(model) if has_ffns(model) else []:
        if ffn.layout.experts:
            continue
        name = f"{ffn.name}.{ffn.path('down')}".strip(".")
        linear = ffn.linear("down")
        _check(linear, name)
        if len({id(ffn.linear("down", owner)) for owner in ffn.owners.values()}) > 1:
            what = f"FFNs that share the weights of {ffn.name} have linears of their own"
            raise FfnkitError(f"coefficients on {name}", what, "Tune without coefficients")
        yield name, ffn.width


def _check(linear: nn.Module, name: str) -> None:
    asked = f"coefficients on {name}"
    if isinstance(linear, ReparametrizedLinear):
        raise FfnkitError(asked, f"it is edited already ({linear.kind})", "Fold the model first (ffnkit.fold)")
    if is_quantized_linear(linear) or not isinstance(linear, PLAIN):
        do = "Learn coefficients in float, remove heads and neurons, then quantize"
        raise FfnkitError(asked, "its weight is quantized", do)
