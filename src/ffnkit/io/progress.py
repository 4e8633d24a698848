"""Where long work is, on stderr: bars in a terminal, lines in a log. Light to import.

A command is :func:`shown`. What it does, however far below, says where it is by :func:`phase` and :func:`counted`, and
needs nothing handed down. Where nothing is shown (ffnkit used as a library) these cost a look at a variable.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from ffnkit.io.processes import is_first

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY = 5.0  # seconds between lines; 0: one for every step
SOON = 1.0  # seconds of work before a bar is drawn

T = TypeVar("T")
Step = Callable[[int, int, str], None]


@contextmanager
def shown(title: str, *, quiet: bool = False) -> Iterator[Step]:
    """Show this work, moved by calls with (done, total, what), and the phases below it, until it is over.

    A bar for each phase in a terminal; elsewhere a line every ``EVERY`` seconds, whether or not a step was done
    meanwhile. Both tell the time since the start and, once it can be told, the time that is left. Inside of other work
    that is shown it is a phase of that. Bars of other libraries are off meanwhile.

    Args:
        quiet: show nothing of it, nor of what is below it; so it is in all processes of one training but the first.
    """
    outer, quiet = _current.get(), quiet or not is_first()
    with ExitStack() as stack:
        if quiet or outer is None:
            display = _Display() if quiet else _Bars() if sys.stderr.isatty() else _Lines()
            stack.enter_context(only_ours())
            stack.enter_context(display.running())
            token = _current.set(display)
            stack.callback(_current.reset, token)
        yield stack.enter_context(phase(title))


def is_shown() -> bool:
    """Whether this work is part of what is shown, or kept quiet, further up: who calls us decided."""
    return _current.get() is not None


def _nothing(done: int, total: int, what: str) -> None:
    """A step that nobody is shown."""


@contextmanager
def phase(title: str) -> Iterator[Step]:
    """A part of the work that is shown, moved by calls with (done, total, what); nothing where none is.

    A call with 0 done says that the first step begins only now.
    """
    if (display := _current.get()) is None:
        yield _nothing
        return
    part = display.push(title)
    try:
        yield partial(display.step, part)
    finally:
        display.pop(part)


def counted(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items one after the other, each counted once the work on it is done.

    Args:
        total: how many there are, where they do not tell it themselves.
    """
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with phase(title) as step:
        for number, item in enumerate(items, 1):
            yield item
            step(number, total, "")


def clear() -> None:
    """Take a bar off the screen, for what is printed next; it comes back with the next second of work."""
    if (display := _current.get()) is not None:
        display.clear()


@contextmanager
def aside() -> Iterator[None]:
    """What is around is not shown meanwhile: what is inside, or another process, shows itself."""
    display = _current.get() or _Display()
    display.clear()
    display.held += 1
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)
        display.held -= 1


@contextmanager
def only_ours() -> Iterator[None]:
    """Bars of transformers, datasets, the hub and whatever else uses tqdm are off meanwhile."""
    with ExitStack() as stack:
        for module, asked, off, on in _SWITCHES:
            if (library := sys.modules.get(module)) is not None and asked(library):
                getattr(library, off)()
                stack.callback(getattr(library, on))
        if "tqdm" not in sys.modules and "TQDM_DISABLE" not in os.environ:  # read when it is imported
            os.environ["TQDM_DISABLE"] = "1"
            stack.callback(os.environ.pop, "TQDM_DISABLE", None)
        yield


def _transformers_bars(library: Any) -> bool:
    return bool(library.is_progress_bar_enabled())


def _bars(library: Any) -> bool:
    return not library.are_progress_bars_disabled()


_SWITCHES: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("transformers.utils.logging", _transformers_bars, "disable_progress_bar", "enable_progress_bar"),
    ("datasets.utils.tqdm", _bars, "disable_progress_bars", "enable_progress_bars"),
    ("huggingface_hub.utils.tqdm", _bars, "disable_progress_bars", "enable_progress_bars"),
)  # module, whether bars are on, and what turns them off and on


