"""Units side by side on this machine, each in a process of its own: memory is watched, what was killed is taken up."""

from __future__ import annotations

import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from ffnkit.io.memory import free_memory
from ffnkit.recipe.board import Board
from ffnkit.recipe.shares import SPARE, Shares, resident
from ffnkit.recipe.state import Unit
from ffnkit.recipe.worker import Child

KILLS = 2  # how often a unit whose process was killed is taken up again
POLL = 0.1  # seconds


def run_units(
    out: Path,
    units: Sequence[Unit],
    shares: Shares,
    board: Board,
    over: Callable[[Unit, bool], None],
    ready: Callable[[Unit], bool] = lambda unit: True,
) -> None:
    """Run units of the recipe stored in ``out``, ``shares.jobs`` at a time.

    A unit whose process is killed by signal 9 goes on in another one, ``KILLS`` times. Another unit starts where as
    much memory is free as any has taken so far; where little is left, the one that began last is put back, to go on
    later.

    Args:
        units: in the order in which they start. over: called with each, and whether it is done.
        ready: whether a unit may start; it is asked again as others end.
    """
    waiting, running = deque(units), dict[int, Child]()
    kills, slots, peak = Counter[str](), shares.jobs, 0

    def start(unit: Unit, slot: int) -> None:
        board.begins(unit.name)
        alone = shares.jobs == 1
        running[slot] = Child(
            out,
            unit,
            progress=board.shown,
            environment=shares.environment(slot),
            told=None if alone else board.teller(unit.name),
        )

    try:
        while waiting or running:
            for slot, child in list(running.items()):
                peak = max(peak, resident(child.pid))
                if (code := child.ended()) is None:
                    continue
                del running[slot]
                unit = child.unit
                if code == -signal.SIGKILL and kills[unit.name] < KILLS:
                    kills[unit.name] += 1
                    waiting.appendleft(unit)
                    board.put_back(unit.name, "its process was killed; it goes on in another one")
                    continue
                good = child.judge(code)
                board.ends(unit.name, good, unit.error)
                over(unit, good)
            free, total = free_memory()
            while waiting and len(running) < slots and (not running or free > peak + SPARE * total):
                chosen = next((unit for unit in waiting if ready(unit)), None)
                if chosen is None:
                    break
                waiting.remove(chosen)
                start(chosen, next(slot for slot in range(shares.jobs) if slot not in running))
                free -= peak
                if not peak:  # what the first one takes is seen before another starts
                    break
            if len(running) > 1 and free_memory()[0] < SPARE * total:
                last = list(running)[-1]
                child, slots = running.pop(last), len(running)
                child.stop()
                waiting.appendleft(child.unit)
                board.put_back(child.unit.name, f"memory is short: {slots} at a time from here on")
            time.sleep(POLL)
    finally:
        for child in running.values():
            child.stop()
