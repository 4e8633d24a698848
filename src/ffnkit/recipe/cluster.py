"""Units as tasks of a Ray cluster: its scheduler gives them their resources, and starts anew what was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.recipe.board import Board
from ffnkit.recipe.pool import KILLS, POLL
from ffnkit.recipe.process import ROOT
from ffnkit.recipe.shares import THREADS, Shares
from ffnkit.recipe.state import Unit, unit_of
from ffnkit.recipe.worker import Child, record


def run_units(
    out: Path,
    units: Sequence[Unit],
    shares: Shares,
    board: Board,
    over: Callable[[Unit, bool], None],
    first: Callable[[Unit], Unit | None] = lambda unit: None,
) -> None:
    """Run units of the recipe stored in ``out``, a folder that all nodes see under this name.

    Each is a task with ``shares.threads`` CPUs (an equal share of the cluster's where that is None) and, where the
    cluster has GPUs, one of them. It goes on from what is on disk where Ray starts it anew.

    Args:
        over: called with each that has ended, and whether it is done.
        first: another of the units that a unit waits for.

    Raises:
        FfnkitError: Ray is not installed, or there is no cluster at that address.
    """
    ours = not installed().is_initialized()
    ray = connected(shares.ray)
    there = ray.cluster_resources()
    cpus = shares.threads or max(1, int(there.get("CPU", 1)) // max(len(units), 1))
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=1 if there.get("GPU") else 0,
        max_retries=KILLS,
        retry_exceptions=[ChildProcessError],
    )(_run)
    references: dict[str, Any] = {}
    try:
        for unit in units:
            before = first(unit)
            after = references.get(before.name) if before is not None else None
            references[unit.name] = task.options(name=unit.name).remote(
                str(out.absolute()), unit.arm, unit.seed, cpus, board.shown, after
            )
            board.begins(unit.name)
        named = {reference: unit for unit, reference in zip(units, references.values(), strict=True)}
        waiting = list(named)
        while waiting:
            (ended, *_), waiting = ray.wait(waiting, num_returns=1)
            unit = named[ended]
            try:
                good = bool(ray.get(ended))
            except ray.exceptions.RayError as error:
                good = False
                record(unit, f"Ray gave it up: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            board.ends(unit.name, good, unit.error)
            over(unit, good)
    except BaseException:
        for reference in references.values():
            ray.cancel(reference, force=True)
        raise
    finally:
        if ours:
            ray.shutdown()


def connected(address: str | None) -> Any:
    """Ray, connected to the cluster at the address; "auto": the one that RAY_ADDRESS or ``ray start`` names, else one
    of this machine alone. Raises FfnkitError where there is none."""
    ray = installed()
    paths = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    kept = {name: os.environ[name] for name in ("FFNKIT_DATA", "FFNKIT_MODELS", "HF_HOME") if name in os.environ}
    how = {"runtime_env": {"env_vars": {"PYTHONPATH": paths, **kept}}, "logging_level": "error"}
    if ray.is_initialized():  # by whoever calls us
        return ray
    try:
        ray.init(address=None if address == "auto" else address, **how)
    except Exception as error:  # also a plain one: a node that does not start in time, on a busy machine
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise FfnkitError(f"--ray {address}", found, "Give the address of a running cluster, or leave it out") from None
    return ray


def installed() -> Any:
    """The module. Raises FfnkitError where it is not there."""
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        do = "pip install 'ffnkit[ray]', or run units side by side by --jobs"
        raise FfnkitError("--ray", "Ray is not installed", do) from None
    return ray


def _run(out: str, arm: str, seed: int, threads: int, shown: bool, after: Any) -> bool:
    """A unit, in a process of its own beside Ray's: its memory is its own, and Ray's libraries are not in it.

    Args:
        after: what another unit came to, which is waited for.
    """
    folder = Path(out)
    if not (folder / "run.json").is_file():
        raise FfnkitError(f"running {arm}, seed {seed}", f"this node does not see {out}", "Use a shared folder")
    child = Child(
        folder,
        unit_of(folder, arm, seed),
        progress=shown,
        environment=dict.fromkeys(THREADS, str(threads)),
        told=lambda line: print(line.strip(), flush=True),  # Ray shows it with the task's name
    )
    try:
        while (code := child.ended()) is None:
            time.sleep(POLL)
    except BaseException:
        child.stop()
        raise
    if code == -signal.SIGKILL:
        raise ChildProcessError(f"the process of {arm}, seed {seed}, was killed")
    return child.judge(code)
