"""Seeded splits of tables: duplicates dropped, ``dev`` carved out of train, subsamples for quick runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        together: a column whose equal values stay on one side of every further cut (``Source.together``).
    """

    train: Rows
    dev: Rows
    report: Rows
    extra: Mapping[str, Rows] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()
    together: str | None = None

    def map(self, function: Callable[[Rows], Other]) -> Splits[Other]:
        """The rows of every split in another form."""
        extra = {name: function(rows) for name, rows in self.extra.items()}
        train, dev, report = (function(rows) for rows in (self.train, self.dev, self.report))
        return Splits(train, dev, report, extra, self.source, self.notes, self.together)


@dataclass(frozen=True)
class Source:
    """Rows as read and checked: labels are class ids or floats.

    Attributes:
        train: rows to train on; None where there is nothing but rows to report on.
        report: rows for the reported figure; None where they are to be carved out of train.
        extra: further labelled rows by name ("mismatched", "test"), to be reported beside.
        where: where the rows come from, in words.
        notes: what a reader of the figures must know.
        report_share: the share of train carved out where ``report`` is None.
        together: a column whose equal values stay on one side of every cut, such as the story that questions are of.
    """

    train: Table | None
    report: Table | None
    where: str
    extra: Mapping[str, Table] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    report_share: float = 0.1
    together: str | None = None


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


def carve(
    table: Table, label: str, count: int, seed: int, stratified: bool, together: str | None = None
) -> tuple[Table, Table]:
    """(rest, carved): ``count`` rows drawn with ``seed``, with the classes in their proportions if ``stratified``.

    Both keep the order of ``table``. No class loses its last row to the carved side. With ``together`` the rows of a
    value of that column go as one, until there are ``count`` or more; the last value stays.

    Raises:
        FfnkitError: all rows have one value of ``together``.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(size(table), dtype=bool)
    if together is not None:
        if len(set(table[together])) < 2:
            found = f"all {size(table)} rows have one {together}, and stay on one side"
            raise FfnkitError(f"carving out {count} rows", found, "Give more rows, or a larger limit of them")
        chosen[_whole(table[together], count, rng)] = 1
    elif stratified:
        chosen[_stratified(np.asarray(table[label]), count, rng)] = 1
    else:
        chosen[rng.permutation(size(table))[:count]] = 1
    return take(table, np.flatnonzero(~chosen)), take(table, np.flatnonzero(chosen))


def _whole(values: Sequence[Any], count: int, rng: np.random.Generator) -> list[int]:
    """Rows of whole groups of equal values, drawn until there are ``count``."""
    groups: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    drawn = [list(groups.values())[i] for i in rng.permutation(len(groups))[:-1]]
    taken: list[int] = []
    for group in drawn:
        taken += group if len(taken) < count else []
    return taken


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


def once(read: Source, same: Sequence[str], label: str, what: str) -> Source:
    """The rows with every text in train once, the first row of each; noted, with the rows whose label was another.

    Args:
        same: the columns by which rows are the same. label: a column to compare; "" for none.
    """
    if read.train is None:
        return read
    train, dropped, conflicts = distinct(read.train, same, label or same[0])
    other = f", {conflicts} of them with another label" if label else ""
    note = (f"train: {dropped} repeated {what} dropped{other}",) if dropped else ()
    return replace(read, train=train, notes=(*read.notes, *note))


def divide(
    read: Source,
    *,
    same: Sequence[str],
    asked: str,
    what: str,
    label: str,
    stratify: bool,
    seed: int = 0,
    dev: int | float | None = None,
    train_limit: int | None = None,
    dev_limit: int | None = None,
    report_limit: int | None = None,
) -> Splits[Table]:
    """The splits of rows: none of the reported ones in train, ``dev`` carved out of it, and each cut to its limit.

    Where there is nothing to train on, ``train`` and ``dev`` are empty and every row is reported. What was done is
    noted and logged.

    Args:
        read: every text in ``train`` once (:func:`once`).
        same: the columns by which rows are the same.
        asked: for error messages. what: what the rows are called ("rows", "prompts", "texts").
        label: a column of the table, and whether its classes keep their proportions (``stratify``).
        seed, dev, train_limit, dev_limit, report_limit: as of :meth:`ffnkit.tasks.classification.task.Task.splits`.

    Raises:
        FfnkitError: too few rows, a share or a limit that leaves nothing.
    """
    said = list(read.notes)
    if read.train is None:
        assert read.report is not None
        none = take(read.report, ())
        parts = {"train": (none, None), "dev": (none, None), "report": (read.report, report_limit)}
    else:
        train, report = _apart(read, same, said, asked, what, label, stratify)
        count = share(size(train), dev, f"{asked}: dev split")
        rest, carved = carve(train, label, count, seed, stratify, read.together)
        said.append(f"dev: {size(carved)} {what} carved out of train with seed {seed}")
        parts = {"train": (rest, train_limit), "dev": (carved, dev_limit), "report": (report, report_limit)}
    cut: dict[str, Table] = {}
    for name, (table, limit) in {
        **parts,
        **{name: (table, report_limit) for name, table in read.extra.items()},
    }.items():
        cut[name] = subsample(table, limit, seed, f"{asked}: limit of {name}")
        if size(cut[name]) < size(table):
            said.append(f"{name}: {size(cut[name])} of {size(table)} {what} drawn with seed {seed}")
    for note in said:
        logger.info("%s: %s", asked, note)
    first, second, third = (cut.pop(name) for name in ("train", "dev", "report"))
    return Splits(first, second, third, cut, read.where, tuple(said), read.together)


def _apart(
    read: Source, same: Sequence[str], said: list[str], asked: str, what: str, label: str, stratify: bool
) -> tuple[Table, Table]:
    """Train without what is reported; without a report it is carved out of train, the same for every seed."""
    assert read.train is not None
    train = read.train
    for name, table in {"report": read.report, **read.extra}.items():
        train, dropped = without(train, table, same) if table else (train, 0)
        if dropped:
            said.append(f"train: {dropped} {what} dropped that are in {name}")
    if size(train) < 4:
        found = f"{size(train)} training {what} are left of {size(read.train)}"
        raise FfnkitError(asked, found, f"Give more {what}, and a validation file that is not the training file")
    if read.report:
        return train, read.report
    count = share(size(train), None, f"{asked}: report split", usual=read.report_share, most=5000)
    rest, carved = carve(train, label, count, 0, stratify, read.together)
    said.append(f"report: {size(carved)} {what} carved out of train with seed 0")
    return rest, carved
