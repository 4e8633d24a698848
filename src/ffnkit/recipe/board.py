"""The one display of a run's progress: a bar in a terminal, with what each unit is at; lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Board:
    """Tells of units as they begin, go on and end, from any thread.

    Args:
        total: units of the run. side_by_side: whether several run at once, so that a line has to say of which it is.
    """

    def __init__(self, total: int, *, shown: bool, side_by_side: bool) -> None:
        self.total, self.shown, self.side_by_side = total, shown, side_by_side
        self.terminal = shown and sys.stderr.isatty()
        self.number, self.start = 0, time.perf_counter()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._console: Any = None

    def __enter__(self) -> Board:
        if not self.shown:
            return self
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        if self.terminal and self.side_by_side:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._tasks[""] = self._bars.add_task("units", total=self.total)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._console is not None:
            (self._console if self._bars is None else self._bars.console).print(line, markup=False, soft_wrap=True)

    def before(self, name: str) -> None:
        """An earlier run did it."""
        self._count(name, "done before")

    def begins(self, name: str) -> None:
        """It starts, or is taken up."""
        if self._bars is not None:
            self._tasks[name] = self._bars.add_task(name, total=None)
        if self.side_by_side:
            self.say(f"{name}: begins ({self.clock} so far)")
        else:
            self._count(name, f"{self.clock} so far")

    def teller(self, name: str) -> Callable[[str], None]:
        """Takes the lines of a unit's own progress."""

        def told(line: str) -> None:
            line = line.strip().removeprefix(f"{name} > ")  # as the unit's own progress begins
            if self._bars is not None and (line.endswith("...") or " after " in line):
                self._bars.update(self._tasks[name], description=f"{name}: {line.strip(' .')}")
            else:
                self.say(f"{name}: {line}")

        return told

    def put_back(self, name: str, why: str) -> None:
        """It has not ended, and waits for its turn."""
        self._drop(name)
        if not self.side_by_side:
            self.number -= 1  # it is counted when it begins
        self.say(f"{name}: {why}")

    def ends(self, name: str, good: bool, error: str) -> None:
        """It is done, or failed."""
        self._drop(name)
        if self.side_by_side:
            self._count(name, "done" if good else f"failed: {error}")
        elif not good:
            self.say(f"  failed: {error}")

    @property
    def clock(self) -> str:
        """Minutes and seconds since the start."""
        seconds = int(time.perf_counter() - self.start)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _count(self, name: str, what: str) -> None:
        self.number += 1
        self.say(f"[{self.number}/{self.total}] {name}: {what}")
        if self._bars is not None:
            self._bars.advance(self._tasks[""])

    def _drop(self, name: str) -> None:
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
