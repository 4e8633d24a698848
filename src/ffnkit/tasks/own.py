"""A task from the user's own files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.base import Source, Task
from ffnkit.tasks.files import check_columns, read
from ffnkit.tasks.metrics import check
from ffnkit.tasks.splitting import Table

_DEFAULTS = {"classification": ("accuracy", "macro_f1"), "regression": ("pearson", "spearman", "mse")}


def file_task(
    train: str | Path,
    validation: str | Path | None = None,
    *,
    text: Sequence[str],
    label: str,
    metric: str | None = None,
    name: str = "files",
    regression: bool | None = None,
    test: str | Path | None = None,
) -> Task:
    """A task from CSV, JSON-lines, JSON or parquet files, which are read and checked at once.

    Args:
        train: rows to train on; ``dev`` is carved out of them.
        validation: rows for the reported figure; by default a tenth of train is carved out, the same for every seed.
        text: the names of one or two text columns.
        label: the label's column: strings or integers are classes (sorted), fractions make it a regression.
        metric: the main metric; by default accuracy, or pearson.
        name: the task's name.
        regression: what the task is, where the labels do not say so.
        test: further labelled rows to report on, in ``Splits.extra``.

    Raises:
        FfnkitError: files that cannot be read, columns that are not there, rows without text or label, labels that
            all agree, labels that training never shows, a metric that does not fit.
    """
    text = (text,) if isinstance(text, str) else tuple(text)
    if len(text) not in (1, 2) or len({*text, label}) != len(text) + 1:
        found = f"text {', '.join(text) or 'none'} and label {label}"
        raise FfnkitError(f"task {name}", found, "Name one or two text columns, and another for the label")
    files = {"train": Path(train)}
    files |= {key: Path(path) for key, path in (("report", validation), ("test", test)) if path is not None}
    tables = {key: _rows(path, text, label) for key, path in files.items()}
    kind = _kind(tables["train"][label], regression, files["train"], label)
    names: tuple[str, ...] = ()
    for key, table in tables.items():
        if kind == "regression":
            table[label] = _numbers(table[label], files[key], label)
            if key == "train" and len(set(table[label])) < 2:
                raise FfnkitError(_where(files[key]), f"every label is {table[label][0]:g}", "Give labels that differ")
        else:
            classes = [_class_name(value) for value in table[label]]
            names = names or _classes(classes, files[key])
            table[label] = _ids(classes, names, files[key], files["train"])
    main = check(metric or _DEFAULTS[kind][0], kind, len(names))
    notes = f"{', '.join(map(str, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "a number"
    source = Source(
        train=tables["train"],
        report=tables.get("report"),
        extra={"test": tables["test"]} if "test" in tables else {},
        where=", ".join(f"{key} {path}" for key, path in files.items()),
    )
    return Task(
        name=name,
        kind=kind,
        text=text,
        label=label,
        metrics=tuple(dict.fromkeys((main, *_DEFAULTS[kind]))),
        main_metric=main,
        source=source.where,
        notes=f"label {label}: {notes}",
        label_names=tuple(str(each) for each in names),
        load=lambda _: source,
    )


def _where(path: Path) -> str:
    return f"data file {path}"


def _rows(path: Path, text: tuple[str, ...], label: str) -> Table:
    """The wanted columns of a file, every row with texts and a label."""
    table = read(path)
    check_columns(table, (*text, label), _where(path))
    for column in text:
        values = table[column]
        empty = [row for row, value in enumerate(values) if value is None or not str(value).strip()]
        other = [row for row, value in enumerate(values) if not isinstance(value, str)]
        for bad, what in ((empty, "no text"), (other, "no string")):
            if bad:
                found = f"{len(bad)} of {len(values)} rows have {what} in {column!r}, row {bad[0] + 1} first"
                raise FfnkitError(_where(path), found, "Fill or remove these rows")
    labels = table[label]
    bad = [row for row, value in enumerate(labels) if _missing(value)]
    if bad:
        found = f"{len(bad)} of {len(labels)} rows have no label in {label!r}, row {bad[0] + 1} first"
        raise FfnkitError(_where(path), found, "Fill or remove these rows")
    if any(isinstance(each, list | dict) for each in labels):
        raise FfnkitError(_where(path), f"some labels in {label!r} are lists or objects", "Give strings or numbers")
    if path.suffix.lower() in (".csv", ".tsv"):
        labels = _parsed(labels)
    return {**{column: table[column] for column in text}, label: labels}


def _missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))


def _parsed(labels: list[str]) -> list[Any]:
    """Labels of a CSV file as integers if all are, else as floats if all are, else as they stand."""
    for number in (int, float):
        try:
            return [number(each) for each in labels]
        except ValueError:
            continue
    return [each.strip() for each in labels]


def _kind(labels: list[Any], regression: bool | None, path: Path, column: str) -> str:
    if regression is None:
        regression = any(isinstance(each, float) for each in labels)
    if not regression and len(set(map(str, labels))) > max(20, len(labels) // 2):
        found = f"{len(set(map(str, labels)))} different labels in {column!r} among {len(labels)} rows"
        do = "Name the column of the classes, or ask for a regression if these are numbers"
        raise FfnkitError(_where(path), found, do)
    return "regression" if regression else "classification"


def _numbers(labels: list[Any], path: Path, column: str) -> list[float]:
    odd = [each for each in labels if not isinstance(each, int | float) or not math.isfinite(each)]
    if odd:
        found = f"{len(odd)} of {len(labels)} rows have no finite number in {column!r}, such as {odd[0]!r}"
        raise FfnkitError(_where(path), found, "Give numbers, or classes in all files")
    return [float(each) for each in labels]


def _class_name(value: Any) -> int | str:
    """An integer or a string; whole floats count as integers where the user says that they are classes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return int(value) if value.is_integer() else str(value)
    return value if isinstance(value, int) else str(value)


def _classes(labels: list[int | str], path: Path) -> tuple[Any, ...]:
    """The classes, sorted: numbers by value, names by spelling."""
    if len({type(each) for each in labels}) > 1:
        found = "some labels are numbers and some are names"
        raise FfnkitError(_where(path), found, "Write all labels the one way")
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise FfnkitError(
            _where(path), f"all {len(labels)} rows have the label {names[0]!r}", "Give two classes or more"
        )
    return names


def _ids(labels: list[int | str], names: tuple[Any, ...], path: Path, train: Path) -> list[int]:
    ids = {str(each): index for index, each in enumerate(names)}
    unknown = [each for each in labels if str(each) not in ids]
    if unknown:
        found = f"{len(unknown)} of {len(labels)} rows have a label that {train} lacks, such as {unknown[0]!r}"
        raise FfnkitError(_where(path), found, f"Use the labels {', '.join(map(str, names[:8]))}")
    return [ids[str(each)] for each in labels]
