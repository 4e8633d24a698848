"""The plots of the report: the metric against what an arm costs, before tuning and after, as inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

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
    "parameters": ("parameters", 1e6, "parameters (millions)"),
    "ffn_parameters": ("parameters in FFNs", 1e6, "parameters in FFNs (millions)"),
    "flops_per_token": ("FLOPs a token", 1e6, "FLOPs a token (millions)"),
    "updated_parameters": ("numbers that a step changes", 1e6, "numbers that a step changes (millions)"),
    "trainable_parameters": ("parameters that train", 1e6, "parameters that train (millions)"),
    "zeros": ("zeros among the weights", 0.01, "zeros among the weights (%)"),
    "heads_removed": ("heads that went", 0.01, "heads that went (%)"),
    "bytes_on_disk_compact": ("bytes on disk", 1e6, "MB on disk (compact)"),
    "latency_s": ("latency", 1e-3, "latency of a batch (ms)"),
    "peak_memory_bytes": ("peak memory", 1e6, "peak memory of tensors in training (MB)"),
    "seconds_per_step": ("seconds a step", 1.0, "seconds a training step"),
}  # what a plot may stand against: its name, the unit, and the label of the axis
NOISY = ("latency_s", "peak_memory_bytes", "seconds_per_step")  # these part any arms
ALWAYS = ("parameters", "flops_per_token", "latency_s", "bytes_on_disk_compact")  # offered wherever they are measured
APART = 0.01  # of the range of an axis: figures that are nearer to each other lie on one spot
FILL = 0.35  # how opaque marks are inside their outline: those below are seen through
MARK = 7.0  # points, the width of a mark
WIDTH = 4.9  # inches, 350 points: the letters keep their size on a narrow screen
LINE = 0.2  # inches, of a legend
WIDE = 20.0  # a ratio of largest to smallest from which a scale is logarithmic
Measured = tuple[Stat | None, Mapping[Any, float]]  # mean and deviation, and each seed's value
_SERIES = re.compile(r"(.+)-[^-]+")


def trade_offs(summary: Summary, axis: str | None = None) -> dict[str | None, list[str]]:
    """For each figure that an arm costs, ``<svg>`` elements of the metric against it: before tuning, where that was
    measured, and after. ``axis``, else that of :func:`against`, comes first; {} where no arm has the metric.

    Marks are means with one standard deviation, ticks are seeds. Arms "NAME-..." of several sizes are a line. Text is
    text; it and the axes take the colour of the surrounding page.
    """
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics]
    if not arms:
        return {}
    first = axis or against(summary)
    keys = [key for key in AXES if key != first and _offered(key, arms)]
    found: dict[str | None, list[str]] = {}
    for key in [first, *keys]:
        figures = [_narrow(summary, key, when) for when in _placed(summary, key).panels]
        words = heading(summary, key)
        found[key] = [svg(figure, words, f"{key}-{n}") for n, figure in enumerate(figures)]
    return found


def _offered(key: str, arms: Sequence[Arm]) -> bool:
    """Whether a plot may stand against it: arms differ in it, or it is one of those that are asked for."""
    values = [arm.values[key].mean for arm in arms if key in arm.values]
    return bool(values) and (key in ALWAYS or _spots(values) > 1)


def svg(figure: Figure, words: str, name: str) -> str:
    """A figure as an ``<svg>`` element with text that is text; ``name`` tells its parts from those of others."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"ffnkit {name}"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), words, name)


def heading(summary: Summary, key: str | None = None) -> str:
    """What a plot against ``key`` shows, in words; without it the one of :func:`against`."""
    key = key or against(summary)
    return f"{summary.metric} against {AXES[key][0]}" if key else summary.metric


def against(summary: Summary) -> str | None:
    """The figure that tells the arms apart; None where they differ in none.

    The first of :data:`AXES` that parts at least half as many arms as that which parts most; one that is measured with
    noise only where no other parts any.
    """
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics]
    spots = {key: _spots([arm.values[key].mean for arm in arms if key in arm.values]) for key in AXES}
    for keys in ([key for key in AXES if key not in NOISY], NOISY):
        most = max(spots[key] for key in keys)
        if most > 1:
            return next(key for key in keys if spots[key] > 1 and 2 * spots[key] >= most)
    return None


def _spots(values: Sequence[float]) -> int:
    """How many spots of an axis the values lie on."""
    ordered = sorted(values)
    least = APART * (ordered[-1] - ordered[0]) if ordered else 0.0
    return sum(b - a > least for a, b in pairwise(ordered)) + bool(ordered)


@dataclass(frozen=True)
class _Placed:
    """Arms with their places on an axis, their looks, and what was measured when: the panels of a plot."""

    key: str | None
    arms: list[Arm]
    places: list[float]
    looks: list[tuple[str, str, int, float]]
    panels: dict[str, list[Measured]]


