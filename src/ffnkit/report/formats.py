"""A summary as Markdown, as CSV and as a rich table."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffnkit.io.markdown import inline, one_line
from ffnkit.report.columns import all_notes, blocks, cells, chosen
from ffnkit.report.conclusions import conclusions
from ffnkit.report.table import VALUES, Arm, Stat, Summary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

GAP = 3  # characters between columns
LONG = 32  # characters of a cell from which it is text that may be broken between words


def to_markdown(summary: Summary) -> str:
    """What to conclude as a list, a Markdown table, and the notes as a list."""
    table, told = markdown_table(*cells(summary)), markdown_notes(conclusions(summary))
    return f"{told}\n{table}\n{markdown_notes(all_notes(summary))}"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is of words and the others of figures."""
    align = [":--", *["--:"] * (len(header) - 1)]
    shown = [[inline(cell) for cell in line] for line in (header, *lines)]
    return "".join(f"{_markdown_line(line)}\n" for line in (shown[0], align, *shown[1:]))


def markdown_notes(notes: Sequence[str]) -> str:
    """Notes as a list."""
    return "".join(f"- {one_line(note)}\n" for note in notes)


def _markdown_line(line: list[str]) -> str:
    return "| " + " | ".join(line) + " |"


def to_rich(summary: Summary, title: str | None = None) -> RenderableType:
    """What to conclude, rich tables that break no word, however narrow the terminal, and the notes."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    def listed(notes: Sequence[str]) -> list[RenderableType]:
        return [Padding(Text(f"• {note}"), (0, 0, 0, 1)) for note in notes]

    dim = {arm.name for arm in summary.arms if not arm.run}
    tables = [Fitted(header, lines, dim) for header, lines in blocks(summary)]
    heading = [Text(title, style="bold")] if title else []
    return Group(*heading, *listed(conclusions(summary)), Text(""), *tables, *listed(all_notes(summary)))


@dataclass(frozen=True)
class Fitted:
    """A table for a terminal: columns that do not fit beside the first one go into further tables below.

    Figures are not broken, heads between words. Names that would fill half of a line are numbered, and told above.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    dim: Collection[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        names = [line[0] for line in self.lines]
        if max(map(len, [self.header[0], *names]), default=0) > options.max_width // 2:
            for number, name in enumerate(names, 1):
                yield Text(f"{number}: {name}", overflow="fold")
            names = [str(number) for number in range(1, len(names) + 1)]
        first = max(map(len, [self.header[0], *names]))
        for places in self._groups(room := options.max_width - first):
            yield self._table(names, places, room)
            yield Text("")

    def _groups(self, room: int) -> Iterator[list[int]]:
        """The columns of each table, which are not wider than ``room``."""
        left, places = room, list[int]()
        for place in range(1, len(self.header)):
            wide = self._width(place, room) + GAP
            if places and wide > left:
                yield places
                left, places = room, []
            left, places = left - wide, [*places, place]
        yield places

    def _width(self, place: int, room: int) -> int:
        """Of the widest cell, or of its longest word where it is text or does not fit, and of words of the head."""
        cells = [line[place] for line in self.lines]
        whole = min(LONG, room - GAP)
        words = [word for cell in cells for word in (cell.split() if len(cell) > whole else [cell])]
        return max(map(len, [*self.header[place].split(), *words]))

    def _table(self, names: Sequence[str], places: Sequence[int], room: int) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column(escape(self.header[0]), overflow="fold", width=max(map(len, [self.header[0], *names])))
        for place in places:
            table.add_column(escape(self.header[place]), justify="right", width=self._width(place, room))
        for name, line in zip(names, self.lines, strict=True):
            cells = [escape(line[place]) for place in places]
            table.add_row(escape(name), *cells, style="dim" if line[0] in self.dim else None)
        return table


def to_csv(summary: Summary) -> str:
    """One line an arm in plain numbers: mean and std of everything; empty where there is none."""
    stages = dict.fromkeys(stage for arm in summary.arms for stage in arm.seconds)
    lines = [_csv_line(arm, summary.metrics, tuple(stages)) for arm in summary.arms]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(arm: Arm, metrics: tuple[str, ...], stages: tuple[str, ...]) -> dict[str, Any]:
    line: dict[str, Any] = {"arm": arm.name, "status": "run" if arm.run else "not run", "seeds": len(arm.seeds)}
    for name in metrics:
        line |= _mean_std(name, arm.metrics.get(name))
    line |= {**_mean_std(f"{metrics[0]}_before", arm.before), "layers": chosen(arm.layers) if arm.layers else None}
    delta = arm.difference
    line |= {
        "difference": delta.mean if delta else None,
        "difference_low": delta.low if delta else None,
        "difference_high": delta.high if delta else None,
        "difference_seeds": delta.n if delta else None,
    }
    for key in VALUES:
        line |= _mean_std(key, arm.values.get(key))
    line |= _mean_std("latency_ratio", arm.latency_ratio)
    for stage in stages:
        line |= _mean_std(f"seconds_{stage}", arm.seconds.get(stage))
    return line


def _mean_std(name: str, stat: Stat | None) -> dict[str, Any]:
    return {name: stat.mean if stat else None, f"{name}_std": stat.std if stat else None}
