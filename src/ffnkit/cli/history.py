"""How a checkpoint came to be, in a file beside its weights, and the model card that is written from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ffnkit.io import quickstart
from ffnkit.io.architectures import is_own
from ffnkit.io.files import write_text

FILE = "ffnkit.json"


@dataclass(frozen=True)
class History:
    """What was done to a model, from the base model on.

    Attributes:
        base_model: hub name, or ``./`` and the name of the folder, of the model that all began with.
        method, settings: what narrowed its FFNs; method None: nothing did.
        layers: (name, neurons before, neurons after) of every FFN that there was before.
        training: settings of the last tuning.
        task, metrics: what it was measured on last, and the figures.
        kind: the hub's name of the kind of that task.
        cost: what the last compression lost, as :meth:`ffnkit.report.cost.Cost.to_dict` gives it.
        healing: settings of the healing after it.
        license: that of the base model, as its own card states it; None where it states none.
    """

    base_model: str
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    layers: tuple[tuple[str, int, int | None], ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    kind: str = "text-classification"
    cost: dict[str, Any] = field(default_factory=dict)
    healing: dict[str, Any] = field(default_factory=dict)
    license: str | None = None

    @classmethod
    def of(cls, model: str) -> History:
        """The history beside the weights of ``model``; a new one where there is none."""
        try:
            data = json.loads((Path(model) / FILE).read_text(encoding="utf-8"))
            known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
            return cls(**{**known, "layers": tuple(tuple(row) for row in known.get("layers", ()))})
        except (OSError, ValueError, TypeError):
            from ffnkit.report.licence import licence_of

            return cls(base_model=public_name(model), license=licence_of(model))

    @property
    def narrowed(self) -> list[str]:
        """The FFNs that lost neurons."""
        return [name for name, before, after in self.layers if after is not None and after < before]

    def compressed(self, plan: Any, before: Any, after: Any) -> History:
        """With a plan that was applied; ``before`` and ``after`` are inventories."""
        widths = {row.name: row.width for row in after.rows}
        started = {name: width for name, width, _ in self.layers}
        layers = tuple((row.name, started.get(row.name, row.width), widths.get(row.name)) for row in before.rows)
        fresh: dict[str, Any] = {"task": None, "metrics": {}, "cost": {}, "healing": {}}
        return replace(self, method=plan.method, settings=dict(plan.settings), layers=layers, **fresh)

    def tuned(self, training: dict[str, Any], task: str, metrics: dict[str, float], kind: str) -> History:
        """With a tuning and what was measured after it; what was measured before it holds no more."""
        return replace(self, training=training, task=task, metrics=metrics, kind=kind, cost={})

    def write(self, folder: Path) -> None:
        """Put the history beside the weights."""
        from ffnkit.cli.console import plain

        write_text(folder / FILE, json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False) + "\n")

    def card(self, model: Any, form: Literal["compact", "standard", "nemotron-nas", "apart"], multiple: int = 1) -> str:
        """The text of README.md.

        Args:
            multiple: to which widths are padded in the file.
        """
        from ffnkit.checkpoint.export import written_widths
        from ffnkit.model.linear import added_to
        from ffnkit.report.card import CardInfo, LayerWidth, Metric, model_card
        from ffnkit.report.environment import versions

        task = self.task or ""
        figures = [
            Metric(name, value, dataset=task, split="report", task=self.kind) for name, value in self.metrics.items()
        ]
        held = written_widths(model, form, multiple) if form in ("standard", "nemotron-nas") and self.layers else {}
        info = CardInfo(
            base_model=self.base_model,
            form="added" if added_to(model) else form,
            method=self.method,
            settings=self.settings,
            layers=[LayerWidth(*row, held.get(row[0])) for row in self.layers],
            metrics=figures,
            training=self.training,
            cost=self.cost,
            healing=self.healing,
            versions=versions(),
            auto_class="AutoModelForSequenceClassification" if is_own(model) else type(model).__name__,
            own_class=is_own(model),
            pipeline_tag=self.kind if self.task else None,
            license=self.license,
        )
        return model_card(info)


def public_name(model: str) -> str:
    """A hub name as it is; of a folder ``./`` and its own name only, for cards are published."""
    if model == quickstart.NAME:
        return quickstart.HUB
    path = Path(model).expanduser()
    return f"./{path.resolve().name}" if path.exists() else model