def _placed(summary: Summary, key: str | None) -> _Placed:
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics and (key is None or key in arm.values)]
    places = [arm.values[key].mean / AXES[key][1] if key else float(n) for n, arm in enumerate(arms)]
    before: list[Measured] = [(arm.before, arm.before_by_seed) for arm in arms]
    after: list[Measured] = [(arm.metrics[summary.metric], arm.by_seed) for arm in arms]
    shown = {"before tuning": before, "after tuning": after} if any(s for s, _ in before) else {"": after}
    return _Placed(key, arms, places, _looks(arms, places, joined=key is not None), shown)


def drawn(summary: Summary, axis: str | None = None) -> Figure:
    """The plot as a figure of matplotlib: a panel before tuning, where that was measured, and one of the outcome.

    It stands against ``axis``, one of :data:`AXES` that is measured of some arm, else that of :func:`against`.
    """
    from matplotlib.figure import Figure

    placed = _placed(summary, axis or against(summary))
    count = len(placed.panels)
    figure = Figure(figsize=(3.6 * (1 + count), 3.6), layout="constrained")
    every = figure.subplots(1, count, squeeze=False)[0]
    for axes, title in zip(every, placed.panels, strict=True):
        _fill(axes, summary.metric, placed, title)
    handles, labels = every[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=INK)
    return figure


def _narrow(summary: Summary, key: str | None, title: str) -> Figure:
    """One panel that can be read on a telephone, with its legend below."""
    placed = _placed(summary, key)
    with panel([look[1] for look in placed.looks]) as (figure, axes):
        _fill(axes, summary.metric, placed, title)
    return figure


@contextmanager
def panel(names: Sequence[str]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one panel, to be filled, with room for a legend of these names below it."""
    from matplotlib.figure import Figure

    shown = ["\n".join(wrap(name, 48)) for name in dict.fromkeys(names)]
    columns = 2 if max(map(len, shown)) <= 20 else 1
    below = 0.65 + LINE * -(-sum(1 + name.count("\n") for name in shown) // columns)
    figure = Figure(figsize=(WIDTH, 2.6 + below))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.16, right=0.98, top=1 - 0.3 / (2.6 + below), bottom=below / (2.6 + below))
    yield figure, axes
    handles, labels = axes.get_legend_handles_labels()
    legend: dict[str, Any] = {"loc": "lower center", "frameon": False, "labelcolor": INK, "fontsize": 9}
    figure.legend(handles, ["\n".join(wrap(label, 48)) for label in labels], ncols=columns, **legend)


def _fill(axes: Axes, metric: str, placed: _Placed, title: str) -> None:
    measured, places, key = placed.panels[title], placed.places, placed.key
    axes.set_title(title, color=INK, fontsize=10)
    _panel(axes, measured, places, placed.looks)
    axes.set_ylabel(plain(metric))
    axes.set_xlabel(AXES[key][2] if key else "")
    axes.margins(x=0.08, y=0.15)
    _scale(axes, "y", [v for stat, seeds in measured if stat for v in (stat.mean, *seeds.values())])
    axes.autoscale_view()
    ink(axes)
    if key is None:
        axes.set_xticks([])
    elif not _scale(axes, "x", places) and 0 <= min(places) < max(places) / 2:
        axes.set_xlim(left=0)


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
    (_, label, number, width), (stat, by_seed) = look, measured
    assert stat is not None
    colour = COLOURS[number % len(COLOURS)]
    style: dict[str, Any] = {
        "color": colour,
        "marker": MARKERS[number % len(MARKERS)],
        "mfc": (colour, FILL),
        "mec": colour,
        "mew": 1.4,
        "ms": width,
        "capsize": 3,
        "lw": 1.5,
        "ls": "",
    }
    told = plain(label) if first else "_nolegend_"
    axes.errorbar(size, stat.mean, yerr=stat.std, label=told, **style)
    seeds = list(by_seed.values())
    if len(seeds) > 1:  # ticks that are wider than the mark, where the figure is
        axes.scatter([size] * len(seeds), seeds, s=(2 * MARK) ** 2, marker="_", color=colour, alpha=0.7, lw=1)
    ends = (stat.mean - (stat.std or 0), stat.mean + (stat.std or 0))
    axes.update_datalim([(size, value) for value in (*seeds, *ends)])


def plain(text: str) -> str:
    """Text as it is: no mathematics between dollar signs, and no leading underscore, which hides a label."""
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


def ink(axes: Axes) -> None:
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _inline(text: str, label: str, name: str) -> str:
    """The ``<svg>`` element alone, as wide as its place allows, in the colour of the page's text."""
    text = text[text.index("<svg") :].replace(INK, "currentColor").strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)  # unique in a page of several
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
