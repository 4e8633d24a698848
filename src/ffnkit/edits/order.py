"""How edits go together: the normal form of a plan.

One place is edited once at each stage, and stages follow each other: layers go, then experts, heads and neurons; what
is left is scaled, shared, factored and masked; updates train on that. What comes twice, or the other way round, is two
plans: the second is made for the model that the first one leaves.
"""

from __future__ import annotations

from collections.abc import Iterable

from ffnkit.edits.base import Edit, Stage
from ffnkit.errors import FfnkitError


def check_normal(edits: Iterable[Edit]) -> None:
    """Raises FfnkitError where a place is edited twice at one stage, or at an earlier stage than before."""
    seen: dict[str, list[tuple[str, Edit]]] = {}
    for edit in edits:
        if edit.stage is Stage.TRAIN:  # of several methods, each with what trains beside its updates
            continue
        site = str(getattr(edit, "site", ""))  # "": all of the place
        for name in edit.claimed or (edit.target,):
            for other, before in seen.setdefault(name, []):
                same = before.stage == edit.stage and (site == other or not site or not other)
                if same and not edit.repeats:
                    raise FfnkitError(edit.asked, "the plan does so twice", "Apply one plan, then plan again")
                if before.stage > edit.stage:
                    what = f"the plan has {before.asked} before it"
                    raise FfnkitError(edit.asked, what, "Apply that plan, then plan this")
            seen[name].append((site, edit))
