"""What is printed, where: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitWarning
from ffnkit.io.processes import count, is_first, number
from ffnkit.io.progress import Step, clear, shown

if TYPE_CHECKING:
    from rich.console import Console


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
    write_error(f"ffnkit: error: {_where()}{line}")


def _where() -> str:
    return "" if is_first() else f"process {number()} of {count()}: "


def warn(line: str) -> None:
    """One line that the user should see even with --quiet."""
    if is_first():
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
    if not state.quiet and is_first():
        write_error(line)


def out(text: str) -> None:
    """Write a result on stdout as it is."""
    clear()
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
    view, screen, lines = Table(box=box.SIMPLE_HEAD, pad_edge=False), stdout(), [[*map(str, row)] for row in rows]
    words = [max(map(len, " ".join(column).split()), default=0) for column in zip(columns, *lines, strict=True)]
    whole = sum(words) + 3 * len(words) + 2 <= screen.width  # then no word has to be broken
    for index, column in enumerate(columns):
        justify: Any = "right" if index in right else "left"
        view.add_column(column, justify=justify, overflow="fold", min_width=words[index] if whole else None)
    for line in lines:
        view.add_row(*map(escape, line))
    screen.print(view)


def progress(title: str) -> AbstractContextManager[Step]:
    """A bar or lines on stderr (:func:`ffnkit.io.progress.shown`); nothing with --quiet."""
    return shown(title, quiet=state.quiet)


def stdout() -> Console:
    """A rich console on stdout. In a pipe, where no width is known, it is wide enough that no row is broken."""
    from rich.console import Console

    clear()
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)


def escape(text: str) -> str:
    """``text`` with rich's markup made literal."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def quieten() -> None:
    """Set the libraries' own logs by --verbose; their bars are off, for ours are shown. Imports transformers."""
    import datasets
    import transformers

    from ffnkit.recipe.worker import hush

    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if state.verbose:
        transformers.logging.set_verbosity_info()
        return
    hush()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("once", category=FfnkitWarning)
