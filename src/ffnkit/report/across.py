"""One table over several runs: an arm's metric on each task, and the average over the tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.report.table import VALUES, Row, Summary, summarize
from ffnkit.tasks.classification.glue import PARTS, task_score
from ffnkit.tasks.metrics import greater_is_better, greatest

AVERAGE, GLUE = "average", "glue"


@dataclass(frozen=True)
class Across:
    """Rows of several runs put together, one an arm and seed.

    Attributes:
        rows: as ``ffnkit.report.table`` has them: metrics are named "accuracy (sst2)", and "average" where the arm ran
            on every task; other figures are means over the tasks, seconds are sums.
        arms, models, tasks: in the order in which they came. metric: what is compared: the average, where there is one.
        notes: what the table needs to be read with. folders: of the runs.
    """

    rows: list[dict[str, Any]]
    arms: tuple[str, ...]
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    metric: str
    notes: tuple[str, ...]
    folders: tuple[str, ...] = ()

    def summary(self) -> Summary:
        """Means and spreads, one line an arm."""
        return summarize(self.rows, self.metric, arms=self.arms)


def across(runs: Sequence[str | Path]) -> Across:
    """Put runs together. Runs of one task are one (seeds or arms that ran apart); the first of two alike counts, and a
    note tells of the other.

    Args:
        runs: folders with a results.json, or such files.

    Raises:
        FfnkitError: a run cannot be read, one task has two metrics, or an arm and seed of it two models, nothing is
            finished.
    """
    found = [_read(Path(run)) for run in runs]
    by_task: dict[str, dict[tuple[str, Any], Row]] = {}
    metrics: dict[str, str] = {}
    origin: dict[tuple[str, str, Any], int] = {}
    doubled: dict[tuple[int, int, str], int] = {}
    for number, run in enumerate(found):
        task = _task(run)
        if metrics.setdefault(task, run["metric"]) != run["metric"]:
            what = f"{metrics[task]} and {run['metric']} are compared on {task}"
            raise FfnkitError("a table over runs", what, "Give runs of one metric for each task")
        there = by_task.setdefault(task, {})
        for row in run["rows"]:
            if row.get("status") == "done":
                first = origin.setdefault((task, row["arm"], row["seed"]), number)
                if first != number:
                    _check_model(found[first], run, f"{row['arm']} with seed {row['seed']} on {task}")
                    doubled[first, number, task] = doubled.get((first, number, task), 0) + 1
                there.setdefault((row["arm"], row["seed"]), {**row, "folder": _folder(runs[number])})
    if not any(by_task.values()):
        raise FfnkitError("a table over runs", "no row of them is finished", "Run them to their end")
    arms = tuple(dict.fromkeys(arm for run in found for arm in run["recipe"]["arms"]))
    why_not = _no_average(metrics)
    keys = dict.fromkeys(key for rows in by_task.values() for key in rows)
    rows = [_together(*key, by_task, metrics, average=not why_not) for key in keys]
    models = tuple(dict.fromkeys(str(run["recipe"]["model"]) for run in found))
    metric = named(*next(iter(metrics.items()))) if why_not else AVERAGE
    notes = [
        f"{task}: {count} of the rows of {runs[other]} are left out, for {runs[first]} has the same arms and seeds."
        for (first, other, task), count in doubled.items()
    ]
    told = (*_notes(arms, rows, metrics, why_not), *notes)
    return Across(rows, arms, models, tuple(by_task), metric, told, tuple(map(_folder, runs)))


def _folder(run: str | Path) -> str:
    return str(run if Path(run).is_dir() else Path(run).parent)


def _check_model(first: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    """Raises FfnkitError where the row of one arm and seed would hide that of another model."""
    models = [str(run["recipe"].get("model")) for run in (first, other)]
    if models[0] != models[1]:
        found = f"{what} is there of {models[0]} and of {models[1]}"
        raise FfnkitError("a table over runs", found, "Make a table for each model")


def named(task: str, metric: str) -> str:
    """The name of a task's metric in the table."""
    return f"{metric} ({task})"


def _read(run: Path) -> dict[str, Any]:
    path = run if run.is_file() else run / "results.json"
    asked = f"run '{run}'"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FfnkitError(asked, f"its results.json cannot be read ({error})", "Name a folder of a run") from None
    wanted = {"rows": list, "recipe": dict, "metric": str}
    if not isinstance(content, dict) or any(not isinstance(content.get(k), kind) for k, kind in wanted.items()):
        raise FfnkitError(asked, "its results.json is none of a run", "Name a folder of a run")
    return content


