"""A task from the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from ffnkit.errors import FfnkitError
from ffnkit.tasks.classification.labels import decide, missing
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.fields import LabelKind
from ffnkit.tasks.metrics.labelled import check
from ffnkit.tasks.rows.files import check_columns, in_words, named, read
from ffnkit.tasks.rows.splitting import Source, Table

_DEFAULTS = {"classification": ("accuracy", "macro_f1"), "regression": ("pearson", "spearman", "mse")}


def file_task(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    text: Sequence[str],
    label: str,
    metric: str | None = None,
    name: str = "files",
    label_kind: LabelKind | None = None,
    label_names: Sequence[str] = (),
    test: str | Path | None = None,
) -> Task:
    """A task from CSV, JSON-lines, JSON, parquet or Arrow files, which are read and checked at once.

    Args:
        train: rows to train on; ``dev`` is carved out of them. None: there is nothing to train on, and ``validation``
            is reported whole.
        validation: rows for the reported figure; by default a tenth of train is carved out, the same for every seed.
        text: the names of one or two text columns.
        label: the label's column: text and whole numbers are classes, fractions make it a regression
            (:func:`ffnkit.tasks.classification.labels.decide`).
        metric: the main metric; by default accuracy, or pearson.
        name: the task's name.
        label_kind: "class" or "number", where the labels do not say so.
        label_names: the classes of a model that is evaluated, where the file may lack some.
        test: further labelled rows to report on, in ``Splits.extra``.

    Raises:
        FfnkitError: files that cannot be read, columns that are not there, rows without text or label, labels that
            all agree, labels that training never shows, a metric that does not fit.
    """
    text = (text,) if isinstance(text, str) else tuple(text)
    if len(text) not in (1, 2) or len({*text, label}) != len(text) + 1:
        found = f"text {', '.join(text) or 'none'} and label {label}"
        raise FfnkitError(f"task {name}", found, "Name one or two text columns, and another for the label")
    files = named(train, validation, test, name)
    tables = {split: _rows(path, text, label) for split, path in files.items()}
    first = next(iter(files))  # the training rows, where there are some
    labels = decide(tables[first][label], _where(files[first]), label, label_kind, label_names)
    for split, table in tables.items():
        table[label] = labels.read(table[label], _where(files[split]))
    kind = "classification" if labels.names else "regression"
    main = check(metric or _DEFAULTS[kind][0], kind, len(labels.names))
    source = Source(
        train=tables.get("train"),
        report=tables.get("report"),
        extra={"test": tables["test"]} if "test" in tables else {},
        where=in_words(files),
        notes=(f"labels: {labels.told}",),
    )
    return Task(
        name=name,
        kind=kind,
        text=text,
        label=label,
        metrics=tuple(dict.fromkeys((main, *_DEFAULTS[kind]))),
        main_metric=main,
        source=source.where,
        notes=f"label {label}: {labels.told}",
        label_names=labels.names,
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
    bad = [row for row, value in enumerate(labels) if missing(value)]
    if bad:
        found = f"{len(bad)} of {len(labels)} rows have no label in {label!r}, row {bad[0] + 1} first"
        raise FfnkitError(_where(path), found, "Fill or remove these rows")
    if other := [each for each in labels if not isinstance(each, str | bool | int | float | Decimal)]:
        found = f"{len(other)} of {len(labels)} labels in {label!r} are of the kind {type(other[0]).__name__}"
        raise FfnkitError(_where(path), found, "Give strings or numbers")
    return {**{column: table[column] for column in text}, label: labels}
