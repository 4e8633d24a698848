"""How the true shape of an edited model is written into its config, and which config key holds each FFN's width.

A model whose FFNs all have the width that its config says needs nothing of this. Any other model (widths that differ,
shared FFNs, factors kept apart) carries ``config.quantization_config``: transformers' one hook that may rebuild modules
before the weights are read. It names no method (``io.formats``), so that without ffnkit every class refuses the config
instead of filling weights at random; sub-configs say the same, for classes that are opened by one of them. The plain
width keys then hold 1, an impossible width.
"""

from __future__ import annotations

import copy
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.edits import Edit, Mask, SelectHeads, SetWidth, Tie, of_layer
from ffnkit.errors import FfnkitError
from ffnkit.io.formats import FORMAT, MARK, is_compact
from ffnkit.model import config_keys
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.config_keys import spread
from ffnkit.model.config_values import Place, at_layer, config_tree, entry, largest, write
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.linear import walk
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.surgery.ties import declare_shared, declare_tied, renew_tied

Keys = dict[str, tuple[str, str] | None]
IMPOSSIBLE_WIDTH = 1


def width_keys(model: PreTrainedModel, found: list[FFN]) -> Keys:
    """(path of the sub-config, key) that holds each FFN's width; None where the family fixes it otherwise."""
    rows = _rows(model)
    if rows:
        return {ffn.name: None if (key := rows[ffn.name]["key"]) is None else (key[0], key[1]) for ffn in found}
    return config_keys.width_keys(model, found)


def _rows(model: PreTrainedModel) -> dict[str, Any]:
    """What the config says of each FFN, by the names in ``model``, which may be a part of what the config is of."""
    described = description(model) or {}
    rows: dict[str, Any] = described.get("ffns", {})
    modules = dict(walk(model))
    return rows if all(name in modules for name in rows) else renamed(model, described)["ffns"]


# --- describing ---------------------------------------------------------------------------------------------------


def description(model: PreTrainedModel) -> dict[str, Any] | None:
    """What the config says of an edited model, or None for a model of plain shape."""
    config = getattr(model, "config", None)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    data = stored if isinstance(stored, dict) else stored.to_dict()
    return data if is_compact(data) else None


def tell(config: PreTrainedConfig, described: dict[str, Any] | None) -> None:
    """Have a config say what a model is, and each sub-config its part; with None they say nothing any more."""
    for path, each in config_tree(config):
        if described is not None:
            each.quantization_config = copy.deepcopy(_part(described, path))
        elif is_compact(getattr(each, "quantization_config", None)):
            del each.quantization_config


def _part(described: dict[str, Any], path: str) -> dict[str, Any]:
    """What is described of the FFNs whose width stands in a sub-config or below it, and of what is nearest to them."""
    if not path:
        return described
    homes = {name: (row["key"] or [path])[0] for name, row in described["ffns"].items()}

    def inside(name: str) -> bool:
        nearest = max(homes, key=lambda ffn: len(os.path.commonprefix([ffn.split("."), name.split(".")])), default="")
        return f"{homes.get(nearest, path)}.".startswith(f"{path}.")

    kinds = ("ffns", "linears", "attention")
    return {k: {n: r for n, r in v.items() if inside(n)} if k in kinds else v for k, v in described.items()}


def describe(model: PreTrainedModel, found: list[FFN], keys: Keys, original: dict[str, int]) -> dict[str, Any]:
    """The structure of a model as the edits that make it of a plain one, in their normal form and without numbers.

    {"ffns": {name: {"width", "key", "special", "twins"}}, "linears": {name: row}, "attention": {name: row}};
    :func:`edits_of` reads it back.
    """
    rows: dict[str, Any] = {}
    for ffn in found:
        key = keys[ffn.name]
        rows[ffn.name] = {
            "width": ffn.width,
            "key": None if key is None else list(key),
            "special": ffn.special,
            "twins": list(ffn.tied),
        }
        if key is None:
            rows[ffn.name]["original"] = original.get(ffn.name, ffn.width)
    linears = {name: layer.row() for name, layer in standing_apart(model, found).items()}
    heads = attention_rows(model)
    data = MARK | {"format": FORMAT, "ffns": rows}
    return data | ({"linears": linears} if linears else {}) | ({"attention": heads} if heads else {})


