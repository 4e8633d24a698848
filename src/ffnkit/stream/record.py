"""The plan of one FFN after the other, each in a file, so that what was planned is not planned again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffnkit import __version__
from ffnkit.calibration.stored import tokens_of
from ffnkit.errors import FfnkitError
from ffnkit.io.sizes import checkpoint_files
from ffnkit.io.snapshots import folder_of
from ffnkit.methods.common import Narrowing
from ffnkit.model.finding import ffns
from ffnkit.plans import Plan, plan

COPIES = 6  # of a block's hidden states: two passes, of each the last block's, this one's, and one on its way


def parts_of(out: str | Path) -> Path:
    """The folder beside an output in which plans wait for it."""
    out = Path(out).absolute()
    return out.parent / f".{out.name}.plans"


def ready(source: str, method: Any, out: str | Path, data: list[str]) -> Path:
    """The folder of the parts of a plan of this source, method, settings and data; what lies there of others goes.

    Args:
        data: fingerprints.
    """
    place = parts_of(out) / _key(source, method, data)
    if not place.is_dir():
        shutil.rmtree(place.parent, ignore_errors=True)
        place.mkdir(parents=True)
    return place


@contextmanager
def leaving_what_was_planned(place: Path) -> Iterator[Path]:
    """:func:`ready`'s folder while a plan is made; where it fails before anything lies in it, it goes."""
    try:
        yield place
    except BaseException:
        if not any(path.is_file() for path in place.rglob("*")):
            shutil.rmtree(place.parent, ignore_errors=True)
        raise


def planned(
    model: Any, method: Any, source: str, out: str | Path, told: Callable[[int], None] | None = None
) -> tuple[Plan, Path]:
    """The plan of a method that decides of each FFN alone (``by_ffn``), FFN by FFN; what lies in files is read.

    The files are of this source, this method and its settings, or go. Whoever has written the output removes them.

    Args:
        told: called with the number of FFNs that were planned before.

    Returns:
        The plan, and the folder of its parts.
    """
    chosen = method.chosen(model)
    place = ready(source, method, out, [])
    files = [place / f"{number}.safetensors" for number in range(len(chosen))]
    if told is not None and (done := sum(file.is_file() for file in files)):
        told(done)
    parts = []
    with leaving_what_was_planned(place):
        for file, (ffn, width) in zip(files, chosen, strict=True):
            if not file.is_file():
                plan(model, dataclasses.replace(method, width={ffn.name: width})).save(file)
            parts.append(Plan.load(file))
    return _joined(parts, model, method), place.parent


def is_by_ffn(method: Any) -> bool:
    """Whether a method decides of each FFN alone, from its weights."""
    return bool(getattr(method, "by_ffn", False)) and not getattr(method, "needs_data", False)


def uses_blocks(method: Any) -> bool:
    """Whether a method fits block by block, and so leaves what a block gave."""
    return isinstance(method, Narrowing) and bool(getattr(method, "needs_data", False))


def room_for(model: Any, batches: list[Any], out: str | Path) -> str:
    """In words, how much of the output's disk the hidden states of a block take, to go on behind it.

    Raises:
        FfnkitError: there is not so much room.
    """
    found = ffns(model)
    each = max(ffn.d * ffn.raw().down.element_size() for ffn in found)
    need = COPIES * sum(map(tokens_of, batches)) * each
    around = Path(out).absolute().parent
    while not around.is_dir():
        around = around.parent
    free = shutil.disk_usage(around).free
    if need > free:
        what = f"hidden states of the data take up to {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on its disk"
        raise FfnkitError(f"writing '{out}'", what, "Free some space, give fewer tokens, or name another disk")
    return f"hidden states of the data take up to {need / 1e9:.1f} GB of disk while it runs"


def _joined(parts: list[Plan], model: Any, method: Any) -> Plan:
    order = {name: number for number, name in enumerate(ffn.name for ffn in ffns(model))}
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    return Plan(
        method=method.name,
        settings=method.settings(),
        model=type(model).__name__,
        edits=tuple(edit for part in parts for edit in part.edits),
        shapes=dict(sorted(shapes.items(), key=lambda item: order[item[0]])),
        parameters=sum(p.numel() for p in model.parameters()),
        quantities={name: row for part in parts for name, row in part.quantities.items()},
        weights={place: row for part in parts for place, row in part.weights.items()},
    )


def _key(source: str, method: Any, data: list[str]) -> str:
    folder = Path(source).expanduser()
    there = folder if folder.is_dir() else folder_of(source)  # of a hub name the snapshot: it may be another one today
    files = [path.resolve() for path in checkpoint_files(there)] if there is not None else []
    stats = [(os.fspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    about = [__version__, os.fspath(folder.absolute()), stats, method.name, method.settings(), data]
    told = json.dumps(about, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
