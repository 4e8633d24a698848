"""Two models that are compared, though only one of them need exist: a plan put in place and taken out again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ffnkit.edits import Stage
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.plans import Plan
from ffnkit.surgery.temporary import TemporaryPlan

SINGLE = (Stage.NEURONS, Stage.SCALE, Stage.LOW_RANK, Stage.MASK)  # stages of edits of one FFN


def temporary_plan(model: nn.Module, plan: Plan, *, fold: bool = False) -> TemporaryPlan:
    """A temporarily applied plan, to be compared with the model that it was made for.

    Raises:
        FfnkitError: the plan was made for another model, or joins FFNs or drops layers.
    """
    plan.check_fits({ffn.name: ffn for ffn in ffns(model)}, type(model).__name__)
    odd = next((edit.kind for edit in plan.edits if edit.stage not in SINGLE), None)
    if odd is not None:
        found = f"its edits of kind {odd} join or drop FFNs, so there are no two to compare"
        raise FfnkitError(f"analysing {plan.method}", found, "Leave this method out")
    return TemporaryPlan(model, plan.edits, fold=fold)


class Reference:
    """A second model in the place of a temporarily applied plan: a compressed checkpoint, tuned or not.

    Raises:
        FfnkitError: its FFNs have other names or another d than those of ``model``.
    """

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        own = {ffn.name: ffn.d for ffn in ffns(model)}
        self.model = other
        self.found = {ffn.name: ffn for ffn in ffns(other)}
        self.edited = tuple(self.found)
        theirs = {name: ffn.d for name, ffn in self.found.items()}
        if theirs != own:
            odd = next(iter(dict.fromkeys(name for name in [*own, *theirs] if own.get(name) != theirs.get(name))))
            found = f"{odd} is not the same block in both ({own.get(odd)} and {theirs.get(odd)} wide, None: not there)"
            do = "Compare a model with its own compressed checkpoint, opened as the same class"
            raise FfnkitError(f"comparing {type(model).__name__} with {type(other).__name__}", found, do)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


Other = TemporaryPlan | Reference
