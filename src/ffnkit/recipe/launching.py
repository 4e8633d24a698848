"""Stages that train, in several processes of their own: accelerate's launcher starts them, the unit waits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json
from ffnkit.io.progress import aside
from ffnkit.recipe.parts import Launch
from ffnkit.recipe.process import Apart
from ffnkit.recipe.shares import Shares, cores
from ffnkit.recipe.state import Unit

STAGES = ("tune", "recover")
FAILED = "launched-failed.json"


def check(launch: Launch | None, shares: Shares, device: str) -> None:
    """Raises FfnkitError where the processes of each training find no room beside what else a run shares out.

    Args:
        device: "auto" or "cpu", of the training.
    """
    if launch is None:
        return
    asked = f"launch: processes {launch.processes}"
    if shares.jobs > 1 or shares.ray is not None:
        what = "units run side by side, with one GPU each"
        raise FfnkitError(asked, what, "Leave launch, or --jobs and --ray, out")
    if device == "auto" and 0 < len(shares.gpus) < launch.processes:
        do = f"Write {len(shares.gpus)}, or device: cpu under tune"
        raise FfnkitError(asked, f"this machine has {len(shares.gpus)} GPUs", do)


def command(launch: Launch) -> list[str]:
    """The launcher's own words, what it is to run left out."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores())
    words = {
        "num_processes": launch.processes,
        "num_machines": 1,
        "main_process_port": 0,  # any that is free
        "mixed_precision": "no",  # the training says it
        "dynamo_backend": "no",
        "num_cpu_threads_per_process": max(1, threads // launch.processes),
    }
    kind = ["--multi_gpu"] if launch.strategy == "ddp" else ["--use_fsdp", "--fsdp_version", "2"]
    return [*kind, *(part for name, value in words.items() for part in (f"--{name}", str(value)))]


def run(launch: Launch, out: Path, unit: Unit, stage: str, *, progress: bool) -> dict[str, Any]:
    """The figures of a stage of a unit, trained in several processes; what it leaves lies in the unit's folder.

    Args:
        out: the folder of the run, which holds the recipe.

    Raises:
        FfnkitError: one of the processes failed.
    """
    left = figures(unit, stage)
    for path in (left, unit.work / FAILED):
        path.unlink(missing_ok=True)
    words = ["-m", "ffnkit.recipe.launched", str(out), unit.arm, str(unit.seed), stage, *["--progress"] * progress]
    process = Apart("accelerate.commands.launch", [*command(launch), *words], {})
    with aside():
        try:
            code = process.wait()
        finally:
            process.stop()
    found = read_json(left)
    if code or found is None:
        why = (read_json(unit.work / FAILED) or {}).get("error", f"the launcher ended with code {code}")
        raise FfnkitError(f"{stage} in {launch.processes} processes", why, "Run it again: it goes on where it was")
    return found


def figures(unit: Unit, stage: str) -> Path:
    """Where the first process leaves the figures of a stage."""
    return unit.work / f"launched-{stage}.json"
