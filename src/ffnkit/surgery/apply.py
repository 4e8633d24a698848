"""Carry out a plan on a model in memory, and take its layers out again: all of it or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ffnkit.edits import Edit
from ffnkit.edits.order import check_normal
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.model import trainable
from ffnkit.model.finding import ffns
from ffnkit.model.linear import check_untouched, walk
from ffnkit.nn.adapter_layer import AdapterLayer, adapter_layers
from ffnkit.nn.differing import Differing
from ffnkit.nn.expert_weights import folded, parametrized_weights, remove_parametrizations
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.plans import Plan
from ffnkit.surgery import compressed, description
from ffnkit.surgery.journal import journal
from ffnkit.surgery.meta import rehearse, structure
from ffnkit.surgery.untie import own_weights, part, settle
from ffnkit.surgery.writer import ModelWriter, put

SAVING = (LowRank.kind, Masked.kind, Differing.kind)  # layers with which something is lost that a method saved
logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


def apply(model: Model, plan: Plan) -> Model:
    """Carry out a plan on the model, in place; returns the same object.

    Everything is checked before the first change: that the plan fits, that the model bears each edit, and, on a copy
    of its structure without weights, that all of them together leave a model that can be saved. What still fails then
    (memory, say) leaves the model as it was. Memory beyond the model: the new tensors, until the end also the old ones
    of what is edited.

    Raises:
        FfnkitError: where the model is not of the shape that the plan was made for.
    """
    carry_out(model, plan.edits, plan)
    return model


def carry_out(model: nn.Module, edits: Iterable[Edit], plan: Plan | None = None) -> None:
    """Edits on a model in memory: checked, rehearsed on the meta device, then done at once or not at all."""
    edits = tuple(edits)
    check_untouched(model, f"applying a plan to {type(model).__name__}")
    if plan is not None:
        plan.check_fits({ffn.name: ffn for ffn in ffns(model)}, type(model).__name__)
        plan.check_weights(model)
    writer = check_edits(model, edits, rehearsed=plan is not None and structure(model) in plan.rehearsed)
    with journal(model):
        if places := compressed.places(edits):
            compressed.mark(model, places)
        writer.carry_out(edits)


def check_edits(model: nn.Module, edits: tuple[Edit, ...], *, rehearsed: bool = False) -> ModelWriter:
    """The writer that can carry these edits out; reads only.

    Raises:
        FfnkitError: the model does not bear them, alone or, unless that was ``rehearsed`` already, together.
    """
    check_normal(edits)
    writer = ModelWriter(model)
    writer.check(edits)
    if not rehearsed:
        rehearse(model, edits)
    return writer


def share(model: PreTrainedModel, described: dict[str, object]) -> None:
    """Make the FFNs and edited linears one again which a compact checkpoint stores once, now that weights are there."""
    writer = ModelWriter(model, empty=True)
    for edit in description.ties_of(model, described):
        edit.perform(writer)
    first: dict[tuple[int, int], nn.Module] = {}
    for name in description.linears_for(model, described):
        linear: Any = model.get_submodule(name)
        held = first.setdefault((id(linear.stored), id(linear.bias)), linear)
        if held is not linear:
            writer.replace(linear, held)


# --- folding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold(model: Model, *, masked: bool = False, keep: Collection[str] = ()) -> Model:
    """Turn every reparametrized linear into a plain layer with the same outputs, in place.

    Where it fails, the model is as it was. Where thin pairs are multiplied out it says so, for the model grows.

    Args:
        keep: kinds of layers that stay: "lowrank" (thin pairs, whose product has more parameters), "masked" (masks,
            whose zeros later training would fill) and "differing" (FFNs that share their weights and keep something of
            their own: folded, each has weights of its own). ``SAVING`` is all of them.
        masked: where an update goes into a weight that holds zeros (it was pruned), these stay zero; what the update
            did there is lost, so outputs change. Without it the update fills them.
    """
    check_untouched(model, f"folding {type(model).__name__}")
    with journal(model):
        found = ffns(model)
        keys, original = description.width_keys(model, found), description.original_widths(model, found)
        named = trainable.flags_by_name(model)
        _say_growth(model, keep)
        differing = [ffn for ffn in found if ffn.differing and ffn.tied and Differing.kind not in keep]
        parted = part(model, differing, "folding what shares an FFN")
        fold_layers(model, model, keep=keep)
        trainable.renew(model, named)
        _plain_again(model, lambda layer: layer.fold(layer.folded(masked=masked)))
        for each in parted:
            own_weights(model, each)
        if parted:
            settle(model, parted, untied=parted)
        else:
            description.update_config(model, keys, original)
    return model


def _say_growth(model: nn.Module, keep: Collection[str]) -> None:
    pairs = [m for m in model.modules() if isinstance(m, LowRank) and LowRank.kind not in keep]
    now = sum(p.numel() for pair in pairs for p in (*pair.first.parameters(), *pair.second.parameters()))
    then = sum(pair.features[0] * pair.features[1] for pair in pairs)
    if then > now:
        what = f"{len(pairs)} thin pairs of {now:,} parameters are multiplied out to {then:,}"
        logger.warning("folding %s: %s", type(model).__name__, what)
    several = [f for f in ffns(model) if f.differing and f.tied] if Differing.kind not in keep else []
    if several:
        what = f"{sum(len(f.owners) for f in several)} layers that share {len(several)} FFNs get weights of their own"
        logger.warning("folding %s: %s", type(model).__name__, what)


def fold_layers(model: nn.Module, *within: nn.Module, keep: Collection[str] = ()) -> None:
    """Plain layers again in the place of the reparametrized ones that stand in these modules; updates stay.

    So do layers of the kinds ``keep``.

    What layers share they share afterwards, unless they differ: the weight of each is computed once.
    """
    inside = dict.fromkeys(inner for module in within for inner in module.modules())
    weights: dict[int, nn.Parameter] = {}
    for owner in inside:
        if parametrized_weights(owner):
            for name, value in folded(owner, keep).items():
                old: Any = owner._parameters[name]
                if id(old) not in weights:
                    weights[id(old)] = put(old, value, ())
            remove_parametrizations(owner, keep)
    places: dict[ReparametrizedLinear, list[str]] = {}
    for name, module in walk(model):
        if module not in inside or not isinstance(module, ReparametrizedLinear) or isinstance(module, AdapterLayer):
            continue
        if module.kind not in keep:
            places.setdefault(module, []).append(name)
    for special, names in places.items():
        stored = special.stored
        if special.own:
            weights[id(special)] = special.folded()
        elif id(stored) not in weights:
            fresh = special.folded()
            same = fresh.shape == stored.shape and stored is special._parameters.get("weight")
            weights[id(stored)] = put(stored, fresh, ()) if same else fresh
        plain = special.fold(weights[id(special if special.own else stored)])
        for name in names:
            model.set_submodule(name, plain)


@torch.no_grad()
def remove_updates(model: Model) -> Model:
    """Take the updates away, in place: every weight has the very bits that it had before they came.

    Raises:
        FfnkitError: all the rest of the model trained beside them.
    """
    if adapter_layers(model) and trainable.noted(model)[1] is None:
        do = "Fold it, or load the base model anew"
        raise FfnkitError("taking the adapter away", "the rest of the model trained too", do)
    with journal(model):
        take_updates(model)
    return model


def take_updates(model: nn.Module) -> None:
    """Plain linears with the very weights from before the updates; what trained beside them, where that is noted."""
    _, before = trainable.noted(model)
    own = dict(model.named_parameters())
    other = [name for name, value in (before or {}).items() if name not in own or own[name].shape != value.shape]
    if other:
        what, do = f"{other[0]} trained beside it and was rewritten since", "Fold it, or load the base model anew"
        raise FfnkitError("taking the adapter away", what, do)
    ModelWriter(model).write_values(before or {})
    _plain_again(model, lambda layer: layer.restore())


def _plain_again(model: nn.Module, plain_of: Callable[[AdapterLayer], Any]) -> None:
    """Plain linears in the place of those with updates; flags as they were."""
    trainable.forget(model)
    places: dict[AdapterLayer, list[str]] = {}
    for name, module in walk(model):
        if isinstance(module, AdapterLayer):
            places.setdefault(module, []).append(name)
    for layer, names in counted(places.items(), "folding", len(places)):
        plain = plain_of(layer)
        trainable.hand_on(model, layer.base, plain.weight)
        for name in names:
            model.set_submodule(name, plain)
    if places:
        trainable.train_as_before(model)
