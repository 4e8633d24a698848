"""Which config of a model speaks of which module, and which key holds an FFN's width."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.io.config_text import read, written
from ffnkit.model.config_values import (
    Key,
    Place,
    at_layer,
    config_tree,
    config_value,
    held,
    overrides,
    subconfig,
    varies,
    write,
)
from ffnkit.model.families.keys import OPTIONAL_WIDTH_KEYS, WIDTH_KEYS, WIDTH_KEYS_OF_PARTS
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name, ffns
from ffnkit.model.fresh import built, shapes
from ffnkit.model.linear import walk


def width_key(config: PreTrainedConfig, ffn: FFN) -> str | None:
    """The key of a config that holds an FFN's width (``config_values``), None where none does."""
    parts = ffn.name.split(".")
    if "shared_expert" in ffn.name:  # also as a beginning: shared_experts
        parts = ["shared_expert", *(part for part in parts if part != "experts")]
    preferred = [key for part, key in WIDTH_KEYS_OF_PARTS.items() if part in parts]
    for key in dict.fromkeys([*preferred, *WIDTH_KEYS]):
        said = config_value(config, key, ffn.layer, "absent")
        if isinstance(said, list | tuple) and ffn.layer < len(said) and said[ffn.layer] == ffn.width:
            return str(Place(key, ffn.layer))
        if said == ffn.width or (key in OPTIONAL_WIDTH_KEYS and said is None):
            return str(Place(key, ffn.layer, own=True)) if varies(config, key) else key
    return None


