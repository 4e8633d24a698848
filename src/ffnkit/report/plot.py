"""The one plot of the report: the metric against the parameters in FFNs or against FLOPs, as inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ffnkit.report.table import Arm, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# no colour that a plot would choose, so that it can be swapped for the colour of the page's text
INK = "#010203"
# after Okabe and Ito: told apart by colour-blind readers, on light and on dark
COLOURS = ("#2f86c9", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX*"
LABELS = {"ffn_parameters": "parameters in FFNs", "flops_per_token": "FLOPs a token"}


def metric_plot(summary: Summary) -> str | None:
    """An ``<svg>`` of the metric against FFN parameters: mean, standard deviation, and each seed as a faint dot.

    Where arms of the same FFNs differ in FLOPs (attention heads went), it is against FLOPs a token. Text and axes take
    the colour of the surrounding page. None when no arm has both figures.
    """
    key = against(summary)
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics and key in arm.values]
    if not arms:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "ffnkit", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        sizes = [arm.values[key].mean / 1e6 for arm in arms]
        shifts = [_shift(sizes, index) for index in range(len(arms))]
        for index, arm in enumerate(arms):
            _draw(axes, arm, summary.metric, index, sizes[index], shifts[index])
        axes.set_xlabel(f"{LABELS[key]} (millions)")
        axes.set_ylabel(_plain(summary.metric))
        axes.margins(x=0.08, y=0.15)
        axes.autoscale_view()
        axes.set_xlim(left=0)
        _ink(figure, axes)
        _widen(figure, axes, sizes, shifts)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), f"{summary.metric} against {LABELS[key]}")


def against(summary: Summary) -> str:
    """What the plot is against: "ffn_parameters", or "flops_per_token" where that tells arms of equal FFNs apart."""
    pairs = {
        tuple(arm.values[key].mean for key in LABELS) for arm in summary.arms if LABELS.keys() <= arm.values.keys()
    }
    return "flops_per_token" if len({size for size, _ in pairs}) < len(pairs) else "ffn_parameters"


def _shift(sizes: Sequence[float], index: int) -> float:
    """Points to the side, so that arms of one size stand beside each other."""
    alike = [i for i, size in enumerate(sizes) if size == sizes[index]]
    return 11 * (alike.index(index) - (len(alike) - 1) / 2)


def _widen(figure: Figure, axes: Axes, sizes: Sequence[float], shifts: Sequence[float]) -> None:
    """Let the axis end behind the last mark, which stands up to its shift beside its size."""
    figure.draw_without_rendering()
    width = axes.get_window_extent().width * 72 / figure.dpi
    ends = [size * width / max(width - shift - 16, 1) for size, shift in zip(sizes, shifts, strict=True)]
    axes.set_xlim(right=max(axes.get_xlim()[1], *ends))


def _draw(axes: Axes, arm: Arm, metric: str, index: int, size: float, shift: float) -> None:
    from matplotlib.transforms import offset_copy

    colour, stat = COLOURS[index % len(COLOURS)], arm.metrics[metric]
    figure = cast("Figure", axes.figure)
    beside = [offset_copy(axes.transData, figure, x=x, units="points") for x in (shift, shift + 5)]
    label = _plain(f"{arm.name} (n = {stat.n})")
    style: dict[str, Any] = {
        "color": colour,
        "marker": MARKERS[index % len(MARKERS)],
        "ms": 7,
        "capsize": 3,
        "lw": 1.5,
        "ls": "",
    }
    axes.errorbar(size, stat.mean, yerr=stat.std, label=label, transform=beside[0], **style)
    seeds = list(arm.by_seed.values())
    axes.scatter([size] * len(seeds), seeds, s=14, color=colour, alpha=0.6, lw=0, transform=beside[1])
    ends = (stat.mean - (stat.std or 0), stat.mean + (stat.std or 0))
    axes.update_datalim([(size, value) for value in (*seeds, *ends)])


def _plain(text: str) -> str:
    """Text as it is: no mathematics between dollar signs, and no leading underscore, which hides a label."""
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


def _ink(figure: Figure, axes: Axes) -> None:
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)


def _inline(svg: str, label: str) -> str:
    """The ``<svg>`` element alone, as wide as its place allows, in the colour of the page's text."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
