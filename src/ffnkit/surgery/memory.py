"""The only place that changes a model's modules: apply a plan, fold it, rebuild an empty model to a saved shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffnkit.edits.kinds import Adapt, Drop, Edit, Factor, Heads, Keep, Mask, Resize, Rewrite, Swap, Tie, Train
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import run_uneven_experts
from ffnkit.model.attention import find
from ffnkit.model.families.ffns import WIDTH_ATTRIBUTES
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns as find_ffns
from ffnkit.model.linear import is_transposed
from ffnkit.model.parts import (
    flags_by_name,
    forget,
    hand_on,
    keep_noted,
    note,
    noted,
    parts_of,
    remember,
    renew,
    train_as_before,
    train_only,
)
from ffnkit.nn.adapted import Adapted, adapted, fingerprint
from ffnkit.nn.coefficients import Coefficients
from ffnkit.nn.dsee import sparse_low_rank
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.nn.scaled import Scaled
from ffnkit.nn.served import serve, served, unserve
from ffnkit.nn.sparsegrad import Bases, SparseGradLinear
from ffnkit.nn.special import Special
from ffnkit.ops.neurons import Neurons, average, balance, cluster_sizes, concatenate
from ffnkit.plans import Plan, Shape
from ffnkit.surgery import cutting, head_config, heads, masking, shapes
from ffnkit.surgery.depth import moved, without_layers


@torch.no_grad()
def apply(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Carry out a plan on the model, in place; returns the same object.

    Everything is checked before the first change. Memory beyond the model: one FFN.

    Raises:
        FfnkitError: where the model is not of the shape that the plan was made for.
    """
    found = {ffn.name: ffn for ffn in find_ffns(model)}
    check_fits(found, plan, type(model).__name__)
    keys = shapes.width_keys(model, list(found.values()))
    original = shapes.original_widths(model, list(found.values()))
    narrowed = [*plan.shapes, *(edit.ffn for edit in plan.edits if isinstance(edit, Heads))]
    masking.check_masks(model, masking.linear_masks(plan.edits), narrowed)
    heads.check(model, [edit for edit in plan.edits if isinstance(edit, Heads)])
    updates = [edit for edit in plan.edits if isinstance(edit, Adapt)]
    train = [edit for edit in plan.edits if isinstance(edit, Train)]
    if updates:
        check_adapts(model, updates)
    named = flags_by_name(model)
    shared: dict[tuple[Any, ...], Bases] = {}
    for edit in plan.edits:
        if isinstance(edit, Adapt):
            renew(model, named)
            remember(model)  # anew: edits before it may have made parameters
            adapt(model, edit, shared)
        elif isinstance(edit, Train):
            continue
        elif isinstance(edit, Mask) and not edit.site:
            masking.mask_linear(model, edit.ffn, edit.mask())
        elif isinstance(edit, Heads):
            heads.remove(model, find(model, edit.ffn), edit.index)
        elif isinstance(edit, Tie):
            tie(model, [found[name] for name in edit.touched], edit)
        elif not isinstance(edit, Drop):
            carry_out(found[edit.ffn], edit)
            if isinstance(edit, Keep):
                _keep_noted(model, found[edit.ffn], edit)
    renew(model, named)
    gone = [edit.layer for edit in plan.edits if isinstance(edit, Drop)]
    if gone:
        renamed, _ = without_layers(model, gone)
        keys, original = moved(keys, renamed, gone), moved(original, renamed, gone)
    head_config.settle(model)
    shapes.update_config(model, keys, original)
    run_uneven_experts(model)
    if train:
        let_train(model, [part for edit in train for part in edit.parts])
        write_values(model, {name: value for edit in train for name, value in edit.values.items()})
    return model


