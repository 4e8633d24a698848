"""Seeded splits of tables: duplicates dropped, ``dev`` carved out of train, subsamples for quick runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ffnkit.errors import FfnkitError

Table = dict[str, list[Any]]
"""Columns by name, all of one length; labels are class ids or floats."""


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
