"""Values of a config, also those that a layer has of its own.

A value may stand once for all layers, in a list with an entry a layer (Gemma 3n's widths), or in transformers'
``per_layer_config``, which says where a layer differs (Dots 3's widths, Gemma 4's heads). Of the last kind the config
itself refuses to be asked: everything here that reads a value by its name asks :func:`config_value`.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

# Path of a sub-config; a name in it: "d_ff", "d_ff[3]" or "per_layer_config[3].d_ff"; or, where the value times 96 is
# meant, "mlp_ratio*96", of whole numbers only "mlp_ratio*96 whole".
Key = tuple[str, str]
_TIMES = re.compile(r"(.+)\*(\d+)( whole)?")
_OF_LAYER = re.compile(r"per_layer_config\[(\d+)\]\.(\w+)")
_ENTRY = re.compile(r"(\w+)\[(\d+)\]")


@dataclass(frozen=True)
class Place:
    """Where a config holds a value.

    Attributes:
        name: the name of the value. layer: whose it is, None: of all. own: said by ``per_layer_config``, else by an
            entry of a list.
        times: what is meant is the value times this, rounded down: a ratio to the width of the model. A list has an
            entry a stage then, and ``layer`` is its number. whole: the value is a whole number.
    """

    name: str
    layer: int | None = None
    own: bool = False
    times: int = 1
    whole: bool = True

    @staticmethod
    def of(text: str) -> Place:
        if found := _TIMES.fullmatch(text):
            return replace(Place.of(found[1]), times=int(found[2]), whole=bool(found[3]))
        if found := _OF_LAYER.fullmatch(text):
            return Place(found[2], int(found[1]), own=True)
        found = _ENTRY.fullmatch(text)
        return Place(found[1], int(found[2])) if found else Place(text)

    def __str__(self) -> str:
        name = self.name
        if self.layer is not None:
            name = f"per_layer_config[{self.layer}].{self.name}" if self.own else f"{self.name}[{self.layer}]"
        return name if self.times == 1 else f"{name}*{self.times}" + " whole" * self.whole

    def meant(self, value: float) -> int:
        """The number that a value stands for."""
        return int(self.times * value)

    def said(self, number: int) -> float:
        """The least value that stands for a number, or for the next one that some value stands for."""
        if self.whole:
            return -(-number // self.times)
        value = number / self.times
        while self.meant(value) < number:  # the quotient may be rounded down
            value = math.nextafter(value, math.inf)
        return value


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


def varies(config: Any, name: str) -> bool:
    """Whether ``per_layer_config`` gives some layers a value of their own under this name."""
    return name in (getattr(config, "per_layer_attributes", None) or ())


def config_value(config: Any, name: str, layer: int | None = None, default: Any = None) -> Any:
    """What a config says under a name, of a layer where layers differ; without one, what is said of all others."""
    if not varies(config, name):
        return getattr(config, name, default)
    if layer is not None and 0 <= layer < config.num_hidden_layers:
        return getattr(config.per_layer_config[layer], name, default)
    return vars(config).get(config.attribute_map.get(name, name), default)


def overrides(config: Any) -> dict[int, dict[str, Any]]:
    """What ``per_layer_config`` says, by layer; a copy."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(layer): copy.deepcopy(row) for layer, row in config.to_dict()["per_layer_config"].items()}


def at_layer(key: Key, layer: int) -> Key:
    """The key of a value once its layer has this number."""
    place = Place.of(key[1])
    return key if place.layer is None or place.times > 1 else (key[0], str(replace(place, layer=layer)))


def entry(key: Key) -> Key:
    """Where the value of a key stands: that of others too, which mean other multiples of it."""
    return key[0], str(replace(Place.of(key[1]), times=1))


def held(config: PreTrainedConfig, key: Key) -> Any:
    """The value under a key, None where there is none."""
    place = Place.of(key[1])
    found = config_value(subconfig(config, key[0]), place.name, place.layer)
    if place.own or place.layer is None:
        return found
    return found[place.layer] if isinstance(found, list | tuple) and place.layer < len(found) else None


def largest(numbers: Iterable[tuple[Key, int]]) -> dict[Key, float]:
    """What is to stand at each place (:func:`entry`) for the largest of the numbers that keys of it mean."""
    values: dict[Key, float] = {}
    for key, number in numbers:
        values[entry(key)] = max(values.get(entry(key), 0), Place.of(key[1]).said(number))
    return values


def write(config: PreTrainedConfig, numbers: Mapping[Key, int]) -> None:
    """Write what stands for numbers under their keys, of several at one place the largest.

    What all layers of ``per_layer_config`` say alike, the config says once.
    """
    own: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    values: dict[Key, Any] = dict(largest(numbers.items()))
    for (path, text), new in values.items():
        place, home = Place.of(text), subconfig(config, path)
        if place.own and place.layer is not None:
            own[path, place.name][place.layer] = new
        elif place.layer is not None:
            entries = list(getattr(home, place.name))
            entries[place.layer] = new
            setattr(home, place.name, type(getattr(home, place.name))(entries))
        else:
            setattr(home, place.name, new)
    for (path, name), by_layer in own.items():
        _write_own(subconfig(config, path), name, by_layer)


def _write_own(config: Any, name: str, by_layer: dict[int, int]) -> None:
    rows, there = overrides(config), getattr(config, "is_heterogeneous", False)
    for layer, new in by_layer.items():
        rows.setdefault(layer, {})[name] = new
    if len(set(by_layer.values())) == 1 and len(by_layer) == config.num_hidden_layers:
        setattr(config, name, next(iter(by_layer.values())))
        for row in rows.values():
            row.pop(name, None)
    rows = {layer: row for layer, row in rows.items() if row}
    if rows or there:
        config.per_layer_config = rows
