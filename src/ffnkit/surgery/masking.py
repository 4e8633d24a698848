"""Masks on linears anywhere in a model: put on, described in the config, put on again while loading, taken off."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffnkit.edits.kinds import Mask
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import is_transposed
from ffnkit.nn.adapted import Adapted
from ffnkit.nn.masked import Masked
from ffnkit.nn.special import Special, oriented

KINDS = (nn.Linear, Conv1D, Masked, Adapted)


def stored_weight(linear: Any) -> nn.Parameter:
    """The parameter that a linear keeps its weight in, below an update and as it is stored."""
    return cast(nn.Parameter, linear.base if isinstance(linear, Adapted) else linear.weight)


def is_maskable(module: nn.Module) -> bool:
    """Whether a mask can be put on the module."""
    return isinstance(module, KINDS)


def check_float(weight: Any, name: str) -> None:
    """Raises FfnkitError where the weights cannot be masked: quantized, or several numbers to a byte."""
    if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
        do = "Prune the model in float, save it, and load that with quantization_config"
        raise FfnkitError(f"pruning {name}", f"its weight is quantized ({type(weight).__name__} {weight.dtype})", do)


def linear_masks(edits: Iterable[Any]) -> list[Mask]:
    """The masks of single linears, those of FFNs' sites left out."""
    return [edit for edit in edits if isinstance(edit, Mask) and not edit.site]


def check_masks(model: nn.Module, masks: list[Mask], edited: Iterable[str]) -> None:
    """Raises FfnkitError where a linear is not there, cannot be masked or has another shape than the mask.

    Args:
        edited: FFNs and attentions by name that other edits of the plan change first, and with them shapes inside.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name in edited)
    for edit in masks:
        asked = f"masking {edit.ffn}"
        linear = modules.get(edit.ffn)
        if linear is None:
            raise FfnkitError(asked, f"{type(model).__name__} has no such module", "Make the plan for this model")
        if not is_maskable(linear):
            edited_already = isinstance(linear, Special)
            found = f"it is edited already ({linear.kind})" if edited_already else f"it is a {type(linear).__name__}"
            raise FfnkitError(asked, found, "Fold the model first (ffnkit.fold)" if edited_already else "Name linears")
        check_float(stored_weight(linear), edit.ffn)
        if not edit.ffn.startswith(inside):
            _check_shape(linear, edit.ffn, edit.shape)


def _check_shape(linear: Any, name: str, shape: Iterable[int]) -> None:
    here = tuple(oriented(stored_weight(linear), is_transposed(linear)).shape)
    if here != tuple(shape):
        raise FfnkitError(
            f"masking {name}", f"it is {here} where the mask is {tuple(shape)}", "Make the plan for this model"
        )


@torch.no_grad()
def mask_linear(model: nn.Module, name: str, mask: Tensor) -> None:
    """Weights of a linear become zero where the mask is false, wherever the linear stands, and stay zero.

    A plain linear becomes :class:`~ffnkit.nn.masked.Masked`; a masked one loses further weights; below an update the
    frozen weight itself gets the zeros, and needs no mask.

    Args:
        mask: (out, in), bool, true where weights stay.
    """
    linear = model.get_submodule(name)
    _check_shape(linear, name, mask.shape)
    weight = stored_weight(linear)
    places = linears_of(model, weight)
    for module, names in places.items():
        stored = oriented(mask, is_transposed(module)).to(weight.device)
        if isinstance(module, Adapted):
            module.base.masked_fill_(~stored, 0.0)
        elif isinstance(module, Masked):
            module.mask &= stored
            module.weight.masked_fill_(~module.mask, 0.0)
        else:
            made = Masked(cast(Any, module), mask)
            for place in names:
                model.set_submodule(place, made)


def linears_of(model: nn.Module, weight: nn.Parameter) -> dict[nn.Module, list[str]]:
    """The linears that compute with a weight, each with every place where it stands."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_maskable(module) and stored_weight(module) is weight:
            places.setdefault(module, []).append(name)
    return places


def masked_linears(model: nn.Module, found: list[FFN]) -> dict[str, Masked]:
    """The masked linears outside of FFNs, by every place where they stand; those inside are the FFNs' affair."""
    inside = {
        f"{owner}.{ffn.path(site)}"
        for ffn in found
        if not ffn.layout.experts
        for owner in ffn.owners
        for site in ffn.sites
    }
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, Masked) and name not in inside}


def describe(model: nn.Module, found: list[FFN]) -> dict[str, Any]:
    """What the config says of them: {name: {"kind": "masked"}}."""
    return {name: {"kind": module.kind} for name, module in masked_linears(model, found).items()}


def here(model: PreTrainedModel, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The described linears under the names that they have in ``model``, which may have another head or none."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    modules = dict(model.named_modules(remove_duplicate=False))
    rows = {}
    for name, row in described.get("linears", {}).items():
        own = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
        if own is not None:
            rows[own] = row
    return rows


def rebuild(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Masks on the linears of an empty model that a compact checkpoint describes; the file fills them."""
    for name in here(model, described):
        linear = model.get_submodule(name)
        if not isinstance(linear, Masked):  # it may stand in several places
            weight = oriented(stored_weight(linear), is_transposed(linear))
            mask_linear(model, name, torch.ones_like(weight, dtype=torch.bool))


def unmask(model: nn.Module, only: Container[str] | None = None) -> None:
    """Plain linears with the zeros in their weights, wherever masked ones stand.

    Args:
        only: paths of those that are meant; None: all.
    """
    places: dict[Masked, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Masked):
            places.setdefault(module, []).append(name)
    for module, names in places.items():
        if only is not None and not any(name in only for name in names):
            continue
        plain = module.fold()
        for name in names:
            model.set_submodule(name, plain)


def written_out(model: nn.Module, found: list[FFN], state: dict[str, Tensor]) -> None:
    """Put the zeros of masked linears outside of FFNs into a state dict's weights, and leave the masks out of it."""
    for name, module in masked_linears(model, found).items():
        state.pop(f"{name}.mask", None)
        state[f"{name}.weight"] = (module.weight * module.mask).detach()
