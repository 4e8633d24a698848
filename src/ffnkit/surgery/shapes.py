"""How the true shape of an edited model is written into its config, and which config key holds each FFN's width.

A model whose FFNs all have the width that its config says needs nothing of this. Any other model (widths that differ,
shared FFNs, factors kept apart) carries ``config.quantization_config`` with ``quant_method: ffnkit``: transformers'
one hook that may rebuild modules before the weights are read. The plain width keys then hold 1, an impossible width:
opened without ffnkit, such a checkpoint raises instead of filling weights at random.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.io.formats import FORMAT, QUANT_METHOD
from ffnkit.model import attention
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.linear import is_transposed
from ffnkit.nn.served import PREFIX
from ffnkit.surgery import masking

IMPOSSIBLE_WIDTH = 1

# In the order in which they are tried; the first whose value is the FFN's width names it.
_WIDTH_KEYS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "n_inner",
    "d_ff",
    "ffn_dim",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


def config_tree(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """(dotted path, config) of a config and its sub-configs; the root's path is ""."""
    yield "", config
    for name in getattr(config, "sub_configs", {}):
        child = getattr(config, name, None)
        if isinstance(child, PreTrainedConfig):
            for path, each in config_tree(child):
                yield f"{name}.{path}" if path else name, each


def _subconfig(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    for part in path.split(".") if path else ():
        config = getattr(config, part)
    return config


def _key(config: PreTrainedConfig, ffn: FFN) -> str | None:
    preferred: list[str] = []
    if "shared_expert" in ffn.name:
        preferred.append("shared_expert_intermediate_size")
    elif "experts" in ffn.name.split("."):
        preferred.append("moe_intermediate_size")
    for stack in ("encoder", "decoder"):
        if stack in ffn.name.split("."):
            preferred.append(f"{stack}_ffn_dim")
    for key in dict.fromkeys([*preferred, *_WIDTH_KEYS]):
        value = getattr(config, key, "absent")
        if value == ffn.width or (key == "n_inner" and value is None):
            return key
    return None


def width_keys(model: PreTrainedModel, found: list[FFN]) -> dict[str, tuple[str, str] | None]:
    """(path of the sub-config, key) that holds each FFN's width; None where the family fixes it otherwise."""
    config = model.config
    described = description(model)
    if described is not None:
        return {ffn.name: _stored_key(described, ffn) for ffn in found}
    tree = list(config_tree(config))
    modules = dict(model.named_modules(remove_duplicate=False))
    keys: dict[str, tuple[str, str] | None] = {}
    for ffn in found:
        keys[ffn.name] = None
        for path, candidate in _candidates(tree, modules, ffn.name):
            key = _key(candidate, ffn)
            if key is not None:
                keys[ffn.name] = (path, key)
                break
    return keys


def _stored_key(described: dict[str, Any], ffn: FFN) -> tuple[str, str] | None:
    stored = described["ffns"][ffn.name]["key"]
    return None if stored is None else (stored[0], stored[1])


def _candidates(
    tree: list[tuple[str, PreTrainedConfig]], modules: dict[str, nn.Module], name: str
) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The configs that may hold the width, nearest first: that of the innermost module that keeps one, then all."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        near = getattr(modules.get(".".join(parts[:end])), "config", None)
        if isinstance(near, PreTrainedConfig):
            # stacks such as T5's hold a copy of the config: the type tells which one is meant
            same = [(path, c) for path, c in tree if c is near] or [(p, c) for p, c in tree if type(c) is type(near)]
            yield from same
    yield from tree


# --- describing ---------------------------------------------------------------------------------------------------


def description(model: PreTrainedModel) -> dict[str, Any] | None:
    """What the config says of an edited model, or None for a model of plain shape."""
    config = getattr(model, "config", None)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    data = stored if isinstance(stored, dict) else stored.to_dict()
    return data if data.get("quant_method") == QUANT_METHOD else None


def describe(found: list[FFN], keys: dict[str, tuple[str, str] | None]) -> dict[str, Any]:
    """The true shape of a model: {"ffns": {name: {"width", "key", "special", "twins"}}, ...}."""
    rows = {}
    for ffn in found:
        key = keys[ffn.name]
        rows[ffn.name] = {
            "width": ffn.width,
            "key": None if key is None else list(key),
            "special": ffn.special,
            "twins": list(ffn.twins),
        }
    return {"quant_method": QUANT_METHOD, "format": FORMAT, "ffns": rows}


def is_plain(found: list[FFN], keys: dict[str, tuple[str, str] | None], original: dict[str, int]) -> bool:
    """Whether plain transformers can build this shape: one width for each config key, nothing shared or apart."""
    widths: dict[Any, set[int]] = defaultdict(set)
    for ffn in found:
        if ffn.special or ffn.twins:
            return False
        if keys[ffn.name] is None and ffn.width != original.get(ffn.name, ffn.width):
            return False
        widths[keys[ffn.name]].add(ffn.width)
    return all(len(values) == 1 for key, values in widths.items() if key is not None)


def update_config(model: PreTrainedModel, keys: dict[str, tuple[str, str] | None], original: dict[str, int]) -> None:
    """Make the config say the model's present shape; called after every change of modules.

    Args:
        keys: from :func:`width_keys`, before the change.
        original: the width that the plain class builds for FFNs without a key, by name.
    """
    found = ffns(model)
    config = model.config
    base = (description(model) or {}).get("base")
    linears, heads = masking.describe(model, found), attention.describe(model)
    if is_plain(found, keys, original) and not linears and not heads:
        for ffn in found:
            if (key := keys[ffn.name]) is not None:
                set_width(config, key, ffn.width)
        if description(model) is not None:
            del config.quantization_config
        return
    data = describe(found, keys) | ({"linears": linears} if linears else {})
    data |= {"attention": heads} if heads else {}
    for name, row in data["ffns"].items():
        if row["key"] is None:
            row["original"] = original.get(name, row["width"])
    if base is not None:
        data["base"] = base
    declare_shared(model)
    config.quantization_config = data
    for key in keys.values():
        if key is not None:
            set_width(config, key, IMPOSSIBLE_WIDTH)


def original_widths(model: PreTrainedModel, found: list[FFN]) -> dict[str, int]:
    """The width that the plain class builds, for FFNs whose width no config key holds."""
    rows = (description(model) or {}).get("ffns", {})
    return {ffn.name: rows.get(ffn.name, {}).get("original", ffn.width) for ffn in found}


def set_width(config: PreTrainedConfig, key: tuple[str, str], width: int) -> None:
    setattr(_subconfig(config, key[0]), key[1], width)


def rows_for(model: PreTrainedModel, described: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """The described FFNs, each with the places in ``model`` that share it; the model may have another head.

    Raises FfnkitError where the model has an FFN that the checkpoint does not describe.
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    primary = {name: first for first, row in described["ffns"].items() for name in (first, *row["twins"])}
    places: dict[str, list[str]] = defaultdict(list)
    for ffn in ffns(model):
        for name in ffn.owners:
            source = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in primary), None)
            if source is None:
                suffixes = {n for n in primary if n.endswith("." + name) or name.endswith("." + n)}
                if len(suffixes) != 1:
                    raise FfnkitError(
                        f"opening a compact checkpoint as {type(model).__name__}",
                        f"it does not describe the FFN {name}",
                        "Open it with the class that it was saved from",
                    )
                source = suffixes.pop()
            places[primary[source]].append(name)
    return [(described["ffns"][first], names) for first, names in places.items()]


def renamed(model: PreTrainedModel, described: dict[str, Any]) -> dict[str, Any]:
    """The description with the names that the FFNs have in ``model``: a body may have been given a head or lost it."""
    rows = {names[0]: {**row, "twins": names[1:]} for row, names in rows_for(model, described)}
    linears = masking.here(model, described)
    heads = attention.describe(model)
    data = {key: value for key, value in described.items() if key != "attention"} | {"ffns": rows}
    data |= {"linears": linears} if linears else {}
    return data | ({"attention": heads} if heads else {})


def declare_shared(model: PreTrainedModel) -> None:
    """Tell transformers which tensors of the model have several names: FFNs that share their weights.

    ``save_pretrained`` refuses undeclared sharing.
    """
    for ffn in ffns(model) if has_ffns(model) else []:
        if ffn.twins:
            declare_twins(model, ffn, list(ffn.twins))


def further_places(model: PreTrainedModel) -> list[str]:
    """Where shared linears stand besides their first place, each path with a dot behind it."""
    found = [ffn for ffn in ffns(model) if ffn.twins and not ffn.layout.experts]
    return [f"{twin}.{ffn.path(site)}." for ffn in found for twin in ffn.twins for site in ffn.sites]


def declare_twins(model: PreTrainedModel, ffn: FFN, twins: list[str]) -> None:
    """Declare the FFNs at the paths ``twins`` as further names of ``ffn``, for saving and for loading."""
    state = ffn.module.state_dict(keep_vars=True)
    sites = tuple(f"{ffn.path(site)}." for site in ffn.sites) if not ffn.layout.experts else ()
    exact = {ffn.path(site) for site in ffn.sites} if ffn.layout.experts else set()
    own = [name for name in state if name in exact or name.startswith(sites or PREFIX)]
    pairs = {f"{twin}.{name}": f"{ffn.name}.{name}" for twin in twins for name in own}
    model._tied_weights_keys = {**(getattr(model, "_tied_weights_keys", None) or {}), **pairs}
    # On loading only parameters can be tied; a twin's factor is missing then, and comes back with ``share_twins``.
    buffers = {f"{twin}.{name}" for twin in twins for name in own if not isinstance(state[name], nn.Parameter)}
    tied = {name: source for name, source in pairs.items() if name not in buffers}
    model.all_tied_weights_keys = {**getattr(model, "all_tied_weights_keys", {}), **tied}
    ignored = {re.escape(name) for name in buffers} | set(model._keys_to_ignore_on_load_missing or ())
    model._keys_to_ignore_on_load_missing = sorted(ignored) or None
    model._adjust_bias = _adjust_bias  # type: ignore[method-assign]


def withdraw_twins(model: PreTrainedModel, places: set[str]) -> None:
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
    weight: Any = tied.weight
    if not is_transposed(tied) and weight.is_floating_point():
        PreTrainedModel._adjust_bias(None, tied, source)  # type: ignore[arg-type]
