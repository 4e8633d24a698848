"""What a run leaves to read: rows, results.json, the table, the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffnkit.io.files import read_json
from ffnkit.recipe import judging
from ffnkit.recipe.schema import Arm, Recipe
from ffnkit.recipe.searching import found_of
from ffnkit.recipe.state import TRAINED, Unit, arm_dict, check_there, stages_of, unit_of, write_json, zeros_of
from ffnkit.settings.presets import filled

STAGE_MARKERS = (
    "compress",
    "heal",
    "distil",
    "search",
    "before",
    "tickets",
    "tune",
    "prune",
    "recover",
    "evaluate",
    "export",
)
_PRUNING = {"kept", "sparsity", "merging"}  # figures of the stages prune and recover


@dataclass(frozen=True)
class Results:
    """The rows of a run, one an arm and seed, and what could not be run."""

    out: Path
    rows: list[dict[str, Any]]
    metric: str
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    failed: list[dict[str, Any]] = field(default_factory=list)
    unjudged: str = ""  # why the answers were not judged, where the recipe names a judge

    @property
    def ok(self) -> bool:
        """Whether every unit is done."""
        return all(row["status"] == "done" for row in self.rows)

    @property
    def exit_code(self) -> int:
        """0, or 1 where a unit failed or was not run, or answers were not judged."""
        return 0 if self.ok and not self.unjudged else 1

    def to_dict(self) -> dict[str, Any]:
        """As results.json holds it."""
        return read_json(self.out / "results.json") or {"rows": plain(self.rows)}

    def __str__(self) -> str:
        """The table with its notes, and what failed."""
        from ffnkit.report.formats import to_markdown

        return to_markdown(self.summary()).rstrip()

    def summary(self) -> Any:
        """Means and spreads, one line an arm (``ffnkit.report.table.Summary``)."""
        from ffnkit.report.table import summarize

        return summarize(reported(self.rows), self.metric, arms=self.arms, seeds=self.seeds)


def reported(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of units that were begun."""
    return [row for row in rows if row["status"] != "not run"]


def row_of(recipe: Recipe, unit: Unit, latency: Mapping[str, Any]) -> dict[str, Any]:
    """The row of one unit from its markers; what was not measured is None."""
    marks = {stage: unit.marker(stage) or {} for stage in STAGE_MARKERS}
    failed, end = unit.marker("failed"), unit.marker("end") or {}
    last = marks["recover"] or marks["tune"]
    done = unit.done
    arm = recipe.arms[unit.arm]
    row: dict[str, Any] = {
        "arm": unit.arm,
        "seed": unit.seed,
        "status": "done" if done else "failed" if failed else "not run",
        "metrics": marks["evaluate"].get("metrics", {}),
        "dev_metric": last.get("dev_metric"),
        "best_step": last.get("best_step"),
        "steps": marks["tune"].get("steps"),
    }
    if found := found_of(unit):
        row |= {"learning_rate": found["learning_rate"], "search": found}
    if pruned := {name: marks[stage][name] for stage in ("prune", "recover") for name in _PRUNING & {*marks[stage]}}:
        row["pruning"] = pruned | ({"recover_steps": last.get("steps")} if marks["recover"] else {})
    row |= zeros_of(recipe, unit)
    if forgotten := marks["evaluate"].get("neutral_loss"):
        row["neutral_loss"] = forgotten
    if asked := marks["evaluate"].get("lm_eval"):
        row["lm_eval"] = asked
    if recipe.evaluate_before:
        row["metrics_before"] = marks["before"].get("metrics", {})
    for name in ("parameters", "ffn_parameters", "flops_per_token", "ffn_flops_per_token"):
        row[name] = marks["evaluate"].get(name)
    if layers := _layers(marks["compress"].get("plan", {})):
        row["layers"] = layers
    for name in ("heads_removed", "neurons_removed", "parameters_removed"):
        if marks["evaluate"].get(name):
            row[name] = marks["evaluate"][name]
    for name in TRAINED:
        row[name] = marks["tune"].get(name)
    for name in ("bytes_on_disk_compact", "bytes_on_disk_standard"):
        row[name] = marks["export"].get(name)
    if "bytes_on_disk_apart" in marks["export"]:
        row["bytes_on_disk_apart"] = marks["export"]["bytes_on_disk_apart"]
    measured = latency.get("arms", {}).get(unit.arm) if done else None
    row |= measured or {"latency_s": None, "latency_ratio": None}
    for name in ("peak_memory_bytes", "process_memory_bytes"):
        peaks = [marks[stage].get(name) for stage in ("tune", "recover")]
        row[name] = max((peak for peak in peaks if peak is not None), default=None)
    stages = stages_of(recipe, unit.arm)
    row["seconds"] = {stage: marks[stage]["seconds"] for stage in stages if "seconds" in marks[stage]}
    row["attempts"] = {stage: marks[stage]["attempts"] for stage in stages if marks[stage].get("attempts", 1) > 1}
    row["settings"] = arm_dict(arm) | _with_preset(arm) | {"tuner": recipe.tuner_of(unit.arm).model_dump()}
    if "tune" in recipe.stages:
        row["tuner"] = tuner_told(recipe, unit.arm)
    row["checkpoints"] = {
        form: str((unit.folder / form).relative_to(unit.folder.parents[2]))
        for form in ("compact", "standard", "apart")
        if done and (unit.folder / form).is_dir()
    }
    row["predictions"] = {
        path.stem.removeprefix("predictions-"): str(path.relative_to(unit.folder.parents[2]))
        for path in sorted(unit.folder.glob("predictions-*.jsonl"))
    }
    for name, stage in (("rows", "evaluate"), ("curve", "tune")):
        if name in marks[stage]:
            row[name] = marks[stage][name]
    row["versions"], row["machine"] = end.get("versions", {}), end.get("machine", {})
    if failed and not done:
        row["error"] = failed["error"]
    return row


