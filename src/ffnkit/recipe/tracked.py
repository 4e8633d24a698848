"""Units of a recipe as runs of trackers: named by recipe, arm and seed, in OUT/logs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ffnkit.plans import Plan
from ffnkit.recipe.schema import Recipe
from ffnkit.recipe.state import Unit, arm_dict
from ffnkit.tune import tracking

STAGES = ("compress", "heal", "distil", "search", "tune", "prune", "recover", "evaluate", "export")


def run_of(recipe: Recipe, unit: Unit, stage: str = "tune", out: Path | None = None) -> tracking.Run:
    """The run of a unit's tuning, or of another training of it.

    Args:
        out: the folder of a training of which a stage has several.
    """
    further = [] if stage == "tune" else [stage, *([out.name] if out is not None else [])]
    parts = [unit.arm, f"seed-{unit.seed}", *further]
    folder = unit.folder.parents[2] / tracking.LOGS
    return tracking.Run("/".join([recipe.name, *parts]), folder.joinpath(*parts), recipe.name)


def clear(recipe: Recipe, unit: Unit) -> None:
    """Delete the logs of a unit that begins anew."""
    shutil.rmtree(run_of(recipe, unit).folder, ignore_errors=True)


def tell(recipe: Recipe, unit: Unit, plan: Path) -> None:
    """Log what a finished unit was: its settings and plan, sizes and FLOPs, and every figure of the report."""
    settings = recipe.tune_of(unit.arm)
    if not tracking.trackers(settings.report_to):
        return
    marks = {stage: unit.marker(stage) or {} for stage in STAGES}
    measured = marks["evaluate"]
    figures = tracking.numbers({"report": measured.get("metrics", {}), "report_loss": measured.get("losses", {})})
    sizes = {name: value for name, value in measured.items() if not isinstance(value, dict)}
    figures |= tracking.numbers({"size": {**sizes, **marks["export"]}, "tune": marks["tune"]})
    chosen: dict[str, Any] = {
        "recipe": recipe.name,
        "model": recipe.model,
        "task": recipe.task.where,
        "arm": unit.arm,
        "seed": unit.seed,
        "method": arm_dict(recipe.arms[unit.arm]),
        "tuner": recipe.tuner_of(unit.arm).model_dump(mode="json"),
        "tuning": settings.model_dump(mode="json"),
    }
    texts = {"plan": str(Plan.load(plan))} if plan.exists() else {}
    tracking.tell(run_of(recipe, unit), settings.report_to, tracking.Record(chosen, figures, texts))
