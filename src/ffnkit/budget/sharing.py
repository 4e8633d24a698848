"""Runs of adjacent layers that may use one FFN, as moves beside others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from ffnkit.budget.losses import Losses, joined, spread
from ffnkit.budget.moves import Choice, Space
from ffnkit.calibration.batches import Batch
from ffnkit.calibration.drift import apart
from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.methods.share.calibrated import CalibratedMerging
from ffnkit.methods.share.fitting import Fitting
from ffnkit.methods.share.windows import series
from ffnkit.model.ffn import FFN

TOKENS = 2048  # to which runs are fitted before any of them is taken
TRIES = 4  # runs of one length that are fitted and measured, the most promising ones
HOPELESS = 3.0  # times what as much costs otherwise: runs of this rate are not made longer, nor more of them tried
METHOD = CalibratedMerging(layers="all")

Run = tuple[str, ...]


def shared_runs(space: Space, losses: Losses, data: Iterable[Batch], rate: float) -> None:
    """Add to a space the sharing of runs of adjacent FFNs, with the loss of each alone.

    Of each length those are fitted, without a regression, and measured whose members the model can best do without;
    longer runs grow from those that lose little. So all runs of a model of few layers compete, and few of one of many.

    Args:
        losses: :meth:`~ffnkit.budget.losses.Losses.foresee` is done. rate: the loss for one of the target where it is
            kept otherwise.
    """
    rows = [{ffn.name: ffn for ffn in row} for row in series(space.found)]
    pairs: list[Run] = [pair for row in rows for pair in itertools.pairwise(row)]
    runs = [pair for pair in pairs if _bears(space, pair)]
    if not runs:
        return
    members = [space.ffn(name) for name in dict.fromkeys(name for run in runs for name in run)]
    alone = losses.without(members)
    fit, held = apart(joined(spread(list(data), TOKENS)))
    fitting = Fitting(space.model, members, fit, held, TOKENS)
    best = float("inf")
    done = set(runs)
    while runs:
        grown: list[Run] = []
        for number, run in enumerate(sorted(runs, key=lambda run: _rank(run, alone))):
            if number >= TRIES or (number >= TRIES // 2 and best > HOPELESS * rate):
                break
            group = [space.ffn(name) for name in run]
            joint = space.add("sharing", run[0], run, tuple(_fitted(fitting, group, 0)))
            joint.alone = losses.together((joint,))
            best = min(best, found := joint.alone / max(joint.saving, 1e-12))
            if found <= HOPELESS * rate and joint.saving < space.whole - space.limit:  # else it keeps the target alone
                grown.append(run)
        longer = [more for run in grown for row in rows if run[0] in row for more in _longer(run, list(row))]
        runs = [run for run in dict.fromkeys(longer) if run not in done and _bears(space, run)]
        done |= set(runs)


def regressed(losses: Losses, choice: Choice) -> Choice:
    """A choice with its shared FFNs fitted to all of the data, by regression too."""
    shared = {each.name: [losses.space.ffn(n) for n in each.covers] for each in choice.joint if each.kind == "sharing"}
    fit, held = apart(losses.fitted)
    fitting = Fitting(losses.model, [ffn for group in shared.values() for ffn in group], fit, held, METHOD.tokens)
    joint = tuple(
        dataclasses.replace(each, edits=tuple(_fitted(fitting, shared[each.name], METHOD.refine)))
        if each.kind == "sharing"
        else each
        for each in choice.joint
    )
    return Choice(joint, choice.kept)


def _fitted(fitting: Fitting, group: Sequence[FFN], refine: int) -> list[Edit]:
    found = fitting.of(group, refine=refine, ridge=METHOD.ridge, extras=METHOD.extras, rank=METHOD.extra_rank)
    return sorted(found.edits(group, METHOD.extras), key=lambda edit: edit.stage)


def _bears(space: Space, run: Run) -> bool:
    """Whether FFNs may share: of one shape, no experts, and not shared already."""
    group = [space.ffn(name) for name in run]
    try:
        METHOD.fitting([group])
    except FfnkitError:
        return False
    return True


def _longer(run: Run, row: list[str]) -> list[Run]:
    """The run with the layer before it, and with the one behind it."""
    at, end = row.index(run[0]), row.index(run[-1]) + 1
    return [*((name, *run) for name in row[max(at - 1, 0) : at]), *((*run, name) for name in row[end : end + 1])]


def _rank(run: Run, alone: Mapping[str, float]) -> float:
    """What a run may cost for what it saves: all but the member that is hardest to do without."""
    return sum(sorted(alone[name] for name in run)[:-1])
