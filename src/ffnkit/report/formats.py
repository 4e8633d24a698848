"""A summary as Markdown, as CSV and as a rich table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffnkit.io.markdown import inline, one_line
from ffnkit.report.columns import all_notes, blocks, cells, chosen
from ffnkit.report.table import VALUES, Arm, Stat, Summary

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def to_markdown(summary: Summary) -> str:
    """A Markdown table, followed by the notes as a list."""
    return f"{markdown_table(*cells(summary))}\n{markdown_notes(all_notes(summary))}"


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
    """Two rich tables, scores and costs, that fit a terminal of 100 columns, and the notes under them."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [Text(title, style="bold")] if title else []
    parts += [_rich_table(summary, header, lines) for header, lines in blocks(summary)]
    return Group(*parts, *(Padding(Text(f"• {note}"), (0, 0, 0, 1)) for note in all_notes(summary)))


def _rich_table(summary: Summary, header: list[str], lines: list[list[str]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(escape(name), justify="left" if index == 0 else "right", overflow="fold")
    for arm, line in zip(summary.arms, lines, strict=True):
        table.add_row(*(escape(cell) for cell in line), style=None if arm.run else "dim")
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
