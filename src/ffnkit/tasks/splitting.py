"""Seeded splits of tables: duplicates dropped, ``dev`` carved out of train, subsamples for quick runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from ffnkit.errors import FfnkitError

logger = logging.getLogger(__name__)

Table = dict[str, list[Any]]
"""Columns by name, all of one length; labels are class ids or floats."""

Rows = TypeVar("Rows")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Splits(Generic[Rows]):
    """Rows of a task, in one form or another: tables as read, datasets for a model.

    No text of ``report`` or ``extra`` is in ``train`` or ``dev``, and none of ``dev`` in ``train``.

    Attributes:
        train: to train on.
        dev: out of the training rows, to choose settings and checkpoints.
        report: for the reported figure, and for nothing else.
        extra: further rows to report on, by name ("mismatched", "test").
        source: where the rows come from.
        notes: what was dropped and carved, and what a reader of the figures must know.
    """

    train: Rows
    dev: Rows
    report: Rows
    extra: Mapping[str, Rows] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()

    def map(self, function: Callable[[Rows], Other]) -> Splits[Other]:
        """The rows of every split in another form."""
        extra = {name: function(rows) for name, rows in self.extra.items()}
        train, dev, report = (function(rows) for rows in (self.train, self.dev, self.report))
        return Splits(train, dev, report, extra, self.source, self.notes)


def size(table: Table) -> int:
    """The number of rows."""
    return len(next(iter(table.values()), []))


def take(table: Table, rows: Sequence[int] | np.ndarray) -> Table:
    """The given rows, in the given order."""
    picked = [int(row) for row in rows]
    return {name: [column[row] for row in picked] for name, column in table.items()}


def texts(table: Table, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The text of each row, by which rows count as duplicates: differences in white space do not."""
    cleaned = [[" ".join(text.split()) for text in table[column]] for column in columns]
    return list(zip(*cleaned, strict=True))


def distinct(table: Table, columns: Sequence[str], label: str) -> tuple[Table, int, int]:
    """The first row of each text, the number of rows dropped, and how many of these had another label."""
    first: dict[tuple[str, ...], int] = {}
    conflicts = 0
    labels = table[label]
    for row, text in enumerate(texts(table, columns)):
        conflicts += labels[first.setdefault(text, row)] != labels[row]
    dropped = size(table) - len(first)
    return (take(table, list(first.values())) if dropped else table), dropped, conflicts


def without(table: Table, other: Table, columns: Sequence[str]) -> tuple[Table, int]:
    """The rows whose text does not occur in ``other``, and the number of rows dropped."""
    known = set(texts(other, columns))
    kept = [row for row, text in enumerate(texts(table, columns)) if text not in known]
    dropped = size(table) - len(kept)
    return (take(table, kept) if dropped else table), dropped


