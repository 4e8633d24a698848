"""Which config of a model speaks of which module, and which key holds an FFN's width."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.model.families.keys import OPTIONAL_WIDTH_KEYS, WIDTH_KEYS, WIDTH_KEYS_OF_PARTS
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.fresh import built, read, shapes
from ffnkit.model.linear import walk

Key = tuple[str, str]  # path of a sub-config, key


def config_tree(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """(dotted path, config) of a config and its sub-configs; the root's path is ""."""
    yield "", config
    for name in getattr(config, "sub_configs", {}):
        child = getattr(config, name, None)
        if isinstance(child, PreTrainedConfig):
            for path, each in config_tree(child):
                yield f"{name}.{path}" if path else name, each


def subconfig(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    """The config at a dotted path of the tree."""
    for part in path.split(".") if path else ():
        config = getattr(config, part)
    return config


def width_key(config: PreTrainedConfig, ffn: FFN) -> str | None:
    """The key of a config that holds an FFN's width, None where none does; "key[3]" for layer 3 of a list by layer."""
    parts = ffn.name.split(".")
    if "shared_expert" in ffn.name:  # also as a beginning: shared_experts
        parts = ["shared_expert", *(part for part in parts if part != "experts")]
    preferred = [key for part, key in WIDTH_KEYS_OF_PARTS.items() if part in parts]
    for key in dict.fromkeys([*preferred, *WIDTH_KEYS]):
        value = getattr(config, key, "absent")
        if isinstance(value, list | tuple) and ffn.layer < len(value) and value[ffn.layer] == ffn.width:
            return f"{key}[{ffn.layer}]"
        if value == ffn.width or (key in OPTIONAL_WIDTH_KEYS and value is None):
            return key
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
    that holds that number (without weights), to see which FFNs follow, and that nothing else does.
    """
    tree = list(config_tree(model.config))
    modules = dict(walk(model))
    keys: dict[str, Key | None] = {}
    for ffn in found:
        near = ((path, width_key(config, ffn)) for path, config in candidates(tree, modules, ffn.name))
        keys[ffn.name] = next(((path, key) for path, key in near if key is not None), None)
    by_width: dict[int, list[Key]] = {ffn.width: [] for ffn in found}
    for path, config in tree:
        for key, value in vars(config).items():
            if type(value) is int and value in by_width:
                by_width[value].append((path, key))
    asked = tuple(dict.fromkeys(key for ffn in found for key in by_width[ffn.width]))
    kind: Any
    kind, read_as = type(model), cast(Any, type(model.config))
    tried = _followers(kind, read_as, model.config.to_json_string(), asked) if asked else None
    for ffn in found if tried is not None else ():
        right = [key for key in by_width[ffn.width] if ffn.name in tried[key]]  # type: ignore[index]
        if keys[ffn.name] not in right and (keys[ffn.name] is None or keys[ffn.name] in asked):
            keys[ffn.name] = next(iter(right), None)
    return keys


@lru_cache(maxsize=64)
def _followers(kind: Any, config_class: Any, text: str, asked: tuple[Key, ...]) -> dict[Key, set[str]] | None:
    """By key, the FFNs that are twice as wide with twice its value, where nothing else changes.

    None where the class is not built from a config alone.
    """
    try:
        before = built(kind, read(config_class, text))
    except Exception:  # whatever a class of somebody's own raises
        return None
    known = {ffn.name: ffn for ffn in ffns(before)}
    old, found = shapes(before), dict[Key, set[str]]()
    for path, key in asked:
        found[path, key] = set()
        config = read(config_class, text)
        value = getattr(subconfig(config, path), key)
        try:
            setattr(subconfig(config, path), key, 2 * value)
            after = built(kind, config)
        except Exception:  # whatever the classes raise: they do not bear that value
            continue
        wider = {f.name for f in ffns(after) if f.name in known and f.width == 2 * known[f.name].width == 2 * value}
        inside = {id(p) for name in wider for p in known[name].parameters()}
        own = {name for name, p in before.named_parameters(remove_duplicate=False) if id(p) in inside}
        new = shapes(after)
        if all(new.get(name) == shape or name in own for name, shape in old.items()):
            found[path, key] = wider
    return found


def at_layer(key: tuple[str, str], layer: int) -> tuple[str, str]:
    """The key of a width once its layer has this number."""
    path, name = key
    return (path, f"{name.partition('[')[0]}[{layer}]") if name.endswith("]") else key


def set_width(config: PreTrainedConfig, key: tuple[str, str], width: int) -> None:
    """Write a width under (path of the sub-config, key)."""
    place, (name, _, layer) = subconfig(config, key[0]), key[1].partition("[")
    if layer:
        values = list(getattr(place, name))
        values[int(layer.rstrip("]"))] = width
        setattr(place, name, type(getattr(place, name))(values))
    else:
        setattr(place, name, width)
