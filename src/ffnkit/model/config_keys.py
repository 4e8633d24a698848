"""Which config of a model speaks of which module, and which key holds an FFN's width."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.model.families.keys import OPTIONAL_WIDTH_KEYS, WIDTH_KEYS, WIDTH_KEYS_OF_PARTS
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.fresh import built, shapes

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
    """The key of a config that holds an FFN's width, None where none does."""
    parts = ffn.name.split(".")
    if "shared_expert" in ffn.name:  # also as a beginning: shared_experts
        parts = ["shared_expert", *(part for part in parts if part != "experts")]
    preferred = [key for part, key in WIDTH_KEYS_OF_PARTS.items() if part in parts]
    for key in dict.fromkeys([*preferred, *WIDTH_KEYS]):
        value = getattr(config, key, "absent")
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

    Names and values tell it. Where the value stands in several places, or in one of another name, models are built
    with another value in each (without weights), to see which FFNs follow.
    """
    tree = list(config_tree(model.config))
    modules = dict(model.named_modules(remove_duplicate=False))
    keys: dict[str, Key | None] = {}
    for ffn in found:
        near = ((path, width_key(config, ffn)) for path, config in candidates(tree, modules, ffn.name))
        keys[ffn.name] = next(((path, key) for path, key in near if key is not None), None)
    by_width: dict[int, list[Key]] = {ffn.width: [] for ffn in found}
    for path, config in tree:
        for key, value in vars(config).items():
            if type(value) is int and value in by_width:
                by_width[value].append((path, key))
    unsure = [ffn for ffn in found if (held := by_width[ffn.width]) and held != [keys[ffn.name]]]
    if unsure:
        tried = {key: _following(model, key) for ffn in unsure for key in by_width[ffn.width]}
        if any(names is not None for names in tried.values()):  # else its class is not built from a config alone
            for ffn in unsure:
                right = [key for key in by_width[ffn.width] if ffn.name in (tried[key] or ())]
                keys[ffn.name] = keys[ffn.name] if keys[ffn.name] in right else next(iter(right), None)
    return keys


def _following(model: PreTrainedModel, key: Key) -> set[str] | None:
    """The FFNs that are twice as wide with twice the value of a key, where nothing else changes; None: not to be had."""
    config = copy.deepcopy(model.config)
    value = getattr(subconfig(config, key[0]), key[1])
    try:
        before = built(model, config)
        setattr(subconfig(config, key[0]), key[1], 2 * value)
        after = built(model, config)
    except Exception:  # whatever the classes raise: they do not bear that value
        return None
    widths = {ffn.name: (ffn.width, ffn) for ffn in ffns(before)}
    follow = {f.name for f in ffns(after) if f.name in widths and f.width == 2 * widths[f.name][0] == 2 * value}
    inside = {id(p) for name in follow for p in widths[name][1].parameters()}
    own = {name for name, p in before.named_parameters(remove_duplicate=False) if id(p) in inside}
    one, two = shapes(before), shapes(after)
    return follow if all(two.get(name) == shape or name in own for name, shape in one.items()) else set()


def set_width(config: PreTrainedConfig, key: tuple[str, str], width: int) -> None:
    """Write a width under (path of the sub-config, key)."""
    setattr(subconfig(config, key[0]), key[1], width)
