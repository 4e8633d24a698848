"""``--device-map``: models that are opened are laid over several devices by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")
_maps: list[tuple[Any, bool]] = []


def read_map(given: str) -> Any:
    """What transformers is told: one of :data:`WORDS`, a device, or the map in a JSON file.

    Raises:
        FfnkitError: it is none of them.
    """
    if given in WORDS:
        return given
    if given.endswith(".json"):
        try:
            found = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            do = 'Write a file such as {"model.embed_tokens": 0, "model.layers": "cpu"}'
            raise FfnkitError(f"--device-map {given}", f"it cannot be read ({error})", do) from error
        if isinstance(found, dict) and all(isinstance(value, str | int) for value in found.values()):
            return found
        raise FfnkitError(f"--device-map {given}", "it holds no map", "Give names of modules and their devices")
    import torch

    try:
        torch.empty(0, device=given)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        do = f"Choose {', '.join(WORDS)}, a device, or a JSON file"
        raise FfnkitError(f"--device-map {given}", str(error).splitlines()[0].rstrip("."), do) from error
    return given


@contextmanager
def mapped(given: str | None, *, runs_only: bool = False, beside: str = "auto") -> Iterator[None]:
    """While the block runs, models that are opened are placed so; None: as ever.

    Args:
        runs_only: whether the model only runs. Else every weight has to be in memory.
        beside: the --device that was given.

    Raises:
        FfnkitError: the map cannot be, or a device was given as well.
    """
    if given is None:
        yield
        return
    if beside != "auto":
        raise FfnkitError(f"--device-map {given}", f"--device {beside} is given too", "Give one of the two")
    found = read_map(given)
    if isinstance(found, dict) and not runs_only:
        _check([part for part, place in found.items() if place == "disk"], given)
    _maps.append((found, runs_only))
    try:
        yield
    finally:
        _maps.pop()


def asked() -> dict[str, Any]:
    """What ``from_pretrained`` is told meanwhile."""
    return {"device_map": _maps[-1][0]} if _maps else {}


def check_placed(model: Any, name: str) -> None:
    """Raises FfnkitError where weights that are to be changed are not in memory."""
    if not _maps or _maps[-1][1]:
        return
    away = [part for part, place in (getattr(model, "hf_device_map", None) or {}).items() if place == "disk"]
    _check(away, f"of {name}")


def _check(away: list[str], which: str) -> None:
    if away:
        what = f"{len(away)} of its parts ({away[0] or 'all'}) would stay on the disk, where no weight can be changed"
        do = "Compress from the files (ffnkit compress --stream), or train in shards (accelerate launch --use_fsdp)"
        raise FfnkitError(f"--device-map {which}", what, do)


def moved(model: Any, device: Any) -> Any:
    """The model on a device, or where a map has put it."""
    return model if getattr(model, "hf_device_map", None) else model.to(device)