def candidates(
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


def width_keys(model: PreTrainedModel, found: list[FFN]) -> dict[str, Key | None]:
    """The key that holds each FFN's width, by the FFN's name; None where the family fixes it otherwise.

    Names and values propose one, which settles it where two would do. Models are built with another value of each key
    that holds that number (without weights), to see which FFNs follow, and that nothing else does; and with a width for
    each layer in ``per_layer_config``, which few classes read for their FFNs. Of FFNs that are left, a key may hold the
    ratio of their width to that of the model (Swin, DINOv2, SegFormer).
    """
    tree = list(config_tree(model.config))
    modules = dict(walk(model))
    keys: dict[str, Key | None] = {}
    for ffn in found:
        near = ((path, width_key(config, ffn)) for path, config in candidates(tree, modules, ffn.name))
        keys[ffn.name] = next(((path, key) for path, key in near if key is not None), None)
    by_width: dict[int, list[Key]] = {ffn.width: [] for ffn in found}
    for path, config in tree:
        for key, said in vars(config).items():
            if type(said) is int and said in by_width:
                by_width[said].append((path, key))
    asked = tuple(dict.fromkeys(key for ffn in found for key in by_width[ffn.width]))
    kind: Any
    kind, read_as = type(model), cast(Any, type(model.config))
    tried = _followers(kind, read_as, model.config.to_json_string(), asked) if asked else None
    for ffn in found if tried is not None else ():
        right = [key for key in by_width[ffn.width] if ffn.name in tried[key]]  # type: ignore[index]
        if keys[ffn.name] not in right and (keys[ffn.name] is None or keys[ffn.name] in asked):
            keys[ffn.name] = next(iter(right), None)
    keys |= _ratios(kind, read_as, model.config.to_json_string(), tree, [f for f in found if keys[f.name] is None])
    return _by_layer(kind, read_as, model.config.to_json_string(), found, keys)


def _ratios(
    kind: Any, config_class: Any, text: str, tree: list[tuple[str, PreTrainedConfig]], found: list[FFN]
) -> dict[str, Key | None]:
    """The key whose value times the width of the model is each FFN's width; None where there is none."""
    near = {ffn.name: [key for key, said in _numbers(tree) if int(ffn.d * said) == ffn.width] for ffn in found}
    asked = tuple(dict.fromkeys(key for keys in near.values() for key in keys))
    tried = _followers(kind, config_class, text, asked) if asked else None
    keys = {n: next((k for k in named if n in tried[k]), None) if tried else None for n, named in near.items()}
    of = {ffn.name: ffn.d for ffn in found}
    whole = {key: not _takes_half(kind, config_class, text, key) for key in set(keys.values()) if key is not None}
    return {n: k and (k[0], str(replace(Place.of(k[1]), times=of[n], whole=whole[k]))) for n, k in keys.items()}


def _numbers(tree: list[tuple[str, PreTrainedConfig]]) -> Iterator[tuple[Key, float]]:
    """The numbers above 0 that a config holds, also in lists."""
    for path, config in tree:
        for name, said in vars(config).items():
            entries = enumerate(said) if isinstance(said, list | tuple) else [(None, said)]
            for number, value in entries:
                if type(value) in (int, float) and 0 < value < math.inf:
                    yield (path, str(Place(name, number))), value


@lru_cache(maxsize=64)
def _takes_half(kind: Any, config_class: Any, text: str, key: Key) -> bool:
    """Whether a class bears a half more under a key than its config has, which may be a whole number."""
    config = read(config_class, text)
    try:
        write(config, {(key[0], str(replace(Place.of(key[1]), times=2, whole=False))): int(2 * held(config, key)) + 1})
        built(kind, read(config_class, config.to_json_string()))
    except Exception:  # whatever the classes raise
        return False
    return True


@lru_cache(maxsize=64)
def _followers(kind: Any, config_class: Any, text: str, asked: tuple[Key, ...]) -> dict[Key, set[str]] | None:
    """By key, the FFNs that are twice as wide with twice its value, where nothing else changes.

    Its value is their width, or the ratio of that to the width of the model. None where the class is not built from a
    config alone.
    """
    try:
        before = built(kind, read(config_class, text))
    except Exception:  # whatever a class of somebody's own raises
        return None
    known, found = {ffn.name: ffn for ffn in ffns(before)}, dict[Key, set[str]]()
    for path, key in asked:
        found[path, key] = set()
        config = read(config_class, text)
        said = held(config, (path, key))
        try:
            write(config, {(path, key): 2 * said})
            after = built(kind, config)
        except Exception:  # whatever the classes raise: they do not bear that value
            continue
        times = {ffn.name: 1 if ffn.width == said else ffn.d for ffn in known.values()}
        wider = {
            f.name
            for f in ffns(after)
            if f.name in known
            and (f.width, known[f.name].width) == (int(times[f.name] * 2 * said), int(times[f.name] * said))
        }
        if _nothing_else(before, after, wider):
            found[path, key] = wider
    return found


def _nothing_else(before: nn.Module, after: nn.Module, names: set[str]) -> bool:
    """Whether the shapes of two models are the same but for those of FFNs with these names."""
    inside = {id(p) for ffn in ffns(before) if ffn.name in names for p in ffn.parameters()}
    own = {name for name, p in before.named_parameters(remove_duplicate=False) if id(p) in inside}
    new = shapes(after)
    return all(new.get(name) == shape or name in own for name, shape in shapes(before).items())


def _by_layer(
    kind: Any, config_class: Any, text: str, found: list[FFN], keys: dict[str, Key | None]
) -> dict[str, Key | None]:
    """The keys, each that of a layer alone where the class gives every layer the width that its own config says."""
    groups: dict[tuple[str, str], list[FFN]] = defaultdict(list)
    for ffn in found:
        if (key := keys[ffn.name]) is not None and (Place.of(key[1]).own or Place.of(key[1]).layer is None):
            groups[key[0], Place.of(key[1]).name].append(ffn)
    new = dict(keys)
    for (path, name), group in groups.items():
        widths = tuple((ffn.name, layer, ffn.width) for ffn in group for layer in layers(ffn))
        if len({layer for _, layer, _ in widths}) > 1 and _reads_layers(kind, config_class, text, (path, name), widths):
            new |= {ffn.name: (path, str(Place(name, ffn.layer, own=True))) for ffn in group}
    return new


@lru_cache(maxsize=64)
def _reads_layers(kind: Any, config_class: Any, text: str, key: Key, widths: tuple[tuple[str, int, int], ...]) -> bool:
    """Whether each FFN is as wide as ``per_layer_config`` says of its layer, and nothing else changes.

    Args:
        key: path of the sub-config and name. widths: (name of the FFN, layer, its width now).
    """
    try:
        before, config = built(kind, read(config_class, text)), read(config_class, text)
        home: Any = subconfig(config, key[0])
        rows = overrides(home)
        asked = {layer: (2 + place) * width for place, (_, layer, width) in enumerate(widths)}
        for layer, width in asked.items():
            rows.setdefault(layer, {})[key[1]] = width
        home.per_layer_config = rows
        after = built(kind, written(config))
    except Exception:  # whatever the classes raise: most refuse to be asked for one width of all
        return False
    now = {ffn.name: ffn.width for ffn in ffns(after)}
    names = {name for name, _, _ in widths}
    return all(now.get(name) == asked[layer] for name, layer, _ in widths) and _nothing_else(before, after, names)


def layers(ffn: FFN) -> list[int]:
    """The numbers of the layers that an FFN stands in, in the order of its owners."""
    blocks = [block_name(owner).rpartition(".")[2] for owner in ffn.owners]
    return [int(number) if number else ffn.layer for number in blocks]


def spread(found: list[FFN], keys: Mapping[str, Key | None], widths: Mapping[str, int]) -> dict[Key, int]:
    """The width that each key of a config is to say, of all layers that share an FFN; FFNs without a key left out.

    Args:
        keys, widths: by the FFN's name.
    """
    known = [(ffn, key) for ffn in found if (key := keys[ffn.name]) is not None]
    return {at_layer(key, layer): widths[ffn.name] for ffn, key in known for layer in layers(ffn)}
