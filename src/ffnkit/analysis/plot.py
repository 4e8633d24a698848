"""One picture of an analysis: every figure of every row, and the errors layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit.io.files import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from ffnkit.analysis.result import Analysis, Row

# after Okabe and Ito: told apart by colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
MARKERS = "osD^vPX*"
STYLES = ("-", "--", ":")


def draw(analysis: Analysis, path: str | Path) -> None:
    """Write the picture: on the left a line a row with its figures, on the right FFN outputs and kernels by FFN."""
    from matplotlib.figure import Figure

    rows = list(analysis.rows)
    curves = [(title, found) for title, found in _curves(rows) if any(len(each) > 1 for each in found.values())]
    wide = 5.2 + 4.2 * len(curves)
    figure = Figure(figsize=(wide, max(3.4, 1.6 + 0.3 * len(rows))), layout="constrained")
    ratios = [5.2, *[4.2] * len(curves)]
    axes = figure.subplots(1, 1 + len(curves), squeeze=False, width_ratios=ratios)[0]
    _summary(axes[0], rows)
    for place, (title, found) in zip(axes[1:], curves, strict=True):
        _by_layer(place, title, found)
    if curves:
        handles, names = axes[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8)
    with disk_errors(path):
        figure.savefig(path, dpi=150)


def _summary(axes: Axes, rows: list[Row]) -> None:
    figures = [{k: v for k, v in row.figures().items() if k != "FFN parameters" and "cos " not in k} for row in rows]
    keys = list(dict.fromkeys(key for each in figures for key in each))
    for number, key in enumerate(keys):
        points = [(each[key], place) for place, each in enumerate(figures) if _shown(each.get(key))]
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            label=key,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            s=34,
            zorder=3,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    _ticks(axes.xaxis)
    axes.set_xlabel("relative error or distance")
    axes.grid(alpha=0.3, which="both", linewidth=0.6)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(keys), 4), frameon=False)


def _curves(rows: list[Row]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """(title, row -> FFN or block -> figure)."""
    outputs = {row.name: row.errors.output for row in rows if row.errors is not None}
    hidden = {row.name: row.errors.hidden for row in rows if row.errors is not None}
    adam = {
        row.name: {name: kinds["adam"].relative for name, kinds in row.ntk.items() if name}
        for row in rows
        if row.ntk is not None
    }
    found: list[tuple[str, Mapping[str, Mapping[str, float | None]]]]
    found = [("FFN output, by FFN", outputs), ("hidden state, by block", hidden), ("NTK adam, by FFN", adam)]
    return [
        (title, {row: {k: float(v) for k, v in each.items() if v is not None} for row, each in lines.items()})
        for title, lines in found
        if lines
    ]


def _by_layer(axes: Axes, title: str, lines: dict[str, dict[str, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    order = {name: place for place, name in enumerate(dict.fromkeys(n for each in lines.values() for n in each))}
    for number, (row, each) in enumerate(lines.items()):
        shown = {name: value for name, value in each.items() if _shown(value)}
        axes.plot(
            [order[name] for name in shown],
            list(shown.values()),
            label=row,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            ls=STYLES[number // len(COLOURS) % len(STYLES)],
            ms=4,
            lw=1.2,
        )
    axes.set_yscale("log")
    _ticks(axes.yaxis)
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("in the order of the model")
    axes.grid(alpha=0.3, which="both", linewidth=0.6)


def _ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _shown(value: float | None) -> bool:
    """Whether a logarithmic axis has a place for it."""
    return value is not None and math.isfinite(value) and value > 0