def carry_out(ffn: FFN, edit: Edit) -> None:
    """One edit of one FFN."""
    if isinstance(edit, Resize):
        resize(ffn, _fused(ffn, edit))
    elif isinstance(edit, Keep) and cutting.carries(ffn):
        cutting.keep(ffn, edit.index.long())
    elif isinstance(edit, Keep):
        resize(ffn, _kept(ffn.raw(), edit.index.to(ffn.raw().up.device).long()))
    elif isinstance(edit, Rewrite):
        resize(ffn, edit.neurons().map(torch.clone))  # a plan's tensors stay its own
    elif isinstance(edit, Swap):
        attach(ffn, edit.site, "scaled", edit.scale)
    elif isinstance(edit, Factor):
        attach(ffn, edit.site, "lowrank", edit.first.clone(), edit.second.clone())
    elif isinstance(edit, Mask):
        attach(ffn, edit.site, "masked", edit.mask())


@torch.no_grad()
def fold(model: PreTrainedModel, *, masked: bool = False) -> PreTrainedModel:
    """Turn every special linear back into a plain layer with the same outputs, in place; returns the same object.

    Args:
        masked: where an update goes into a weight that holds zeros (it was pruned), these stay zero; what the update
            did there is lost, so outputs change. Without it the update fills them.
    """
    found = find_ffns(model)
    keys = shapes.width_keys(model, found)
    original = shapes.original_widths(model, found)
    named = flags_by_name(model)
    for ffn in found:
        if ffn.special:
            detach(ffn)
    masking.unmask(model)
    renew(model, named)
    unadapt(model, fold=True, masked=masked)
    shapes.update_config(model, keys, original)
    return model


