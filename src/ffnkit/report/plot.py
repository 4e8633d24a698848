"""The one plot of the report: the metric against the parameters in FFNs, as inline SVG."""

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


def metric_plot(summary: Summary) -> str | None:
    """An ``<svg>`` of the metric against FFN parameters: mean, standard deviation, and each seed as a faint dot.

    Text and axes take the colour of the surrounding page. None when no arm has both figures.
    """
    arms = [arm for arm in summary.arms if summary.metric in arm.metrics and "ffn_parameters" in arm.values]
    if not arms:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "ffnkit", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, arm in enumerate(arms):
            _draw(axes, arm, summary.metric, index, _shift(arms, index))
        axes.set_xlabel("parameters in FFNs (millions)")
        axes.set_ylabel(_plain(summary.metric))
        axes.margins(x=0.08, y=0.15)
        axes.autoscale_view()
        axes.set_xlim(left=0)
        _ink(figure, axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), f"{summary.metric} against parameters in FFNs")


def _shift(arms: Sequence[Arm], index: int) -> float:
    """Points to the side, so that arms of one size stand beside each other."""
    alike = [i for i, arm in enumerate(arms) if _size(arm) == _size(arms[index])]
    return 20 * (alike.index(index) - (len(alike) - 1) / 2)


def _size(arm: Arm) -> float:
    return arm.values["ffn_parameters"].mean / 1e6


def _draw(axes: Axes, arm: Arm, metric: str, index: int, shift: float) -> None:
    from matplotlib.transforms import offset_copy

    colour, stat = COLOURS[index % len(COLOURS)], arm.metrics[metric]
    figure = cast("Figure", axes.figure)
    beside = [offset_copy(axes.transData, figure, x=x, units="points") for x in (shift, shift + 7)]
    label = _plain(f"{arm.name} (n = {stat.n})")
    style: dict[str, Any] = {
        "color": colour,
        "marker": MARKERS[index % len(MARKERS)],
        "ms": 7,
        "capsize": 3,
        "lw": 1.5,
        "ls": "",
    }
    axes.errorbar(_size(arm), stat.mean, yerr=stat.std, label=label, transform=beside[0], **style)
    seeds = list(arm.by_seed.values())
    axes.scatter([_size(arm)] * len(seeds), seeds, s=14, color=colour, alpha=0.6, lw=0, transform=beside[1])
    ends = (stat.mean - (stat.std or 0), stat.mean + (stat.std or 0))
    axes.update_datalim([(_size(arm), value) for value in (*seeds, *ends)])


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
