"""A search on a Ray cluster: actors that hold the original and the statistics, and take one task after the other.

Ray gives them their resources, starts an actor anew that was killed, and with it the task that it was at.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.recipe.cluster import connected, installed
from ffnkit.recipe.pool import KILLS
from ffnkit.search.state import POLL, Task

if TYPE_CHECKING:
    from ffnkit.recipe.shares import Shares
    from ffnkit.search.job import Run


def search_on(run: Run, shares: Shares) -> None:
    """Carry out a search, up to its results, in a folder that all nodes see under this name.

    Each actor has ``shares.threads`` CPUs (an equal share of the cluster's where that is None) and, where the cluster
    has GPUs, one of them. There are as many as the cluster has room for, up to the number of candidates. Latencies are
    measured at the end by one that is alone.

    Raises:
        FfnkitError: Ray is not installed, there is no cluster at that address, or no actor is left.
    """
    ours = not installed().is_initialized()
    ray = connected(shares.ray)
    try:
        with run.folder.begun(run.facts()):
            _Crew(ray, run, shares).work()
    finally:
        if ours:
            ray.shutdown()


class _Crew:
    """The actors of a search, and what each is at."""

    def __init__(self, ray: Any, run: Run, shares: Shares) -> None:
        self.ray, self.run = ray, run
        there = ray.cluster_resources()
        cpus, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
        most = run.settings.candidates
        threads = shares.threads or max(1, cpus // (min(most, gpus) if gpus else most))
        self.count = max(1, min(most, cpus // threads, *([gpus] if gpus else [])))
        self.make = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_restarts=KILLS, max_task_retries=KILLS)(
            Worker
        )
        self.given = (str(run.folder.out.absolute()), threads)
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Task | None]] = {}  # what is waited for: who does it, and what

    def work(self) -> None:
        """Everything from the original to the results."""
        first = self.make.remote(*self.given)
        self._ends(first.prepare.remote())
        self.idle = [first]
        for actor in (self.make.remote(*self.given) for _ in range(self.count - 1)):
            self.busy[actor.prepare.remote()] = (actor, None)  # ready as soon as the cluster has room for it
        while tasks := self.run.open():
            at_work = {task for _, task in self.busy.values()}
            for task in (task for task in tasks if task not in at_work):
                if not self.idle:
                    break
                actor = self.idle.pop()
                self.busy[actor.do.remote(task)] = (actor, task)
            if not self.busy:
                raise FfnkitError("--ray", "no process of the search is left on the cluster", "Run the command again")
            self._waited()
        last = self.idle.pop() if self.idle else self.make.remote(*self.given)
        for actor in [*self.idle, *(actor for actor, _ in self.busy.values())]:
            self.ray.kill(actor)
        self._ends(last.finish.remote())
        self.ray.kill(last)

    def _waited(self) -> None:
        """Wait for one of them; an actor that Ray gave up is not used again, and its task is free."""
        [reference], _ = self.ray.wait(list(self.busy), num_returns=1)
        actor, task = self.busy.pop(reference)
        try:
            self._ends(reference)
        except self.ray.exceptions.RayActorError as error:
            what = "an idle process" if task is None else f"candidate {task.number}"
            self.run.say(f"{what}: Ray gave it up ({type(error).__name__})")
            return
        self.idle.append(actor)

    def _ends(self, reference: Any) -> None:
        try:
            lines = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, FfnkitError) else error from None
        for line in lines:
            self.run.say(line)


class Worker:
    """Works on the search in a folder; each call gives the lines that it has to say.

    Args:
        threads: that torch may use.
    """

    def __init__(self, out: str, threads: int) -> None:
        import torch

        from ffnkit.recipe.worker import hush
        from ffnkit.search.job import run_of

        hush()
        torch.set_num_threads(threads)
        self.lines: list[str] = []
        self.run = run_of(Path(out), self.lines.append)

    def prepare(self) -> list[str]:
        """The original and its statistics, where they are not there."""
        self.run.prepare()
        return self._said()

    def do(self, task: Task) -> list[str]:
        """One task, unless it is done; where another process is at it, that one does it."""
        while not self.run.taken(task) and not self.run.folder.over(task):
            time.sleep(POLL)
        return self._said()

    def finish(self) -> list[str]:
        """The choice and all pages."""
        self.run.finish()
        return self._said()

    def _said(self) -> list[str]:
        lines = list(self.lines)
        self.lines.clear()
        return lines
