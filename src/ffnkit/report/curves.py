"""Loss curves: what the training loss and the metric on dev were at which step, a line an arm, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffnkit.report.plot import COLOURS, INK, ink, panel, plain, svg

if TYPE_CHECKING:
    from ffnkit.report.table import Arm, Summary

POINTS = 200  # of a curve that are kept
STYLES = ("-", "--", ":", "-.")
Curve = Sequence[Sequence[float]]
Entries = Sequence[Mapping[str, float]]


def thinned(curve: Curve, points: int = POINTS) -> list[list[float]]:
    """At most so many points of a curve, its ends among them."""
    if len(curve) <= points:
        return [list(point) for point in curve]
    places = sorted({round(n * (len(curve) - 1) / (points - 1)) for n in range(points)})
    return [list(curve[place]) for place in places]


def curve_of(losses: Entries, history: Entries, metric: str) -> dict[str, list[list[float]]]:
    """(step, value) of the training loss, and of the metric on dev, from a training's entries, at some steps."""
    return {
        "loss": thinned([(entry["step"], entry["loss"]) for entry in losses]),
        "metric": thinned([(entry["step"], entry[metric]) for entry in history if metric in entry]),
    }


def curves(summary: Summary, metric: str) -> list[str]:
    """``<svg>`` elements: the training loss by step and, where it was measured on dev, ``metric``; [] without any.

    A line is the mean over an arm's seeds at the steps that all of them have.
    """
    titles = {"loss": "training loss", "metric": f"{metric} on dev"}
    lines = {name: [(arm, mean(arm, name)) for arm in summary.arms] for name in titles}
    return [_drawn(name, titles[name], arms) for name, arms in lines.items() if any(len(line) > 1 for _, line in arms)]


def mean(arm: Arm, name: str) -> list[tuple[float, float]]:
    """(step, mean over seeds) at the steps that each seed has."""
    seeds = [{point[0]: point[1] for point in each[name]} for each in arm.curves if each.get(name)]
    steps = set.intersection(*map(set, seeds)) if seeds else set()
    return [(step, sum(seed[step] for seed in seeds) / len(seeds)) for step in sorted(steps)]


def _drawn(name: str, title: str, arms: Sequence[tuple[Arm, list[tuple[float, float]]]]) -> str:
    shown = [(arm, line) for arm, line in arms if line]
    with panel([arm.name for arm, _ in shown]) as (figure, axes):
        for number, (arm, line) in enumerate(shown):
            look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "ls": STYLES[number // len(COLOURS) % 4]}
            axes.plot(*zip(*line, strict=True), **look, lw=1.4, label=plain(arm.name))
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_xlabel("step")
        ink(axes)
    return svg(figure, f"{title} by step", f"curve-{name}")