def standing_apart(model: nn.Module, found: list[FFN]) -> dict[str, ReparametrizedLinear]:
    """What stands in the place of linears outside of FFNs, by every place; updates have files of their own."""
    inside = {
        f"{owner}.{ffn.path(site)}"
        for ffn in found
        if not ffn.layout.experts
        for owner in ffn.owners
        for site in ffn.sites
    }
    modules = walk(model)
    return {
        n: m
        for n, m in modules
        if isinstance(m, ReparametrizedLinear) and not isinstance(m, AdapterLayer) and n not in inside
    }


def attention_rows(model: nn.Module) -> dict[str, Any]:
    """Of attentions that lost heads: {name: {"heads", "kv", "of"}}, by number."""
    rows = {each.name: each.kept for each in attentions(model)}
    return {
        name: {"heads": list(row.heads), "kv": list(row.kv), "of": list(row.of)} for name, row in rows.items() if row
    }


def is_plain(found: list[FFN], keys: Keys, original: dict[str, int]) -> bool:
    """Whether plain transformers can build this shape: one width for each config key, nothing shared or apart."""
    if any(ffn.special or ffn.tied for ffn in found):
        return False
    if any(keys[ffn.name] is None and ffn.width != original.get(ffn.name, ffn.width) for ffn in found):
        return False
    known = [(key, ffn.width) for ffn in found if (key := keys[ffn.name]) is not None]
    said = largest(known)
    return all(Place.of(key[1]).meant(said[entry(key)]) == width for key, width in known)


def is_plain_model(model: PreTrainedModel, found: list[FFN], keys: Keys, original: dict[str, int]) -> bool:
    """Whether plain transformers can build the model's shape from its config."""
    return is_plain(found, keys, original) and not standing_apart(model, found) and not attention_rows(model)


def update_config(model: PreTrainedModel, keys: Keys, original: dict[str, int]) -> None:
    """Make the config say the model's present shape; called after every change of modules.

    Args:
        keys: from :func:`width_keys`, before the change.
        original: the width that the plain class builds for FFNs without a key, by name.
    """
    found = ffns(model)
    config = model.config
    keys = {ffn.name: (key := keys[ffn.name]) and at_layer(key, ffn.layer) for ffn in found}
    base = (description(model) or {}).get("base")
    if is_plain_model(model, found, keys, original):
        write(config, spread(found, keys, {ffn.name: ffn.width for ffn in found}))
        tell(config, None)
        return
    data = describe(model, found, keys, original)
    if base is not None:
        data["base"] = base
    declare_shared(model)
    tell(config, data)
    write(config, spread(found, keys, _impossible(found, keys)))


def _impossible(found: list[FFN], keys: Keys) -> dict[str, int]:
    """Widths that no FFN has, by its name: no model without ffnkit is to take the weights for its own.

    Where a ratio says the width, a larger one: classes read 0 as none.
    """
    every = [(ffn.name, ffn.width, Place.of(key[1])) for ffn in found if (key := keys[ffn.name]) is not None]
    most = math.ceil(max((place.said(width) for _, width, place in every if place.times > 1), default=0))
    return {name: IMPOSSIBLE_WIDTH if place.times == 1 else place.meant(most + 1) for name, _, place in every}


def original_widths(model: PreTrainedModel, found: list[FFN]) -> dict[str, int]:
    """The width that the plain class builds, for FFNs whose width no config key holds."""
    rows = _rows(model)
    return {ffn.name: rows.get(ffn.name, {}).get("original", ffn.width) for ffn in found}


