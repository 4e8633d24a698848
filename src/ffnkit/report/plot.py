"""The one plot of the report: the metric against what tells the arms apart, before tuning and after, as inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

from ffnkit.report.table import Arm, Stat, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# no colour that a plot would choose, so that it can be swapped for the colour of the page's text
INK = "#010203"
# after Okabe and Ito: told apart by colour-blind readers, on light and on dark
COLOURS = ("#2f86c9", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX*"
AXES = {
    "parameters": ("parameters", 1e6),
    "ffn_parameters": ("parameters in FFNs", 1e6),
    "flops_per_token": ("FLOPs a token", 1e6),
    "updated_parameters": ("numbers that a step changes", 1e6),
    "trainable_parameters": ("parameters that train", 1e6),
    "zeros": ("zeros among the weights (%)", 0.01),
    "heads_removed": ("heads that went (%)", 0.01),
    "bytes_on_disk_compact": ("bytes on disk (compact)", 1e6),
    "latency_s": ("latency (ms)", 1e-3),
}  # what a plot may stand against, and the unit; the first of those that part most arms
APART = 0.01  # of the range of an axis: figures that are nearer to each other lie on one spot
MARK = 7.0  # points, the width of a mark
WIDE = 20.0  # a ratio of largest to smallest from which a scale is logarithmic
Measured = tuple[Stat | None, Mapping[Any, float]]  # mean and deviation, and each seed's value
_SERIES = re.compile(r"(.+)-[^-]+")


def metric_plot(summary: Summary) -> str | None:
    """An ``<svg>`` of the metric: mean, standard deviation, and each seed as a faint dot; before tuning beside it.

    It stands against what tells the arms apart (:func:`against`). Arms "NAME-..." of several sizes are a line. Text and
    axes take the colour of the surrounding page. None when no arm has the metric.
    """
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics]
    if not arms:
        return None
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "ffnkit", "font.size": 10}):
        figure = drawn(summary)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), heading(summary))


def heading(summary: Summary) -> str:
    """What the plot shows, in words."""
    key = against(summary)
    return f"{summary.metric} against {AXES[key][0].partition(' (')[0]}" if key else summary.metric


def against(summary: Summary) -> str | None:
    """The figure that the plot stands against; None where the arms differ in none.

    The first of :data:`AXES` that parts at least half as many arms as that which parts most.
    """
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics]
    spots = {key: _spots([arm.values[key].mean for arm in arms if key in arm.values]) for key in AXES}
    most = max(spots.values())
    return next((key for key in AXES if spots[key] > 1 and 2 * spots[key] >= most), None)


def _spots(values: Sequence[float]) -> int:
    """How many spots of an axis the values lie on."""
    ordered = sorted(values)
    least = APART * (ordered[-1] - ordered[0]) if ordered else 0.0
    return sum(b - a > least for a, b in pairwise(ordered)) + bool(ordered)


def drawn(summary: Summary) -> Figure:
    """The plot as a figure of matplotlib: a panel before tuning, where that was measured, and one of the outcome."""
    from matplotlib.figure import Figure

    key = against(summary)
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics and (key is None or key in arm.values)]
    places = [arm.values[key].mean / AXES[key][1] if key else float(n) for n, arm in enumerate(arms)]
    before: list[Measured] = [(arm.before, arm.before_by_seed) for arm in arms]
    after: list[Measured] = [(arm.metrics[summary.metric], arm.by_seed) for arm in arms]
    shown = [("before tuning", before), ("after tuning", after)] if any(s for s, _ in before) else [("", after)]
    figure = Figure(figsize=(3.6 * (1 + len(shown)), 3.6), layout="constrained")
    every = figure.subplots(1, len(shown), squeeze=False)[0]
    looks = _looks(arms, places, joined=key is not None)
    for axes, (title, panel) in zip(every, shown, strict=True):
        axes.set_title(title, color=INK, fontsize=10)
        _panel(axes, panel, places, looks)
        axes.set_ylabel(_plain(summary.metric))
        axes.set_xlabel(AXES[key][0] + (" (millions)" if AXES[key][1] == 1e6 else "") if key else "")
        axes.margins(x=0.08, y=0.15)
        _scale(axes, "y", [v for stat, seeds in panel if stat for v in (stat.mean, *seeds.values())])
        axes.autoscale_view()
        _ink(axes)
    handles, labels = every[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=INK)
    for axes in every:
        if key is None:
            axes.set_xticks([])
        elif not _scale(axes, "x", places) and 0 <= min(places) < max(places) / 2:
            axes.set_xlim(left=0)
    return figure


def _scale(axes: Axes, side: Literal["x", "y"], values: Sequence[float]) -> bool:
    """A logarithmic scale where the values are that far apart."""
    if not (min(values) > 0 and max(values) > WIDE * min(values)):
        return False
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = {"x": axes.xaxis, "y": axes.yaxis}[side]
    axes.set(**{f"{side}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    return True


def _looks(arms: Sequence[Arm], places: Sequence[float], *, joined: bool) -> list[tuple[str, str, int, float]]:
    """Of each arm its series (itself where it is alone), its label, the number of its colour, its mark's width."""
    prefixes = [m[1] if (m := _SERIES.fullmatch(arm.name)) else arm.name for arm in arms]
    spots = {name: {p for each, p in zip(prefixes, places, strict=True) if each == name} for name in prefixes}
    lines = {name for name, found in spots.items() if joined and 1 < len(found) == prefixes.count(name)}
    series = [name if name in lines else arm.name for arm, name in zip(arms, prefixes, strict=True)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(series))}
    found = []
    for index, (arm, name) in enumerate(zip(arms, series, strict=True)):
        label = name if series.count(name) > 1 else f"{name} (n = {len(arm.seeds)})"
        # all marks stand where their figure is; of arms that are alone on one spot the later ones are the smaller ones
        alone = [i for i, each in enumerate(series) if series.count(each) == 1 and places[i] == places[index]]
        shrunk = alone.index(index) / (len(alone) - 1) - 0.5 if index in alone and len(alone) > 1 else 0.0
        found.append((name, label, numbers[name], MARK * (1.1 - 0.4 * shrunk)))
    return found


