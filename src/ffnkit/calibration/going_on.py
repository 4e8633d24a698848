"""Where work that goes block by block leaves what it has done, so that it goes on behind it when it is interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnkit.io.files import mapped, space_errors, write_bytes


@dataclass
class _Place:
    folder: Path
    told: Callable[[int], None]
    number: int = 0


class CannotKeep(Exception):
    """A block gives something that no file holds."""


_places: list[_Place] = []


@contextmanager
def going_on(folder: Path, told: Callable[[int], None] = lambda done: None) -> Iterator[None]:
    """While the block runs, :func:`next_place` gives folders below ``folder``, in the same order whenever it runs.

    Args:
        told: called with the number of FFNs that were done before.
    """
    _places.append(_Place(folder, told))
    try:
        yield
    finally:
        _places.pop()


def next_place() -> Path | None:
    """A folder for the work that begins now, whether or not it is there; None where nothing is to be left."""
    if not _places:
        return None
    place = _places[-1]
    place.number += 1
    return place.folder / str(place.number - 1)


def tell(done: int) -> None:
    """So many FFNs were done before."""
    if _places and done:
        _places[-1].told(done)


def keep(value: Any, stem: Path) -> tuple[Any, Any]:
    """Write what a block gave to files of its own, named ``stem`` and a number.

    Returns:
        The same with its tensors mapped from these files, and plain data from which :func:`again` has it.

    Raises:
        CannotKeep: there is something else in it than tensors, numbers, and tuples of these.
    """
    files: list[dict[str, Any]] = []

    def walk(each: Any) -> tuple[Any, Any]:
        if isinstance(each, Tensor):
            told: dict[str, Any] = {
                "file": f"{stem.name}-{len(files)}",
                "shape": list(each.shape),
                "dtype": str(each.dtype).removeprefix("torch."),
                "device": str(each.device),
            }
            files.append(told)
            _write(each, stem.parent / str(told["file"]))
            return _read(told, stem.parent), told
        if type(each) is tuple:
            pairs = [walk(inner) for inner in each]
            return tuple(value for value, _ in pairs), [told for _, told in pairs]
        if each is None or isinstance(each, bool | int | float):
            return each, {"value": each}
        raise CannotKeep(type(each).__name__)

    return walk(value)


def again(told: Any, folder: Path) -> Any:
    """What :func:`keep` wrote, from its plain data."""
    if isinstance(told, list):
        return tuple(again(each, folder) for each in told)
    return told["value"] if "value" in told else _read(told, folder)


def files_of(told: Any) -> Iterator[str]:
    """The names of the files that plain data of :func:`keep` speak of, at any depth."""
    if isinstance(told, dict) and "file" in told:
        yield told["file"]
    elif isinstance(told, dict | list):
        for each in told.values() if isinstance(told, dict) else told:
            yield from files_of(each)


def _write(value: Tensor, path: Path) -> None:
    with space_errors(path), path.open("wb") as file:
        write_bytes(value.detach().cpu(), file)
        os.fsync(file.fileno())


def _read(told: dict[str, Any], folder: Path) -> Tensor:
    return mapped(folder / told["file"], told["shape"], getattr(torch, told["dtype"])).to(told["device"])
