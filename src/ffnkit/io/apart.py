"""The form in which a base and the updates that are made for it lie apart, in one folder: where things are in it.

    DIR/base        a checkpoint of the model without its updates: its zeros are zeros
    DIR/adapter     the updates, as ``fk.save_adapter`` writes them
    DIR/lora        where they are of low rank only: the same in peft's form

What no weight can hold lies in DIR/adapter too: bottleneck adapters, and a prefix in peft's form.

``from_pretrained`` finds no model in DIR itself: whoever does not know of the updates shall not get the base without
them unasked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE, ADAPTER, LORA = "base", "adapter", "lora"
BOTTLENECK, PREFIX = "bottleneck.safetensors", "adapter_model.safetensors"
_INSIDE = ("adapter.safetensors", BOTTLENECK, PREFIX)  # DIR/adapter has one of them
_PEFT = "adapter_config.json"
ADAPTERS = (*_INSIDE, _PEFT)  # what a folder holds that is an adapter

# (model, folder of the adapter) -> the model with its updates: set by ``checkpoint.hook``, for this package knows none.
put_on: list[Callable[[Any, Path], Any]] = []


def is_apart(name_or_dir: str | Path) -> bool:
    """Whether a base and its updates lie apart in a folder."""
    folder = Path(name_or_dir).expanduser()
    there = (folder / BASE / "config.json").is_file() and any((folder / ADAPTER / name).is_file() for name in _INSIDE)
    return there and not os.path.lexists(folder / "config.json")


def has_adapters(name_or_dir: str | Path) -> bool:
    """Whether a folder opens with more on the model than its config tells: such updates, or an adapter of peft."""
    return is_apart(name_or_dir) or (Path(name_or_dir).expanduser() / _PEFT).is_file()


def base_of(name_or_dir: str | Path) -> Path:
    """Where the base of such a folder is."""
    return Path(name_or_dir).expanduser() / BASE


def with_updates(model: Any, name_or_dir: str | Path) -> Any:
    """The model that was opened as the base of a folder, with the updates that lie beside it, in place; around a prefix
    of peft, peft's model."""
    for put in put_on if is_apart(name_or_dir) else ():
        model = put(model, Path(name_or_dir).expanduser() / ADAPTER)
    return model
