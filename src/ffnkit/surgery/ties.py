"""Which tensors of a model have several names: what transformers is told of FFNs that share their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.linear import is_transposed, walk
from ffnkit.nn.expert_weights import PREFIX, parametrized_weights
from ffnkit.nn.reparametrized import ReparametrizedLinear


def declare_shared(model: PreTrainedModel) -> None:
    """Tell transformers which tensors of the model have several names: FFNs that share their weights.

    ``save_pretrained`` refuses undeclared sharing.
    """
    for ffn in ffns(model) if has_ffns(model) else []:
        if ffn.tied:
            declare_tied(model, ffn, list(ffn.tied))


def further_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Of these names of tensors those that mean a shared linear at another place than its first.

    What a place keeps of its own beside the shared weight is no further name of anything.
    """
    shared = [ffn for ffn in ffns(model) if ffn.tied and not ffn.layout.experts]
    places = {
        f"{twin}.{ffn.path(site)}.": (ffn, f"{twin}.") for ffn in shared for twin in ffn.tied for site in ffn.sites
    }
    starts = tuple(places)
    found = set()
    for name in names:
        if name.startswith(starts):
            ffn, twin = next(places[start] for start in starts if name.startswith(start))
            if not ffn.is_own(name.removeprefix(twin)):
                found.add(name)
    return found


def declare_tied(model: PreTrainedModel, ffn: FFN, twins: list[str]) -> None:
    """Declare the FFNs at the paths ``twins`` as further names of ``ffn``, for saving and for loading."""
    state = ffn.module.state_dict(keep_vars=True)
    sites = tuple(f"{ffn.path(site)}." for site in ffn.sites) if not ffn.layout.experts else ()
    exact = set(ffn.tensor_names) if ffn.layout.experts else set()
    own = [n for n in state if (n in exact or n.startswith(sites or PREFIX)) and not ffn.is_own(n)]
    pairs = {f"{twin}.{name}": f"{ffn.name}.{name}" for twin in twins for name in own}
    model._tied_weights_keys = {**(getattr(model, "_tied_weights_keys", None) or {}), **pairs}
    # On loading only plain parameters can be tied; a twin's others are missing then, and come back with ``share``.
    served = {name for name, _ in parametrized_weights(ffn.module)}
    others = [name for name in own if name in served or not isinstance(state[name], nn.Parameter)]
    _tie(model, pairs, {f"{twin}.{name}" for twin in twins for name in others})


def _tie(model: PreTrainedModel, pairs: Mapping[str, str], missing: set[str]) -> None:
    tied = {name: source for name, source in pairs.items() if name not in missing}
    model.all_tied_weights_keys = {**getattr(model, "all_tied_weights_keys", {}), **tied}
    ignored = {re.escape(name) for name in missing} | set(model._keys_to_ignore_on_load_missing or ())
    model._keys_to_ignore_on_load_missing = sorted(ignored) or None
    model._adjust_bias = _adjust_bias  # type: ignore[method-assign]


def renew_tied(model: PreTrainedModel) -> None:
    """Have transformers tie what a class shares by itself (Zamba) under the names that its rebuilt linears have."""
    starts = tuple(f"{name}." for name, module in walk(model) if isinstance(module, ReparametrizedLinear))
    if not starts or not any(name.startswith(starts) for name in model.all_tied_weights_keys):
        return
    state = model.state_dict(keep_vars=True)
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if not k.startswith(starts)}
    named = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    pairs = {name: source for name, source in named if name.startswith(starts) and name in state}
    _tie(model, pairs, {name for name in pairs if not isinstance(state[name], nn.Parameter)})


def withdraw_tied(model: PreTrainedModel, places: set[str]) -> None:
    """Take back that the tensors below ``places`` (each with its dot) are further names of others."""
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        declared = getattr(model, attribute, None)
        if isinstance(declared, dict):
            setattr(model, attribute, {k: v for k, v in declared.items() if not k.startswith(tuple(places))})
    ignored = {re.escape(place) for place in places}
    kept = [key for key in model._keys_to_ignore_on_load_missing or () if not key.startswith(tuple(ignored))]
    model._keys_to_ignore_on_load_missing = kept or None


def _adjust_bias(tied: nn.Module, source: Any) -> None:
    """In place of transformers' own, which cuts the bias of a tied layer to its weight's first dimension.

    That is the wrong one in layers whose weight lies as (in, out), or several numbers to a byte, and the bias would be
    lost without a word.
    """
    weight: Any = getattr(tied, "weight", None)  # experts hold parameters of other names
    if weight is not None and not is_transposed(tied) and weight.is_floating_point():
        PreTrainedModel._adjust_bias(None, tied, source)  # type: ignore[arg-type]