def share(rows: int, wanted: int | float | None, asked: str, usual: float = 0.05, most: int = 1000) -> int:
    """How many of ``rows`` to carve out.

    Args:
        wanted: a number of rows, a share below 1, or None for ``usual`` of the rows, at least 64 where these are no
            more than a quarter, and at most ``most``.
        asked: for the error message.

    Raises:
        FfnkitError: nothing would be left on one of the two sides.
    """
    if wanted is None:
        count = min(max(round(usual * rows), min(64, rows // 4), 1), most)
    else:
        count = round(wanted * rows) if isinstance(wanted, float) else wanted
    if not 1 <= count < rows:
        found = f"{wanted if wanted is not None else count} of {rows} training rows"
        raise FfnkitError(asked, found, "Ask for a share between 0 and 1, or for fewer rows than there are")
    return count


def carve(table: Table, label: str, count: int, seed: int, stratified: bool) -> tuple[Table, Table]:
    """(rest, carved): ``count`` rows drawn with ``seed``, with the classes in their proportions if ``stratified``.

    Both keep the order of ``table``. No class loses its last row to the carved side.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(size(table), dtype=bool)
    chosen[
        _stratified(np.asarray(table[label]), count, rng) if stratified else rng.permutation(size(table))[:count]
    ] = 1
    return take(table, np.flatnonzero(~chosen)), take(table, np.flatnonzero(chosen))


def _stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a stratified draw: proportions by largest remainder, at most all but one row of a class."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    quota = np.minimum(np.floor(exact).astype(int), sizes - 1)
    room = sizes - 1
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    while quota.sum() < min(count, room.sum()):
        for which in order:
            if quota[which] < room[which] and quota.sum() < count:
                quota[which] += 1
    picks = [rng.permutation(np.flatnonzero(labels == each))[:n] for each, n in zip(classes, quota, strict=True)]
    return np.concatenate(picks)


def subsample(table: Table, limit: int | None, seed: int, asked: str) -> Table:
    """At most ``limit`` rows drawn with ``seed``, in their order; a larger limit contains a smaller one's rows."""
    if limit is None:
        return table
    if limit < 1:
        raise FfnkitError(asked, f"{limit} rows", "Ask for at least one row, or leave the limit out")
    if limit >= size(table):
        return table
    return take(table, np.sort(np.random.default_rng(seed).permutation(size(table))[:limit]))


def check_enough(train: Table, rows: int, asked: str, what: str) -> None:
    """Raises FfnkitError where fewer than 4 of ``rows`` training rows are left once repeated ones are dropped."""
    if size(train) < 4:
        found = f"{size(train)} training {what} are left of {rows}"
        raise FfnkitError(asked, found, f"Give more {what}, and a validation file that is not the training file")


def with_report(
    train: Table,
    report: Table | None,
    notes: list[str],
    *,
    asked: str,
    what: str,
    label: str,
    usual: float,
    stratify: bool,
) -> tuple[Table, Table]:
    """Train and report; where there is none it is carved out of train, the same for every seed, and noted."""
    if report:
        return train, report
    count = share(size(train), None, f"{asked}: report split", usual=usual, most=5000)
    notes.append(f"report: {count} {what} carved out of train with seed 0")
    return carve(train, label, count, 0, stratify)


def divide(
    train: Table,
    report: Table,
    extra: Mapping[str, Table],
    *,
    asked: str,
    what: str,
    label: str,
    stratify: bool,
    where: str,
    notes: Sequence[str],
    seed: int = 0,
    dev: int | float | None = None,
    train_limit: int | None = None,
    dev_limit: int | None = None,
    report_limit: int | None = None,
) -> Splits[Table]:
    """``dev`` carved out of train, and every part cut to its limit; what was done is noted and logged.

    Args:
        asked: for error messages. what: what the rows are called ("rows", "prompts", "texts").
        label: a column of the table, and whether its classes keep their proportions (``stratify``).
        seed, dev, train_limit, dev_limit, report_limit: as of :meth:`ffnkit.tasks.base.Task.splits`.

    Raises:
        FfnkitError: a share or a limit that leaves nothing.
    """
    said = list(notes)
    count = share(size(train), dev, f"{asked}: dev split")
    rest, carved = carve(train, label, count, seed, stratify)
    said.append(f"dev: {size(carved)} {what} carved out of train with seed {seed}")
    limits = {"train": (rest, train_limit), "dev": (carved, dev_limit), "report": (report, report_limit)}
    limits |= {name: (table, report_limit) for name, table in extra.items()}
    parts: dict[str, Table] = {}
    for name, (table, limit) in limits.items():
        parts[name] = subsample(table, limit, seed, f"{asked}: limit of {name}")
        if size(parts[name]) < size(table):
            said.append(f"{name}: {size(parts[name])} of {size(table)} {what} drawn with seed {seed}")
    for note in said:
        logger.info("%s: %s", asked, note)
    first, second, third = (parts.pop(name) for name in ("train", "dev", "report"))
    return Splits(first, second, third, parts, where, tuple(said))
