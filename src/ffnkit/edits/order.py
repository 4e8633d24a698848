"""How edits go together: the normal form of a plan.

One place is edited once at each stage, and stages follow each other: layers go, then experts, heads and neurons; what
is left is scaled, shared, factored and masked; updates train on that. What comes twice, or the other way round, is two
plans: the second is made for the model that the first one leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ffnkit.edits.base import Edit, Stage
from ffnkit.errors import FfnkitError

Slot = tuple[str, str]


def slots(edit: Edit) -> Iterator[Slot]:
    """The places that an edit is about: (path, site), the site "" where it is about all of it."""
    site = str(getattr(edit, "site", ""))
    for name in edit.claimed or (edit.target,):
        yield name, site


def check_normal(edits: Iterable[Edit]) -> None:
    """Raises FfnkitError where a place is edited twice at one stage, or at an earlier stage than before."""
    seen: dict[Slot, Edit] = {}
    for edit in edits:
        if edit.stage is Stage.TRAIN:  # of several methods, each with what trains beside its updates
            continue
        for slot in slots(edit):
            before = seen.get(slot)
            if before is not None and before.stage == edit.stage:
                raise FfnkitError(edit.asked, "the plan does so twice", "Apply one plan, then plan again")
            if before is not None and before.stage > edit.stage:
                what = f"the plan has {before.asked} before it"
                raise FfnkitError(edit.asked, what, "Apply that plan, then plan this")
            seen[slot] = edit


def sort_key(edit: Edit) -> int:
    """By which edits of several plans are sorted into one; those of one stage keep their order."""
    return int(edit.stage)
