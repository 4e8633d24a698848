"""What may be proposed: budgets and mixtures of methods, as plans one after the other; what a model costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import ffnkit
from ffnkit.budget.allocation import narrowing_costs
from ffnkit.budget.targets import Target
from ffnkit.methods.drop.heads import RemoveHeads
from ffnkit.methods.drop.layers import FfnDrop, LayerDrop
from ffnkit.methods.narrow.calibrated import CalibratedFusion
from ffnkit.methods.share.calibrated import CalibratedMerging
from ffnkit.model.finding import ffns
from ffnkit.report.measure import ffn_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from ffnkit.calibration.stored import StatisticsFile
    from ffnkit.search.settings import How, Objective, SearchSettings

STEPS = 20  # shares are multiples of 1 / STEPS
HEADS = (0.25, 0.5)
WORDS = {
    "width": "one width",
    "widths": "widths by layer",
    "fit": "all that can go",
    "layers": "layers dropped",
    "ffns": "FFNs dropped",
    "shared": "FFNs shared",
    "heads": "heads removed",
}


@dataclass(frozen=True)
class Candidate:
    """A way to make the model smaller.

    Attributes:
        how: the method beside narrowing. share: of the FFNs' neurons that stay, of "fit" of the objective; 1: all.
        number: layers or FFNs that go, pairs that share. heads: the share of heads that goes.
    """

    how: How
    share: float
    number: int = 0
    heads: float = 0.0

    def __str__(self) -> str:
        parts = [WORDS[self.how]]
        parts += [str(self.number)] if self.number else []
        parts += [f"{self.heads:.0%}"] if self.heads else []
        return " ".join(parts) + (f", {self.share:.0%} left" if self.share < 1 else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def proposed(trial: Any, settings: SearchSettings, layers: int) -> Candidate:
    """What an Optuna trial asks for."""
    how = trial.suggest_categorical("how", list(settings.methods))
    whole = how in ("layers", "ffns", "shared", "heads")  # beside which no neuron need go
    least = min(max(1, round(settings.least * STEPS)), STEPS - 1)
    share = trial.suggest_int(f"share of {how}", least, STEPS if whole else STEPS - 1) / STEPS
    number = trial.suggest_int(f"number of {how}", 1, max(1, layers // 2)) if how in ("layers", "ffns", "shared") else 0
    heads = trial.suggest_categorical("heads", list(HEADS)) if how == "heads" else 0.0
    return Candidate(how, share, number, heads)


def first_ones(settings: SearchSettings, layers: int) -> list[dict[str, Any]]:
    """Parameters of trials that come first: each way at three quarters, then at half."""
    least = min(max(1, round(settings.least * STEPS)), STEPS - 1)
    found = []
    for share, number in ((3 * STEPS // 4, 1), (STEPS // 2, 2)):
        for how in settings.methods:
            given: dict[str, Any] = {"how": how, f"share of {how}": max(least, share)}
            given |= (
                {f"number of {how}": min(number, max(1, layers // 2))} if how in ("layers", "ffns", "shared") else {}
            )
            found.append(given | ({"heads": HEADS[0]} if how == "heads" else {}))
    return found


def apply_to(
    model: Any,
    candidate: Candidate,
    objective: Objective,
    statistics: StatisticsFile,
    batches: Sequence[Any],
    seed: int,
    costs: Callable[[], Mapping[str, Tensor]] | None = None,
) -> list[Any]:
    """Make the model, in place, what the candidate says; the plans come back, in order.

    Neurons go first: for them the statistics were taken. What else goes sees the narrow model.

    Args:
        costs: gives the model's :func:`.narrowing_costs`, where widths by layer are asked for; None: they are measured.
    """
    plans = []
    share = candidate.share
    if candidate.how == "fit":
        kind = "flops" if objective == "latency" else objective
        plans.append(ffnkit.plan(model, ffnkit.FitTo(**cast(Any, {kind: share})), data=batches))
        return [_applied(model, plan) for plan in plans]
    if share < 1:
        width: Any = share
        if candidate.how != "width" and candidate.how != "shared":  # shared ones have one width
            known = costs() if costs is not None else narrowing_costs(model, statistics)
            width = ffnkit.allocate(model, share, costs=known)
        method = CalibratedFusion(width=width, effort="fast", seed=seed)
        plans.append(_applied(model, ffnkit.plan(model, method, data=statistics)))
    others: dict[str, Any] = {
        "layers": lambda: LayerDrop(window=candidate.number),
        "ffns": lambda: FfnDrop(window=candidate.number),
        "shared": lambda: CalibratedMerging(window=candidate.number + 1, refine=100, seed=seed),
        "heads": lambda: RemoveHeads(remove=candidate.heads, by="activation", refit=True),
    }
    if candidate.how in others:
        _ready(model, plans)
        plans.append(_applied(model, ffnkit.plan(model, others[candidate.how](), data=batches)))
    return plans


def apply_plans(model: Any, plans: Sequence[Any]) -> None:
    """Make the model what :func:`apply_to` made it, of the plans that this gave."""
    for number, plan in enumerate(plans):
        _ready(model, plans[:number])
        _applied(model, plan)


def _ready(model: Any, before: Sequence[Any]) -> None:
    """Factors that an earlier plan keeps apart go into the weights: what else goes wants plain ones."""
    if before:
        ffnkit.fold(model)


def _applied(model: Any, plan: Any) -> Any:
    ffnkit.apply(model, plan)
    return plan


def costs(model: Any) -> dict[str, int]:
    """What a model takes, counted: parameters, those of FFNs, FLOPs a token, bytes of the compact file."""
    kinds: tuple[Any, ...] = ("params", "flops", "bytes")
    return {kind: Target(kind, 0.5).count(model) for kind in kinds} | {"ffn_params": ffn_parameters(model)}


def depth(model: Any) -> int:
    """Layers that have an FFN, of the longest stack."""
    stacks: dict[str | None, set[int]] = {}
    for ffn in ffns(model):
        stacks.setdefault(ffn.stack, set()).add(ffn.layer)
    return max(map(len, stacks.values()))