def _panel(
    axes: Axes,
    panel: Sequence[Measured],
    places: Sequence[float],
    looks: Sequence[tuple[str, str, int, float]],
) -> None:
    for name in dict.fromkeys(name for name, *_ in looks):
        mine = [i for i, look in enumerate(looks) if look[0] == name and panel[i][0] is not None]
        for index in sorted(mine, key=lambda i: places[i]):
            _draw(axes, panel[index], places[index], looks[index], first=index == mine[0])
        line = sorted((places[i], stat.mean) for i in mine if (stat := panel[i][0]) is not None)
        if len(line) > 1:
            colour = COLOURS[looks[mine[0]][2] % len(COLOURS)]
            axes.plot(*zip(*line, strict=True), color=colour, lw=1.2, zorder=1)
    if (whole := panel[0][0]) is not None:  # what the others are compared with
        axes.axhline(whole.mean, color=INK, alpha=0.35, lw=1, ls="--", zorder=0)


def _draw(
    axes: Axes,
    measured: Measured,
    size: float,
    look: tuple[str, str, int, float],
    *,
    first: bool,
) -> None:
    from matplotlib.transforms import offset_copy

    (_, label, number, width), (stat, by_seed) = look, measured
    assert stat is not None
    colour = COLOURS[number % len(COLOURS)]
    figure = cast("Figure", axes.figure)
    beside = offset_copy(axes.transData, figure, x=0.75 * MARK, units="points")
    style: dict[str, Any] = {
        "color": colour,
        "marker": MARKERS[number % len(MARKERS)],
        "ms": width,
        "capsize": 3,
        "lw": 1.5,
        "ls": "",
    }
    told = _plain(label) if first else "_nolegend_"
    axes.errorbar(size, stat.mean, yerr=stat.std, label=told, **style)
    seeds = list(by_seed.values())
    axes.scatter([size] * len(seeds), seeds, s=14, color=colour, alpha=0.6, lw=0, transform=beside)
    ends = (stat.mean - (stat.std or 0), stat.mean + (stat.std or 0))
    axes.update_datalim([(size, value) for value in (*seeds, *ends)])


def _plain(text: str) -> str:
    """Text as it is: no mathematics between dollar signs, and no leading underscore, which hides a label."""
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


def _ink(axes: Axes) -> None:
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _inline(svg: str, label: str) -> str:
    """The ``<svg>`` element alone, as wide as its place allows, in the colour of the page's text."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