def _with_preset(arm: Arm) -> dict[str, Any]:
    """The settings of an arm's method, those that its preset gives among them."""
    from ffnkit import methods

    if not arm.compressed or arm.target is not None:
        return {}
    return filled(methods.get(arm.method), arm.settings)


def tuner_told(recipe: Recipe, arm: str) -> dict[str, Any]:
    """The tuner of an arm with all of its settings, those that are not given among them."""
    from ffnkit.recipe.sources import tuner_of

    tuner = tuner_of(recipe, arm)
    return {"name": tuner.name, **tuner.model_dump(mode="json", exclude={"adapter_dir", "apart_dir"})}


def _layers(report: Mapping[str, Any]) -> str:
    """Which layers were merged or dropped, in words; of several methods in one plan all of theirs."""
    inner = [_layers(each) for each in report.values() if isinstance(each, Mapping)]
    return "; ".join(filter(None, [report.get("layers", ""), *inner]))


def collect(recipe: Recipe, out: Path, metric: str) -> Results:
    """The rows of every unit of the recipe as they stand on disk."""
    latency = read_json(out / "latency.json") or {}
    rows = [row_of(recipe, unit_of(out, arm, seed), latency) for arm in recipe.arms for seed in recipe.seeds]
    failed = [row for row in rows if row["status"] == "failed"]
    return Results(out, rows, metric, tuple(recipe.arms), recipe.seeds, failed)


def plain(value: Any) -> Any:
    """``value`` in JSON's types; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(recipe: Recipe, results: Results, *, pages: bool) -> None:
    """results.json, in one piece; with ``pages`` the table and the report as well."""
    check_there(results.out)
    latency = read_json(results.out / "latency.json") or {}
    content = {
        "name": recipe.name,
        "notes": recipe.notes,
        "metric": results.metric,
        "recipe": recipe.to_dict(),
        "latency": {key: value for key, value in latency.items() if key not in {"arms", "fingerprint"}},
        "rows": results.rows,
    }
    if found := judging.found_in(recipe, results.out):
        content["judging"] = {name: value for name, value in found.items() if name != "pairs"}
    write_json(results.out / "results.json", plain(content))
    if pages and reported(results.rows):
        from ffnkit.recipe.pages import write_pages

        write_pages(recipe, results)