def rows_for(model: PreTrainedModel, described: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """The described FFNs, each with the places in ``model`` that share it; the model may have another head.

    Raises FfnkitError where the model has an FFN that the checkpoint does not describe.
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    primary = {name: first for first, row in described["ffns"].items() for name in (first, *row["twins"])}
    places: dict[str, list[str]] = defaultdict(list)
    for ffn in ffns(model):
        for name in ffn.owners:
            source = _near(name, prefix, primary)
            if source is None:
                raise FfnkitError(
                    f"opening a compact checkpoint as {type(model).__name__}",
                    f"it does not describe the FFN {name}",
                    "Open it with the class that it was saved from",
                )
            places[primary[source]].append(name)
    return [(described["ffns"][first], names) for first, names in places.items()]


def _near(name: str, prefix: str, there: Collection[str]) -> str | None:
    """The one of these names that means the same place, with another head or none, or in a part of the model."""
    near = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in there), None)
    ends = [n for n in there if n.endswith(f".{name}") or name.endswith(f".{n}")] if near is None else []
    return ends[0] if len(ends) == 1 else near


def renamed(model: PreTrainedModel, described: dict[str, Any]) -> dict[str, Any]:
    """The description with the names that the FFNs have in ``model``: a body may have been given a head or lost it."""
    paths = {path for path, _ in config_tree(model.config)}
    rows = {
        names[0]: {**row, "key": _key_within(paths, row["key"]), "twins": names[1:]}
        for row, names in rows_for(model, described)
    }
    linears = linears_for(model, described)
    heads = attention_rows(model)
    data = {key: value for key, value in described.items() if key != "attention"} | {"ffns": rows}
    data |= {"linears": linears} if linears else {}
    return data | ({"attention": heads} if heads else {})


def _key_within(paths: set[str], key: list[str] | None) -> list[str] | None:
    """(path, key) of a width as a config with these paths has it: a sub-config of the one that it was written for."""
    if key is None:
        return None
    parts = key[0].split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts) + 1))
    return [next((end for end in ends if end in paths), ""), key[1]]


def linears_for(model: PreTrainedModel, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The described linears under the names that they have in ``model``, which may have another head or none."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    modules = dict(walk(model))
    rows = {}
    for name, row in described.get("linears", {}).items():
        own = _near(name, prefix, modules)
        if own is not None:
            rows[own] = row
    return rows


def attentions_for(model: PreTrainedModel, described: dict[str, Any]) -> list[tuple[Attention, dict[str, Any]]]:
    """The described attentions under the names that they have in ``model``, which may have another head or none."""
    rows = described.get("attention", {})
    if not rows:
        return []
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    by_name = {name: each for each in attentions(model) for name in (each.name, *each.tied)}
    found = []
    for name, row in rows.items():
        own = _near(name, prefix, by_name)
        if own is not None:
            found.append((by_name[own], row))
    return found


# --- and back -----------------------------------------------------------------------------------------------------


def edits_of(model: PreTrainedModel, described: dict[str, Any]) -> Iterator[Edit]:
    """The edits that give a freshly built model the described structure; each is to be carried out before the next.

    FFNs that share their weights have their own yet: :func:`ties_of` makes them one once the weights are there.
    """
    by_owner = {name: ffn for ffn in ffns(model) for name in ffn.owners}
    for row, names in rows_for(model, described):
        for ffn in dict.fromkeys(by_owner[name] for name in names):
            if ffn.width != row["width"]:
                yield SetWidth(ffn.name, width=row["width"])
            for site, special in row["special"].items():
                yield of_layer(special["kind"]).blank(ffn, site, special)
    for attention, row in attentions_for(model, described):
        yield SelectHeads.blank(attention, row)
    for name in linears_for(model, described):
        linear = model.get_submodule(name)
        if not isinstance(linear, ReparametrizedLinear):  # it may stand in several places
            yield Mask.blank_linear(name, linear)


def ties_of(model: PreTrainedModel, described: dict[str, Any]) -> Iterator[Edit]:
    """The edits that make the FFNs one again which a compact checkpoint stores once."""
    for _, names in rows_for(model, described):
        if len(names) > 1:
            yield Tie.blank(names[0], names[1:])


def declare(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Declare the FFNs that will share their weights: the file holds each once, as what the class itself shares."""
    renew_tied(model)
    by_owner = {name: ffn for ffn in ffns(model) for name in ffn.owners}
    for _, names in rows_for(model, described):
        twins = [name for name in names[1:] if by_owner[name] is not by_owner[names[0]]]
        if twins:
            declare_tied(model, by_owner[names[0]], twins)
