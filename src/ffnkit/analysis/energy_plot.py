"""The picture of where the energy of gradients lies: by layer, by share and by step, a column a type of linear."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit.analysis.plot import COLOURS, MARKERS
from ffnkit.io.files import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ffnkit.analysis.energy import Energy
    from ffnkit.analysis.energy_measure import Measured


def draw(found: Energy, path: str | Path) -> None:
    """Write the picture: one scale for all; solid lines are free choices, broken ones were chosen before."""
    from matplotlib.figure import Figure

    types = list(dict.fromkeys(each.type for each in found.layers))
    high = 3 if len(found.steps) > 1 else 2
    figure = Figure(figsize=(4.4 * len(types) + 2.6, 3.0 * high + 0.4), layout="constrained")
    axes = figure.subplots(high, len(types), squeeze=False, sharey=True)
    for column, kind in enumerate(types):
        rows = [each for each in found.layers if each.type == kind]
        _by_layer(axes[0][column], found, rows)
        axes[0][column].set_title(kind, fontsize=9)
        _by_share(axes[1][column], found, rows)
        if high == 3:
            _by_step(axes[2][column], found, rows)
    at = f"{found.shares[found.reference]:.1%}"
    for place, text in zip(axes[:, 0], (f"energy in {at}", "energy, mean of layers", f"energy in {at}"), strict=False):
        place.set_ylabel(text)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    with disk_errors(path):
        figure.savefig(path, dpi=150)


def _style(kind: str, kinds: list[str]) -> dict[str, object]:
    number = kinds.index(kind)
    dashed = "--" if kind.startswith("fixed") else "-"
    look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    return {"label": kind, "ls": dashed, "ms": 4, "lw": 1.2, **look}


def _by_layer(axes: Axes, found: Energy, rows: list[Measured]) -> None:
    from matplotlib.ticker import MaxNLocator

    for kind in found.kinds:
        values = [row.energy[0][kind][found.reference] for row in rows]
        axes.plot(range(len(rows)), values, **_style(kind, found.kinds))  # type: ignore[arg-type]
    axes.set_xlabel("in the order of the model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def _by_share(axes: Axes, found: Energy, rows: list[Measured]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    for kind in found.kinds:
        values = [sum(row.energy[0][kind][i] for row in rows) / len(rows) for i in range(len(found.shares))]
        axes.plot(found.shares, values, **_style(kind, found.kinds))  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.set_xticks(found.shares, [f"{share:.3g}" for share in (100 * each for each in found.shares)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("percent of the entries")
    _plain(axes)


def _by_step(axes: Axes, found: Energy, rows: list[Measured]) -> None:
    for kind in found.kinds:
        values = [
            sum(row.energy[i][kind][found.reference] for row in rows) / len(rows) for i in range(len(found.steps))
        ]
        axes.plot(found.steps, values, **_style(kind, found.kinds))  # type: ignore[arg-type]
    axes.set_xlabel("steps of training")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3, which="both", linewidth=0.6)
