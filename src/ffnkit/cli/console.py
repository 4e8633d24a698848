"""What is printed, where: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitWarning

if TYPE_CHECKING:
    from rich.console import Console


EVERY = 5.0  # seconds between lines of progress


@dataclass
class State:
    """The global options of the running command."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False


state = State()


def write_error(text: str) -> None:
    """Write ``text`` on stderr as it is: no wrapping, no markup."""
    print(text, file=sys.stderr, flush=True)


def error(line: str) -> None:
    """The one line of an error."""
    write_error(f"ffnkit: error: {line}")


def warn(line: str) -> None:
    """One line that the user should see even with --quiet."""
    write_error(f"ffnkit: warning: {line}")


def show_warnings() -> None:
    """Show ffnkit's own warnings as one line each, once; what others warn of as before."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        warn(str(message)) if issubclass(category, FfnkitWarning) else others(message, category, *where, **more)

    warnings.showwarning = show
    warnings.filterwarnings("once", category=FfnkitWarning)


def say(line: str) -> None:
    """One line of progress on stderr; silent with --quiet."""
    if not state.quiet:
        write_error(line)


def out(text: str) -> None:
    """Write a result on stdout as it is."""
    print(text, flush=True)


def megabytes(count: int) -> str:
    """Bytes as MB, or kB or GB where that is more telling."""
    for size, word in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count / 1e3:.1f} kB"


def print_json(value: Any) -> None:
    """Write ``value`` as JSON on stdout; what JSON lacks (NaN, paths, tuples) is made plain first."""
    out(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """``value`` in JSON's types; NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return str(value)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """Print a table on stdout; columns whose index is in ``right`` are aligned to the right."""
    from rich import box
    from rich.table import Table

    if title:
        out(title)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        view.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(escape(str(cell)) for cell in row))
    stdout().print(view)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, moved by calls with (done, total, what); in a pipe a line every ``EVERY`` seconds.

    Both tell the time since the start and the time that is left. Nothing with --quiet.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not sys.stderr.isatty():
        yield _lines(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Console(file=sys.stderr)
    with Progress(*columns, TimeRemainingColumn(), console=shown, disable=state.quiet, transient=True) as bars:
        bar = bars.add_task(title, total=None)

        def step(done: int, total: int, what: str) -> None:
            bars.update(bar, completed=done, total=total, description=f"{title} {escape(what)}")

        yield step


def _lines(title: str) -> Callable[[int, int, str], None]:
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
        say(f"{title} {what}: {done} of {total} after {now - start:.0f} s, about {left:.0f} s left")

    return step


def stdout() -> Console:
    """A rich console on stdout. In a pipe, where no width is known, it is wide enough that no row is broken."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)


def escape(text: str) -> str:
    """``text`` with rich's markup made literal."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def quieten() -> None:
    """Set the libraries' own logs and progress bars by --quiet and --verbose. Imports transformers."""
    import datasets
    import transformers

    if state.verbose:
        transformers.logging.set_verbosity_info()
        return
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("once", category=FfnkitWarning)
    if state.quiet or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
