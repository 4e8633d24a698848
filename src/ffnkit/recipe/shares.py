"""What the units of a run share: how many run at once, and which threads, GPUs and memory each of them has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ffnkit.errors import FfnkitError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
SPARE = 0.05  # of the memory: less of it free, and a unit is put back


@dataclass(frozen=True)
class Shares:
    """How a run uses what there is.

    Attributes:
        jobs: units at once on this machine.
        threads: of each; None: all of this machine's cores where one runs at a time, else its share of them.
        ray: the address of a Ray cluster that runs the units, "auto" for the one that is at hand; None: none does.
    """

    jobs: int = 1
    threads: int | None = None
    ray: str | None = None
    gpus: tuple[str, ...] = field(default_factory=lambda: visible_gpus())

    def __post_init__(self) -> None:
        for name, value in (("jobs", self.jobs), ("threads", self.threads)):
            if value is not None and value < 1:
                raise FfnkitError(f"{name} {value}", "it is less than 1", "Give a whole number from 1 on")
        if self.ray is not None and self.jobs > 1:
            raise FfnkitError(f"jobs {self.jobs}", "Ray decides how many units run at once", "Leave one of the two out")

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of the process in one of the slots from 0 on: its threads, and one GPU where several run."""
        threads = self.threads or (max(1, cores() // self.jobs) if self.jobs > 1 else None)
        found = dict.fromkeys(THREADS, str(threads)) if threads is not None else {}
        if self.jobs > 1 and self.gpus:
            found["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return found

    @contextmanager
    def here(self) -> Iterator[None]:
        """This process takes the threads of one of them in the block, where several are at work or ``threads`` says."""
        found = self.environment(0).get(THREADS[0])
        if found is None:
            yield
            return
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(int(found))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(each.strip() for each in given.split(",") if each.strip() not in ("", "-1"))
    if not Path("/proc/driver/nvidia/gpus").is_dir() and os.name == "posix":
        return ()  # torch need not be asked
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where it is gone."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
