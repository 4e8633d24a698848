"""Checkpoints on disk: which are whole, whose they are, and their removal."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.io import processes
from ffnkit.io.files import read_json, space_errors, write_text
from ffnkit.io.folders import check_target
from ffnkit.io.workspace import made

FINGERPRINT = "run.json"
PLAN = "tuner-plan.safetensors"  # what a method chose before training
STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PROCESSES = "processes"  # in what is stored of a run: how many trained together
_ARCHIVES = ("optimizer.pt", "scheduler.pt")
_SHARDED = "optimizer.bin"  # the optimizer of processes that each hold a part of the model


@contextmanager
def claimed(out_dir: str | Path, run: dict[str, Any]) -> Iterator[None]:
    """``out_dir`` as the folder of this run; where the block fails before any checkpoint, nothing is left of it.

    Of several processes the first one sees to the folder.

    Args:
        run: what decides the outcome, as JSON data; "weights" is compared up to rounding.

    Raises:
        FfnkitError: the folder is a file, holds checkpoints of a run that differs, or cannot be written.
    """
    folder = check_target(out_dir, "training")
    with space_errors(folder), made(folder):
        if processes.is_first():
            _claim(folder, run)
            remove_broken(folder)
        processes.wait()
        try:
            yield
        except BaseException:
            if processes.is_first() and not checkpoints(folder):
                for name in (FINGERPRINT, PLAN):
                    (folder / name).unlink(missing_ok=True)
            raise


def _claim(folder: Path, run: dict[str, Any]) -> None:
    path = folder / FINGERPRINT
    found = read_json(path)
    if found is None:
        if checkpoints(folder):
            what = f"checkpoints without a readable {FINGERPRINT}"
            raise FfnkitError(f"training in '{folder}'", f"it holds {what}", "Name another folder or remove them")
        write_text(path, json.dumps(run, indent=1))
        return
    differing = _differing(run, found)
    if not differing:
        return
    if checkpoints(folder):
        asked = f"resuming training in '{folder}'"
        do = "Name another folder, or remove this one to start anew"
        raise FfnkitError(asked, f"its checkpoints are of a run that differs in {', '.join(differing)}", do)
    write_text(path, json.dumps(run, indent=1))


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders in ``folder``, oldest first, whole or not."""
    found = [(int(m[1]), p) for p in Path(folder).glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest(folder: str | Path) -> Path | None:
    """The last whole checkpoint, or None."""
    return next((path for path in reversed(checkpoints(folder)) if is_whole(path)), None)


def is_whole(path: Path) -> bool:
    """Whether nothing of a checkpoint is missing or cut short; its state file is what is written last."""
    from safetensors import SafetensorError, safe_open

    if read_json(path / STATE) is None:
        return False
    if not all(zipfile.is_zipfile(path / name) for name in _archives(path)):
        return False
    weights = sorted(path.glob("*.safetensors"))
    try:
        for file in weights:
            with safe_open(file, framework="numpy"):
                pass
    except (SafetensorError, OSError):
        return False
    return bool(weights)


def _archives(path: Path) -> list[str]:
    """The archives of a whole checkpoint: each of several processes has its own generators' state."""
    several = int((read_json(path.parent / FINGERPRINT) or {}).get(PROCESSES, 1))
    states = [f"rng_state_{number}.pth" for number in range(several)] if several > 1 else ["rng_state.pth"]
    first, *others = _ARCHIVES
    return [_SHARDED if (path / _SHARDED).exists() else first, *others, *states]


def remove_broken(folder: str | Path) -> None:
    """Remove checkpoints that a kill left half written, so that they are neither counted nor opened."""
    for path in checkpoints(folder):
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def clean(folder: str | Path) -> None:
    """Remove all checkpoints of a finished run; everything else in the folder stays."""
    for path in checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)
    (Path(folder) / FINGERPRINT).unlink(missing_ok=True)


def state_of(path: Path) -> dict[str, Any]:
    """The Trainer state of a checkpoint."""
    state = read_json(path / STATE)
    assert state is not None, f"{path} is not whole"
    return state


def weights_sample(model: nn.Module) -> list[float]:
    """Three values of each parameter: enough to tell models of one shape apart, few enough for a text file."""
    sample: list[float] = []
    for parameter in model.parameters():
        inner = type(parameter.data).__module__.startswith("torchao.")  # tensors that give no single numbers
        flat = (parameter.dequantize() if inner else parameter).detach().flatten()
        sample += [float(flat[i]) for i in (0, flat.numel() // 3, flat.numel() - 1)] if flat.numel() else []
    return sample


def _differing(run: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Dotted names of what differs; settings are compared one by one."""
    names = []
    for key in [*run, *(key for key in found if key not in run)]:
        ours, theirs = run.get(key), found.get(key)
        if key == "weights":
            if not _close(ours, theirs):
                names.append("the initial weights (seed the head before loading the model)")
        elif isinstance(ours, dict) and isinstance(theirs, dict):
            names += [f"{key}.{name}" for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        elif ours != theirs:
            names.append(key)
    return names


def _close(ours: Any, theirs: Any) -> bool:
    first, second = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return first.shape == second.shape and np.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)