def rebuild(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Give a freshly built, empty model the shape that a compact checkpoint describes (``shapes.describe``).

    FFNs that share their weights have their own yet: :func:`declare` says that they will share.
    """
    by_owner = {name: ffn for ffn in find_ffns(model) for name in ffn.owners}
    for row, names in shapes.rows_for(model, described):
        width = row["width"]
        for ffn in _unique(by_owner[name] for name in names):
            if ffn.width != width:
                resize(ffn, _empty(ffn.raw(), width))
            for site, special in row["special"].items():
                attach(ffn, site, special["kind"], *_blank(ffn, site, special))
    heads.rebuild(model, described)
    masking.rebuild(model, described)
    run_uneven_experts(model)


def declare(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Declare the FFNs that will share their weights; ``share_twins`` makes them one once the weights are there."""
    by_owner = {name: ffn for ffn in find_ffns(model) for name in ffn.owners}
    for _, names in shapes.rows_for(model, described):
        twins = [name for name in names[1:] if by_owner[name] is not by_owner[names[0]]]
        if twins:
            shapes.declare_twins(model, by_owner[names[0]], twins)


def share_twins(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Make the FFNs that a compact checkpoint stores once one object again, after loading."""
    by_owner = {name: ffn for ffn in find_ffns(model) for name in ffn.owners}
    for _, names in shapes.rows_for(model, described):
        for name in names[1:]:
            share(model, by_owner[names[0]], names[0], name)


# --- the single changes -------------------------------------------------------------------------------------------


def resize(ffn: FFN, neurons: Neurons) -> None:
    """Give an FFN new neurons, any number of them; every owner of its weights follows."""
    values = site_values(ffn, neurons)
    if ffn.layout.experts:
        for path, (weight, _) in values.items():
            fresh = _like(ffn.module._parameters[path], weight.mT if ffn.layout.transposed else weight)
            for owner in _unique(ffn.owners.values()):
                owner._parameters[path] = fresh
    else:
        for path, (weight, bias) in values.items():
            old = ffn.module.get_submodule(path)
            if is_transposed(old):
                weight = weight.mT
            new_weight = _like(old.weight, weight)
            new_bias = None if bias is None else _like(old.bias, bias)
            for linear in _unique(owner.get_submodule(path) for owner in ffn.owners.values()):
                linear.weight, linear.bias = new_weight, new_bias
                _set_features(linear)
    for owner in _unique(ffn.owners.values()):
        for name in WIDTH_ATTRIBUTES:
            if isinstance(owner.__dict__.get(name), int):
                setattr(owner, name, neurons.ff)


_ADAPTED: dict[str, Callable[..., Adapted]] = {
    "sparsegrad": SparseGradLinear,
    "dsee": sparse_low_rank,
    "coefficients": Coefficients,
}
_SPECIAL: dict[str, Callable[..., Special]] = {kind.kind: kind for kind in (Scaled, LowRank, Masked)}


@contextmanager
def borrowed(ffn: FFN) -> Iterator[None]:
    """Whatever happens to the FFN's plain weights inside the block, the very same parameters are back after it."""
    owners = _unique(ffn.owners.values())
    paths = [ffn.path(site) for site in ffn.sites]
    holders = owners if ffn.layout.experts else _unique(o.get_submodule(p) for o in owners for p in paths)
    modules = _unique([*holders, *owners])
    parameters = [dict(module._parameters) for module in modules]
    plain = [{k: v for k, v in vars(module).items() if type(v) is int} for module in modules]
    try:
        yield
    finally:
        for module, own, numbers in zip(modules, parameters, plain, strict=True):
            module._parameters.update(own)
            vars(module).update(numbers)


def attach(ffn: FFN, site: str, kind: str, *tensors: Tensor) -> None:
    """Put a special linear in the place of a plain one, in every owner.

    Args:
        kind: "scaled" (a factor of the inputs), "lowrank" (first, second) or "masked" (bool).
    """
    if ffn.layout.experts:
        if kind == "lowrank":
            ffn.linear(site)  # says why there is none
        if ffn.layout.transposed:  # factors as the parameters lie: (E, in, 1), or (E, in, out)
            tensors = tuple(t[..., None] if t.ndim == 2 else t.mT.contiguous() for t in tensors)
        for owner in _unique(ffn.owners.values()):
            serve(owner, ffn.path(site), kind, site, *tensors)
        return
    made: dict[nn.Module, Special] = {}
    for owner in ffn.owners.values():
        linear = owner.get_submodule(ffn.path(site))
        if not isinstance(linear, Special):  # one linear may hang in several owners
            if linear not in made:
                made[linear] = _SPECIAL[kind](linear, *tensors)
            owner.set_submodule(ffn.path(site), made[linear])


def check_adapts(model: nn.Module, updates: list[Adapt]) -> None:
    """Raises FfnkitError where a linear is not there, is edited already, or holds another weight than was meant."""
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[int] = set()
    for edit in updates:
        asked = f"{edit.layer} on {edit.ffn}"
        linear = modules.get(edit.ffn)
        if id(linear) in seen:
            raise FfnkitError(asked, "the plan updates this linear twice", "Apply one plan, then fold and plan again")
        seen.add(id(linear))
        if linear is None:
            raise FfnkitError(asked, f"{type(model).__name__} has no such module", "Make the plan for this model")
        if isinstance(linear, Special):
            raise FfnkitError(asked, f"it is edited already ({linear.kind})", "Fold the model first (ffnkit.fold)")
        if not isinstance(linear, nn.Linear | Conv1D):
            raise FfnkitError(asked, f"it is a {type(linear).__name__}", "Name linears")
        if edit.fingerprint is not None and fingerprint(linear.weight).tolist() != edit.fingerprint:
            do = "Load the very base model that the update was made for"
            raise FfnkitError(asked, "the weight is another one than the update was made for", do)


def adapt(model: nn.Module, edit: Adapt, shared: dict[tuple[Any, ...], Bases]) -> None:
    """Let a small update train beside a linear's weight, wherever the linear hangs.

    Args:
        shared: bases that stand in the model already, by what they were made of; further ones are added.
    """
    linear: Any = model.get_submodule(edit.ffn)
    given: dict[str, Any] = {key: value for key, value in edit.given.items() if key != "trained"}
    parts = dict(edit.parts)
    factors, l1 = parts.pop("coefficients", None), given.pop("l1", 0.0)
    if "left" in parts:
        left, right = parts.pop("left"), parts.pop("right")
        kind = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        key = (id(left), id(right), *kind.values())
        given["bases"] = shared.setdefault(key, Bases(left.to(**kind), right.to(**kind)))
    layer = _ADAPTED[edit.layer](linear, **given, **parts)
    if factors is not None:
        layer.use_coefficients(factors, l1)
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is linear]:
        model.set_submodule(name, layer)


def let_train(model: nn.Module, parts: list[str]) -> None:
    """What adapted linears train and these parts of the model, and nothing else; parts of earlier updates train on."""
    known, old = noted(model)
    parts = list(dict.fromkeys([*known, *parts]))
    chosen = {id(p) for p in parts_of(model, parts)}
    for layer in adapted(model).values():
        chosen -= {id(layer.base)}
        chosen |= {id(p) for p in _own(layer)}
    train_only(model, lambda parameter: id(parameter) in chosen)
    before = {name: p.detach().clone() for name, p in beside(model).items()} if "rest" not in parts else None
    if before is not None:  # what trained already is as it was before the first update came
        own = dict(model.named_parameters())
        under = {name: name if name in own else f"{name.removesuffix('.weight')}.base" for name in old or ()}
        before |= {under[name]: value for name, value in (old or {}).items()}
    note(model, parts, before)


def _keep_noted(model: nn.Module, ffn: FFN, edit: Keep) -> None:
    """Values from before the updates, which come back without them, lose the same neurons."""
    for site in ffn.sites:
        if site != "down":
            name, index = f"{ffn.name}.{ffn.path(site)}.bias", edit.index.long()
            if ffn.layout.fused:
                half = len((noted(model)[1] or {}).get(name, ())) // 2
                index = torch.cat([index, index + half])
            keep_noted(model, name, index, 0)


def beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains beside the updates, by name."""
    inside = {id(p) for layer in adapted(model).values() for p in (layer.base, *_own(layer))}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


def parts_beside(model: nn.Module) -> list[str]:
    """The parts that were let train beside the updates."""
    return list(noted(model)[0])


def _own(layer: Adapted) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters(recurse=False) if name not in ("base", "bias")]


def write_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Write parameters by name. Raises FfnkitError for one that is not there, or of another shape."""
    own = dict(model.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            here = "not there" if name not in own else f"of shape {tuple(own[name].shape)}"
            do = "Load the model with the same task head"
            raise FfnkitError(f"writing {name} of shape {tuple(value.shape)}", f"it is {here}", do)
    for name, value in values.items():
        own[name].copy_(value)


@torch.no_grad()
def unadapt(model: nn.Module, *, fold: bool, masked: bool = False) -> None:
    """Plain linears again, with the updates in their weights or, with what trained beside them, as they were before.

    Args:
        masked: weights that are zero stay zero when updates go into them.

    Raises:
        FfnkitError: without ``fold``, where all the rest of the model trained too.
    """
    found = adapted(model)
    _, before = noted(model)
    if not fold:
        asked, do = "taking the adapter away", "Fold it, or load the base model anew"
        if before is None:
            raise FfnkitError(asked, "the rest of the model trained too", do)
        own = dict(model.named_parameters())
        other = [name for name, value in before.items() if name not in own or own[name].shape != value.shape]
        if other:
            raise FfnkitError(asked, f"{other[0]} trained beside it and was rewritten since", do)
        write_values(model, before)
    forget(model)
    for layer in found.values():
        places = [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]
        plain = layer.fold(masked=masked) if fold else layer.restore()
        hand_on(model, layer.base, plain.weight)
        for name in places:
            model.set_submodule(name, plain)
    if found:
        train_as_before(model)


def detach(ffn: FFN) -> None:
    """Turn an FFN's special linears back into plain ones with the same outputs."""
    if ffn.layout.experts:
        for number, owner in enumerate(_unique(ffn.owners.values())):
            unserve(owner, fold=number == 0)
        return
    made: dict[nn.Module, nn.Module] = {}
    for owner in ffn.owners.values():
        for site in ffn.sites:
            special = owner.get_submodule(ffn.path(site))
            if isinstance(special, Special) and not isinstance(special, Adapted):
                if special not in made:
                    made[special] = special.fold()
                owner.set_submodule(ffn.path(site), made[special])


def _blank(ffn: FFN, site: str, special: dict[str, Any]) -> tuple[Tensor, ...]:
    """Tensors of the shapes that a special linear holds, with arbitrary values."""
    weight = ffn._oriented(site)
    (out, inner), lead = weight.shape[-2:], weight.shape[:-2]
    if special["kind"] == "scaled":
        return (weight.new_empty(*lead, inner),)
    if special["kind"] == "masked":
        return (torch.ones_like(weight, dtype=torch.bool),)
    return weight.new_empty(special["rank"], inner), weight.new_empty(out, special["rank"])


def tie(model: PreTrainedModel, ffns: list[FFN], edit: Tie) -> None:
    """Make several FFNs one: the first gets the mean of all, or stays, and the others use its very modules."""
    anchor = ffns[0]
    if edit.average:
        resize(anchor, merged(ffns, edit.orders))
    for member in ffns[1:]:
        for name in member.owners:
            share(model, anchor, anchor.name, name)
            anchor.twins[name] = model.get_submodule(name)


def merged(ffns: list[FFN], orders: Tensor) -> Neurons:
    """The mean of FFNs whose neurons are put in the order of the first one's, in its dtype; one FFN at a time.

    Args:
        orders: (len(ffns) - 1, ff): neuron j of the first goes with neuron orders[i, j] of the (i + 1)-th.

    Source: Verma et al. (arXiv 2501.06126), W_in* = mean of P_i W_in,i, W_out* = mean of W_out,i P_i^T.
    """
    first = ffns[0].raw()
    exact = torch.promote_types(first.up.dtype, torch.float32)
    sums = first.map(lambda value: value.detach().to(exact, copy=True))
    for ffn, order in zip(ffns[1:], orders, strict=True):
        fits = ffn.raw().take(order.to(first.up.device).long())
        for name, value in sums.tensors().items():
            value += getattr(fits, name).to(value)
    return sums.map(lambda value: value / len(ffns)).to(first.up.dtype)


def share(model: PreTrainedModel, ffn: FFN, source: str, name: str) -> None:
    """Let the owner ``name`` use the weights of the owner ``source`` of ``ffn``.

    An owner that holds nothing else is replaced as a whole: libraries that exchange its linears (adapters, wrappers)
    then do so for all places at once. Elsewhere the linears are shared.
    """
    first, owner = ffn.owners[source], model.get_submodule(name)
    if owner is first:
        return
    if ffn.layout.experts:
        for path in dict.fromkeys((ffn.path("up"), ffn.path("down"))):
            owner._parameters[path] = first._parameters[path]
        unserve(owner, fold=False)
        for path, buffer in served(first):
            _, kind, site = buffer.split("_")
            serve(owner, path, kind, site, getattr(first, buffer))
    elif _exchangeable(first, owner, ffn):
        model.set_submodule(name, first)
    else:
        for site in ffn.sites:
            owner.set_submodule(ffn.path(site), first.get_submodule(ffn.path(site)))


def _exchangeable(first: nn.Module, owner: nn.Module, ffn: FFN) -> bool:
    """Whether two owners hold nothing but an FFN, and are told alike in all else (a layer's number would differ)."""
    inside = {id(p) for site in ffn.sites for p in first.get_submodule(ffn.path(site)).parameters()}
    facts = [{k: v for k, v in vars(m).items() if type(v) in (int, float, str, bool)} for m in (first, owner)]
    return (
        type(first) is type(owner)
        and facts[0] == facts[1]
        and all(id(p) in inside for p in first.parameters())
        and not [name for name, _ in first.named_buffers() if not name.startswith(tuple(map(ffn.path, ffn.sites)))]
    )


# --- helpers ------------------------------------------------------------------------------------------------------


def check_fits(found: dict[str, FFN], plan: Plan, model: str) -> None:
    """Raises FfnkitError where the FFNs of a model, by name, are not those that the plan was made for."""
    for name, shape in plan.shapes.items():
        if name not in found:
            raise FfnkitError(
                f"applying a plan for {plan.model} to {model}", f"it has no FFN {name}", "Make the plan for this model"
            )
        here = Shape.of(found[name])
        if here != shape:
            raise FfnkitError(
                f"applying a plan for {plan.model} to {model}",
                f"{name} is {here} where the plan was made for {shape}",
                "Make the plan for this model",
            )
        changes = [edit for edit in plan.edits if name in edit.touched]
        if all(isinstance(edit, Keep) for edit in changes):  # weights and updates lose the same neurons
            cutting.check_keepable(found[name], f"applying a plan to {model}")
        else:
            found[name].check_plain(f"applying a plan to {model}")


def _fused(ffn: FFN, edit: Resize) -> Neurons:
    """The neurons that a Resize asks for, computed in float32 at least."""
    old = ffn.raw()
    exact = torch.promote_types(old.up.dtype, torch.float32)
    lifted = old.map(lambda value: value.to(exact))
    labels = edit.labels.to(old.up.device).long()
    if labels.shape != lifted.up.shape[:-1] or int(cluster_sizes(labels, edit.width).min()) == 0:
        raise FfnkitError(f"resizing {ffn.name} to {edit.width}", "labels do not fit it", "Make the plan again")
    means = average(balance(lifted) if edit.balance else lifted, labels, edit.width)
    if not edit.root:
        return means
    root = cluster_sizes(labels, edit.width).to(exact).sqrt()
    bias = None if means.up_bias is None else means.up_bias * root
    return dataclasses.replace(means.scaled(root), up=means.up * root[..., None], up_bias=bias)


def _kept(neurons: Neurons, index: Tensor) -> Neurons:
    """The neurons at ``index`` (width,), or (E, width) with experts."""
    if not neurons.experts:
        return neurons.take(index)
    return concatenate([neurons.expert(e).take(index[e]) for e in range(neurons.experts)])


def _empty(neurons: Neurons, width: int) -> Neurons:
    """Neurons of another width with arbitrary values, on the same device (the meta device while loading)."""
    grown = {name: value.new_empty(_with_width(name, value.shape, width)) for name, value in neurons.tensors().items()}
    return Neurons(**grown)


def _with_width(name: str, shape: torch.Size, width: int) -> tuple[int, ...]:
    if name == "down_bias":
        return tuple(shape)
    if name in ("up", "gate"):
        return (*shape[:-2], width, shape[-1])
    return (*shape[:-1], width)


def site_values(ffn: FFN, neurons: Neurons) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight (out, in) and bias by the path of each linear or parameter."""
    values = {ffn.path("down"): (neurons.down, neurons.down_bias)}
    if ffn.layout.fused:
        assert neurons.gate is not None
        bias = None
        if neurons.up_bias is not None and neurons.gate_bias is not None:
            bias = ffn.fuse(neurons.gate_bias, neurons.up_bias, -1)
        values[ffn.path("up")] = (ffn.fuse(neurons.gate, neurons.up, -2), bias)
    else:
        values[ffn.path("up")] = (neurons.up, neurons.up_bias)
        if neurons.gate is not None:
            values[ffn.path("gate")] = (neurons.gate, neurons.gate_bias)
    return values


def _like(old: Any, value: Tensor) -> nn.Parameter:
    """A parameter with the dtype, device and trainability of the one that it replaces."""
    new = value.detach().to(device=old.device, dtype=old.dtype).contiguous()
    if new.data_ptr() == old.data_ptr() and new.device.type != "meta":
        new = new.clone()
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    if getattr(old, "_is_hf_initialized", False):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def _set_features(linear: Any) -> None:
    rows, columns = linear.weight.shape
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = rows, columns
    elif hasattr(linear, "nf"):
        linear.nf, linear.nx = columns, rows


def _unique(modules: Any) -> list[Any]:
    return list(dict.fromkeys(modules))
