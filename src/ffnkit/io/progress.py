"""Progress of long work on stderr: a bar in a terminal, lines in a pipe or a file. Light to import."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 5.0  # seconds between lines

Step = Callable[[int, int, str], None]


@contextmanager
def shown(title: str, *, quiet: bool = False) -> Iterator[Step]:
    """A bar on stderr, moved by calls with (done, total, what); in a pipe a line every ``EVERY`` seconds.

    Both tell the time since the start and the time that is left. Nothing where ``quiet``.
    """
    if quiet:
        yield lambda *_: None
        return
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), transient=True) as bars:
        bar = bars.add_task(title, total=None)

        def step(done: int, total: int, what: str) -> None:
            bars.update(bar, completed=done, total=total, description=f"{title} {escape(what)}")

        yield step


def _lines(title: str) -> Step:
    """Progress in lines of a log."""
    start = told = phase = last = time.monotonic()
    before = 0

    def step(done: int, total: int, what: str) -> None:
        nonlocal told, phase, last, before
        now = time.monotonic()
        if done < before:  # steps of another kind, on which the earlier ones have no bearing
            phase = last
        before, last = done, now
        if now - told < EVERY or not done:
            return
        told = now
        left = (now - phase) * (total - done) / done
        line = f"{title} {what}: {done} of {total} after {now - start:.0f} s, about {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    return step
