"""The nine GLUE tasks, from a folder of JSON-lines files or from the hub.

Source: Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding, 2019.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.rows.files import check_columns, read
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Source, Table, size

HUB = "nyu-mll/glue"
_FILES = ("train.jsonl", "validation.jsonl")
RANGE = (0.0, 5.0)
"""Of the similarities of stsb."""


def _task(name: str, text: tuple[str, ...], labels: tuple[str, ...], metrics: tuple[str, ...], notes: str) -> Task:
    return Task(
        name=name,
        kind="classification" if labels else "regression",
        text=text,
        label="label",
        metrics=metrics,
        main_metric=metrics[0],
        source=f"GLUE: <data folder>/{name}, else {HUB} on the hub",
        notes=notes,
        label_names=labels,
        hub=(HUB, name),
        load=functools.partial(_load, name, text, labels),
    )


def _load(name: str, text: tuple[str, ...], labels: tuple[str, ...], data_dir: Path | None) -> Source:
    """The rows of a task: ``data_dir``, else FFNKIT_DATA, else the hub."""
    check = functools.partial(_checked, name=name, text=text, labels=labels)
    folder = data_folder(name, data_dir, _FILES)
    return _from_folder(name, folder, check) if folder else _from_hub(name, check)


def _from_folder(name: str, folder: Path, check: Any) -> Source:
    report = next((path for end in ("", "_matched") if (path := folder / f"validation{end}.jsonl").is_file()), None)
    if report is None:
        raise FfnkitError(f"data of task {name}", f"{folder} has no validation.jsonl", "Put the official one there")
    mismatched = folder / "validation_mismatched.jsonl"
    return Source(
        train=check(read(folder / "train.jsonl"), where=str(folder / "train.jsonl")),
        report=check(read(report), where=str(report)),
        extra={"mismatched": check(read(mismatched), where=str(mismatched))} if mismatched.is_file() else {},
        where=f"folder {folder}",
        notes=_NOTES.get(name, ()),
    )


def _from_hub(name: str, check: Any) -> Source:
    loaded = from_hub(name, (HUB, name), _FILES)
    tables = {
        split: check(dict(rows.to_dict()), where=f"{HUB} {name}/{split}")
        for split, rows in loaded.items()
        if not split.startswith("test")
    }
    return Source(
        train=tables["train"],
        report=tables["validation_matched" if "validation_matched" in tables else "validation"],
        extra={"mismatched": tables["validation_mismatched"]} if "validation_mismatched" in tables else {},
        where=f"hub {HUB}, {name}",
        notes=_NOTES.get(name, ()),
    )


def _checked(table: Table, *, where: str, name: str, text: tuple[str, ...], labels: tuple[str, ...]) -> Table:
    """The columns of the task, once every row has texts and a label of the label set."""
    check_columns(table, (*text, "label"), where)
    if not size(table):
        raise FfnkitError(where, "it has no rows", f"Give the official rows of {name}")
    for column in text:
        bad = [row for row, value in enumerate(table[column]) if not isinstance(value, str)]
        if bad:
            found = f"{len(bad)} of {size(table)} rows have no text in {column!r}, row {bad[0] + 1} first"
            raise FfnkitError(where, found, "Give every row a string there")
    return {**{column: table[column] for column in text}, "label": _labels(table["label"], labels, where)}


def _labels(values: list[Any], labels: tuple[str, ...], where: str) -> list[Any]:
    """Class ids, or the scores of stsb as floats."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    unlabelled = sum(value is None or value == -1 for value in values)
    if unlabelled:
        found = f"{unlabelled} of {len(values)} rows have no label (-1 or null)"
        do = "Give labelled rows; of GLUE's test rows, which have none, ffnkit eval --split test writes predictions"
        raise FfnkitError(where, found, do)
    if labels:
        wanted, bad = f"0 to {len(labels) - 1}", [v for v in values if v not in range(len(labels)) or v is True]
    else:
        wanted, bad = f"{RANGE[0]:g} to {RANGE[1]:g}", [v for v in numbers if not RANGE[0] <= v <= RANGE[1]]
    if bad or len(numbers) < len(values):
        odd = bad or [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
        found = f"{len(odd)} of {len(values)} rows have a label outside {wanted}, such as {odd[0]!r}"
        raise FfnkitError(where, found, "Use the labels of the hub's data set")
    return [int(value) if labels else float(value) for value in values]


_NOTES: dict[str, tuple[str, ...]] = {
    "sst2": ("train holds phrases cut from sentences, dev too: figures on dev come out higher than on report",),
    "wnli": ("report is adversarial to train: most models do worse than the majority class, 0.563",),
}

TASKS: tuple[Task, ...] = (
    _task(
        "cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"), "is the sentence grammatical?"
    ),
    _task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), "sentiment of a film review's sentence"),
    _task(
        "mrpc",
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        "are the two news sentences paraphrases?",
    ),
    _task(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        "do the two questions ask the same?",
    ),
    _task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman"), "similarity of two sentences, 0 to 5"),
    _task(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        "does the premise entail the hypothesis? report: matched genres; mismatched ones beside",
    ),
    _task(
        "qnli",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        ("accuracy",),
        "does the sentence answer the question?",
    ),
    _task(
        "rte",
        ("sentence1", "sentence2"),
        ("entailment", "not_entailment"),
        ("accuracy",),
        "does the first sentence entail the second?",
    ),
    _task(
        "wnli",
        ("sentence1", "sentence2"),
        ("not_entailment", "entailment"),
        ("accuracy",),
        "is the second sentence, with the pronoun replaced, entailed?",
    ),
)

PARTS: dict[str, tuple[str, ...]] = {
    **{task.name: task.metrics[:1] for task in TASKS},
    **{task.name: task.metrics for task in TASKS if task.name in ("mrpc", "qqp", "stsb")},
    "mnli": ("accuracy", "accuracy (mismatched)"),
}
"""By task the metrics whose mean is its score in the benchmark."""


def task_score(task: str, metrics: Mapping[str, float]) -> float | None:
    """A task's score in the benchmark: the mean of its metrics, of mnli of its two accuracies.

    None where a metric is missing, but for mnli's mismatched rows, which some data lack.
    """
    values = [metrics.get(name) for name in PARTS[task] if name in metrics or "(" not in name]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def benchmark_score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """GLUE's score over tasks, each by :func:`task_score`, all of one weight; of nine it is the benchmark's own.

    Args:
        metrics: by task its metrics by name, shares and coefficients, such as {"cola": {"matthews": 0.6}}.

    Raises:
        FfnkitError: none or another task, or one without its metrics.
    """
    asked = "GLUE's score"
    for task in metrics:
        if task not in PARTS:
            raise FfnkitError(asked, f"{task} is no task of it", f"Choose among {', '.join(PARTS)}")
    scores = {task: task_score(task, found) for task, found in metrics.items()}
    lost = [task for task, value in scores.items() if value is None]
    if lost or not scores:
        found = f"{lost[0]} has not {' and '.join(PARTS[lost[0]])}" if lost else "there is no task"
        raise FfnkitError(asked, found, "Measure them first")
    return math.fsum(value for value in scores.values() if value is not None) / len(scores)
