"""Which config of a model speaks of which module, and which key holds an FFN's width."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig

from ffnkit.model.families.keys import OPTIONAL_WIDTH_KEYS, WIDTH_KEYS, WIDTH_KEYS_OF_PARTS
from ffnkit.model.ffn import FFN


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