class _Part:
    """A phase, and how far it is."""

    def __init__(self, title: str) -> None:
        self.title, self.what, self.done, self.total = title, "", 0, 0
        self.start = self.since = self.last = time.monotonic()
        self.base = 0  # what was done then: work that goes on does not begin with nothing
        self.bar: Any = None

    def move(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if not done:  # the first begins: what came before says nothing of what one takes
            self.since, self.base = now, 0
        elif done < self.done:  # steps of another kind, on which the earlier ones have no bearing
            self.since, self.base = self.last, 0
        elif not self.done and done > 1:
            self.since, self.base = now, done
        self.done, self.total, self.what, self.last = done, total, what, now

    @property
    def name(self) -> str:
        return f"{self.title} {self.what}".rstrip()

    @property
    def count(self) -> str:
        return "" if not self.done else f"{self.done} of {self.total}" if self.total else str(self.done)

    def left(self) -> float | None:
        """Seconds that it will take yet, counted from the last step; None where that cannot be told."""
        if self.done == self.base or self.total <= self.done:  # once all are done, what goes on is something else
            return None
        return (self.last - self.since) * (self.total - self.done) / (self.done - self.base)


class _Display:
    """The phases that are being worked on, from the outermost one to the innermost. This one shows nothing."""

    every = 0.0

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.held = 0
        self.lock = RLock()
        self.start = self.last = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Looks at the clock in a thread of its own, so that one long step is seen as well."""
        over = Event()

        def beat() -> None:
            while not over.wait(self.every):
                self.tick()

        thread = Thread(target=beat, daemon=True, name="ffnkit progress") if self.every > 0 else None
        if thread is not None:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread is not None:
                thread.join(timeout=1.0)
            self.clear()

    def push(self, title: str) -> _Part:
        with self.lock:
            self.parts.append(part := _Part(title))
            self.tick()
            return part

    def pop(self, part: _Part) -> None:
        with self.lock:
            self.parts.remove(part)

    def step(self, part: _Part, done: int, total: int, what: str) -> None:
        with self.lock:
            part.move(done, total, what)
            self.tick()

    def tick(self) -> None:
        """Show what there is, if it is time to."""

    def clear(self) -> None:
        """Nothing of it stands on the screen afterwards."""


class _Lines(_Display):
    """Lines of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.every = EVERY

    def tick(self) -> None:
        with self.lock:
            now = time.monotonic()
            if self.held or not self.parts or now - self.last < self.every:
                return
            self.last = now
            with suppress(OSError, ValueError):  # nobody reads
                print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        words = [f"{part.name}: {part.count}" if part.count else part.name for part in self.parts]
        lefts = [left for part in self.parts if (left := part.left()) is not None]
        expected = f", about {_clock(lefts[0])} left" if lefts else ""
        return f"{' > '.join(words)} after {_clock(now - self.start)}{expected}"


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


class _Bars(_Display):
    """Bars in a terminal, one a phase; gone when the work is over."""

    every = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.bars: Progress | None = None

    def pop(self, part: _Part) -> None:
        with self.lock:
            super().pop(part)
            if self.bars is not None and part.bar is not None:
                self.bars.remove_task(part.bar)

    def tick(self) -> None:
        with self.lock:
            if self.held or not self.parts or (self.bars is None and time.monotonic() - self.last < SOON):
                return
            if self.bars is None:
                self.bars = _progress()
                self.bars.start()
            for part in self.parts:
                if part.bar is None:
                    part.bar = self._added(part)
                self.bars.update(part.bar, description=_literal(part.name), counted=part.count)
                self.bars.update(part.bar, completed=part.done, total=part.total or None)

    def _added(self, part: _Part) -> TaskID:
        assert self.bars is not None
        made = self.bars.add_task(_literal(part.name), total=None, counted="")
        self.bars.tasks[-1].start_time = part.start  # not when it came on the screen
        return made

    def clear(self) -> None:
        with self.lock:
            self.last = time.monotonic()
            if self.bars is not None:
                self.bars.stop()
                self.bars = None
                for part in self.parts:
                    part.bar = None


def _literal(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    name = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    counts = (TextColumn("{task.fields[counted]}"), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    how: dict[str, Any] = {"transient": True, "redirect_stdout": False, "expand": True, "refresh_per_second": 4}
    return Progress(name, BarColumn(bar_width=24), *counts, console=console, **how)


_current: ContextVar[_Display | None] = ContextVar("ffnkit_progress", default=None)
