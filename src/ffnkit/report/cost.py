"""What a compression cost, stage by stage: figures and their table. Light to import; :mod:`.costing` measures them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GRAM = 4  # words of a repetition
MEANING = {
    "perplexity": "perplexity",
    "kl": "KL to the original",
    "agreement": "same greedy answer",
    "error": "error of last hidden state",
    "difference": "error of the answers",
    "repetition": f"repeated {GRAM}-grams",
}
PLACES = {"in": "kept apart from the calibration text", "out": "text of other kinds", "data": "the data given"}


@dataclass
class Figures:
    """What was measured of one model.

    Attributes:
        places: by place ("in" the calibration text, "out" of it) the figures by name: "perplexity"; "kl" (to the
            original, nats a row) and "agreement" (share of rows with the same likeliest answer); without a head
            "error", of a regression "difference" (both: squared error over the variance of the original's).
        repetition: share of the 4-grams of greedy continuations that stood in them before; None: not measured.
        metrics: of a task.
    """

    places: dict[str, dict[str, float]] = field(default_factory=dict)
    repetition: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        more = {"repetition": self.repetition} if self.repetition is not None else {}
        return {"places": self.places, **more, **({"metrics": self.metrics} if self.metrics else {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figures:
        """What :meth:`to_dict` gave."""
        return cls(dict(data["places"]), data.get("repetition"), dict(data.get("metrics", {})))


@dataclass
class Cost:
    """Figures of a model at several stages, the uncompressed one first.

    Attributes:
        stages: figures by stage ("uncompressed", "compressed", "healed").
        rows: how many rows (tokens of a language model) are behind a place's figures.
        names: what a place is, in words.
        notes: what was not measured, and why.
    """

    stages: dict[str, Figures]
    rows: dict[str, int]
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        found: dict[str, Any] = {"rows": self.rows, "on": self.names, "stages": {}}
        for name, figures in self.stages.items():
            found["stages"][name] = figures.to_dict()
        return found | ({"notes": self.notes} if self.notes else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cost:
        """What :meth:`to_dict` gave."""
        stages = {name: Figures.from_dict(figures) for name, figures in data["stages"].items()}
        return cls(stages, dict(data["rows"]), dict(data["on"]), list(data.get("notes", ())))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and rows of cells: what, on what, and its value at each stage."""
        stages = list(self.stages.values())
        rows = []
        for place, named in stages[-1].places.items():
            where = f"{self.names.get(place, PLACES.get(place, place))}, {self.rows[place]:,}"
            for name in named:
                rows.append([MEANING[name], where, *(_shown(stage.places[place].get(name)) for stage in stages)])
        if any(stage.repetition is not None for stage in stages):
            rows.append(
                [MEANING["repetition"], "greedy continuations", *(_shown(stage.repetition) for stage in stages)]
            )
        for name in stages[0].metrics:
            where = f"{self.names.get('task', 'task')}, {self.rows['task']:,}"
            rows.append([name, where, *(_shown(stage.metrics.get(name)) for stage in stages)])
        return ["what it cost", "on, tokens or rows", *self.stages], rows

    def markdown(self) -> str:
        """The table for a page."""
        columns, rows = self.table()
        marks = [":--", ":--", *("--:" for _ in self.stages)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, marks, *rows))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
