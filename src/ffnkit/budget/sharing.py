"""Pairs of adjacent layers that may use one FFN, as moves beside others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ffnkit import methods
from ffnkit.budget.moves import Space
from ffnkit.calibration.batches import Batch
from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.methods.share.windows import series
from ffnkit.plans import Progress

SHARING = ("calibrated-merging", "merging")  # the first that is there
SETTINGS: dict[str, dict[str, Any]] = {"merging": {"correct": "output"}}


def shared_pairs(space: Space, data: Iterable[Batch], progress: Progress | None = None) -> None:
    """Add to a space the sharing of each pair of adjacent FFNs of one shape that its method bears.

    Pairs that overlap are drafted in two halves: each FFN is in one pair of a half.
    """
    name = next(each for each in SHARING if each in methods.names())
    batches = list(data)
    for start in (0, 1):
        pairs = [row[at : at + 2] for row in series(space.found) for at in range(start, len(row) - 1, 2)]
        for stack in dict.fromkeys(pair[0].stack for pair in pairs):
            mine = [pair for pair in pairs if pair[0].stack == stack]
            groups = [f"{stack}:{a.layer},{b.layer}" if stack else f"{a.layer},{b.layer}" for a, b in mine]
            try:
                method = methods.build(name, groups=groups, **SETTINGS.get(name, {}))
                edits = method.draft(space.model, batches if method.needs_data else None, progress).edits
            except FfnkitError:  # of unlike shapes, of experts, tied already
                continue
            for tie in (edit for edit in edits if edit.joins):
                own: tuple[Edit, ...] = tuple(edit for edit in edits if edit.target in tie.touched)
                space.add("sharing", tie.target, tie.touched, own)