def _task(run: Mapping[str, Any]) -> str:
    task = run["recipe"].get("task") or {}
    return str((task.get("name") if isinstance(task, Mapping) else task) or run["recipe"].get("name"))


def _no_average(metrics: Mapping[str, str]) -> str:
    """Why tasks have no average, "" where they have one."""
    if len(metrics) < 2:
        return "there is one task"
    ends: dict[float, str] = {}
    for task, metric in metrics.items() if len(set(metrics.values())) > 1 else ():
        if not greater_is_better(metric):
            return f"less is better of {named(task, metric)}, and other metrics are beside it"
        if (end := greatest(metric)) is None:
            return f"{named(task, metric)} has no greatest value, and other metrics are beside it"
        ends.setdefault(end, named(task, metric))
    scales = [f"{name} goes up to {end:g}" for end, name in ends.items()]
    return " and ".join(scales) if len(scales) > 1 else ""


def _together(
    arm: str,
    seed: Any,
    by_task: Mapping[str, Mapping[tuple[str, Any], Row]],
    metrics: Mapping[str, str],
    *,
    average: bool,
) -> dict[str, Any]:
    mine = {task: rows[arm, seed] for task, rows in by_task.items() if (arm, seed) in rows}
    row: dict[str, Any] = {"arm": arm, "seed": seed, "tasks": sorted(mine), "metrics": {}}
    for key in ("metrics", "metrics_before"):
        found = {task: (each.get(key) or {}).get(metrics[task]) for task, each in mine.items()}
        scores = {
            task: value for task, value in found.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        if average and len(scores) == len(by_task):
            row[key] = {AVERAGE: math.fsum(scores.values()) / len(scores)}
        if len(by_task) > 1 and len(mine) == len(by_task) and by_task.keys() <= PARTS.keys():
            parts = [task_score(task, each.get(key) or {}) for task, each in mine.items()]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                row[key] = row.get(key, {}) | {GLUE: math.fsum(known) / len(known)}
        if scores:
            row[key] = row.get(key, {}) | {named(task, metrics[task]): value for task, value in scores.items()}
    layers = {task: each["layers"] for task, each in mine.items() if each.get("layers")}
    if layers:  # of each task, where they are not the same on all
        same = len(set(layers.values())) == 1
        row["layers"] = next(iter(layers.values())) if same else "; ".join(f"{t}: {v}" for t, v in layers.items())
    first = next(iter(mine.values()), {})
    row |= {key: first[key] for key in ("settings", "tuner") if first.get(key)}
    for key in ("checkpoints", "predictions"):
        paths = {
            f"{name} ({task})": f"{each['folder']}/{path}"
            for task, each in mine.items()
            for name, path in (each.get(key) or {}).items()
        }
        row |= {key: paths} if paths else {}
    for key in VALUES:
        if values := _measured(each.get(key) for each in mine.values()):
            row[key] = math.fsum(values) / len(values)
    stages = dict.fromkeys(stage for each in mine.values() for stage in each.get("seconds") or {})
    row["seconds"] = {s: math.fsum((each.get("seconds") or {}).get(s, 0.0) for each in mine.values()) for s in stages}
    return row


def _measured(values: Iterable[Any]) -> list[float]:
    return [value for value in values if isinstance(value, int | float) and math.isfinite(value)]


def _notes(arms: Sequence[str], rows: Sequence[Row], metrics: Mapping[str, str], why_not: str) -> tuple[str, ...]:
    notes = [f"No average: {why_not}."] if why_not else ["The average is over the tasks, seed by seed."]
    if any(GLUE in row["metrics"] for row in rows):
        several = [task for task in metrics if len(PARTS[task]) > 1]
        each = f"; of {', '.join(several)} the mean of its metrics" if several else ""
        notes.append(f"glue: the benchmark's score, over {len(metrics)} of its {len(PARTS)} tasks{each}.")
    for arm in arms:
        there = {task for row in rows if row["arm"] == arm for task in row["tasks"]}
        if there and (missing := [task for task in metrics if task not in there]):
            notes.append(f"{arm}: no average, for it was not run on {', '.join(missing)}.")
    notes.append("Sizes, speeds and memory are means over the tasks that an arm ran on; times are sums.")
    return tuple(notes)
