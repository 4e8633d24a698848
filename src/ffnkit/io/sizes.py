"""Whether a config can be the one of the tensors beside it, told from the files' heads before memory is used for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError

Shapes = dict[str, tuple[int, ...]]
_LAYERS = re.compile(r"(n|num|encoder|decoder)_(.*_)?layers?")
_COUNTS = re.compile(r"(n|num)_(.*_)?(heads?|experts|blocks)|(.*_)?(hidden|intermediate|vocab)_size|head_dim")
_BESIDE = re.compile(r"(weight_scale(_inv)?|_scales|\.scale)$")  # of numbers in few bits
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
_DO = "Use the config.json that was saved with the weights"
_ROOM = 1 << 24  # numbers that a model may hold beside 8 for each stored one: new heads, weights in few bits


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder that from_pretrained reads: whole, or the shards that an index names.

    Raises FfnkitError: an index that cannot be read, or that names no shards.
    """
    whole, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    try:
        shards = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what is no JSON, or not of this form
        found = f"{index.name} cannot be read, or names no shards ({type(error).__name__}: {error})"
        raise FfnkitError(f"model {folder}", found, "Save or download it again") from error
    return [path for path in (Path(folder) / str(name) for name in shards) if path.is_file()]


def stored_shapes(files: Iterable[str | Path] | None) -> Shapes:
    """The shape of each tensor in safetensors files; only their heads are read."""
    from safetensors import safe_open

    found: Shapes = {}
    for path in files or ():
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def opened_bytes(files: Iterable[str | Path], size: int) -> int:
    """Bytes of the weights in safetensors files once they are opened; numbers of 8 and 4 bits become plain ones.

    Args:
        size: bytes of a plain number.
    """
    from safetensors import safe_open

    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                kind, count = stored.get_dtype(), math.prod(stored.get_shape())
                if _BESIDE.search(name):
                    continue
                if kind.startswith("F8"):
                    count *= size
                elif name.endswith("_blocks"):  # two numbers in a byte
                    count *= 2 * size
                else:
                    count *= _BYTES.get(kind, 4)
                total += count
    return total


def check_config(auto_class: Any, config: Any, stored: Shapes, asked: str) -> None:
    """Raises FfnkitError where a config tells of more layers or numbers than the files can hold, or holds NaN.

    Args:
        auto_class: the class that is to be opened.
    """
    import torch

    largest = max((side for shape in stored.values() for side in shape), default=0)
    strange = False
    for key, value in _numbers(config.to_dict()):
        if isinstance(value, float) and math.isnan(value):
            raise FfnkitError(asked, f"{key} in its config.json is NaN", "Mend the config")
        if _LAYERS.fullmatch(key) and not 0 <= value <= len(stored):
            raise FfnkitError(asked, f"{key} is {value} in its config.json, of {len(stored)} tensors in its files", _DO)
        if _COUNTS.fullmatch(key) and value < 0:
            raise FfnkitError(asked, f"{key} is {value} in its config.json", _DO)
        strange |= isinstance(value, int) and value > largest and not key.endswith("_id")
    if not strange or getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        made = auto_class.from_config(config) if hasattr(auto_class, "from_config") else auto_class(config)
    size, kept = sum(p.numel() for p in made.parameters()), sum(map(math.prod, stored.values()))
    if size > 8 * kept + _ROOM:
        raise FfnkitError(asked, f"its config tells of {size:,} numbers, and its files hold {kept:,}", _DO)


def _numbers(data: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Key and value of every number in a config."""
    if isinstance(data, dict):
        for name, each in data.items():
            yield from _numbers(each, str(name))
    elif isinstance(data, list | tuple):
        for each in data:
            yield from _numbers(each, f"{key}[]")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield key, data
