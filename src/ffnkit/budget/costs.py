"""What each FFN's narrowing costs at every width: measured on data, or guessed from the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ffnkit.budget.probe import Ending
from ffnkit.budget.sizes import Room
from ffnkit.calibration.batches import Batch
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.reading import output_metric
from ffnkit.calibration.statistics import Statistics
from ffnkit.calibration.stored import StatisticsFile, first_batches
from ffnkit.methods.common import lifted, norms, singles
from ffnkit.methods.narrow.observed import Part, observing
from ffnkit.model.ffn import FFN
from ffnkit.ops.curves import Curve, output_curve, tail_curve
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.ops.refit import refit
from ffnkit.ops.subset import weighed
from ffnkit.plans import Progress, check_weights

RIDGE = 1e-2  # as data-aware fusion has it unless told otherwise


def from_weights(room: Room, progress: Progress | None = None) -> list[Tensor]:
    """For each FFN (ff + 1,) the share of its neurons' norms, ||up|| ||down|| (||gate||), that goes at each width.

    The norm is what the magnitude baseline ranks by. Experts in one parameter: the mean of their shares.
    """
    costs = []
    for number, ffn in enumerate(room.found):
        sizes = norms(lifted(ffn.raw()))
        curves = [tail_curve(row) for row in (sizes if ffn.experts else sizes[None])]
        costs.append(torch.stack([c.lost / c.lost[0].clamp_min(1e-300) for c in curves]).mean(0))
        if progress is not None:
            progress(number + 1, len(room.found), ffn.name)
    return costs


@torch.no_grad()
def from_data(room: Room, blockwise: Blockwise, progress: Progress | None = None) -> list[Tensor]:
    """For each FFN (ff + 1,) how far its narrowing to each width moves the end of the model.

    The curve's form is the squared error of the FFN's output on the data, as its reader weighs it, neurons chosen
    greedily and the output layer refitted (``ops.curves``). Its scale is measured: FFNs of one block are narrowed to
    the budget's share, and what becomes of it at the end of the model (``Ending``) is theirs in proportion to their
    errors. Errors of single FFNs say little by themselves: later blocks damp or blow them up.

    Memory beyond the model: the statistics of one block, the curves, and what the probe compares.
    """
    ending = Ending(blockwise)
    metrics = output_metric(blockwise.model, room.found, first_batches(blockwise.batches))
    costs: dict[str, Tensor] = {}
    for group in blockwise.groups:
        seen = observing(group, 0)
        blockwise.see(group, seen)
        lost: dict[str, Tensor] = {}
        changed: list[tuple[FFN, Neurons]] = []
        starts = {ffn.name: max(1, round(room.share * ffn.width)) for ffn in group}
        for ffn in group:
            curve, narrow = _measured(ffn, seen, starts[ffn.name], metrics[ffn.name].dimensions)
            if curve is not None:
                lost[ffn.name] = curve
            changed.append((ffn, narrow))
        moved = ending.moved(changed)
        del changed
        whole = sum(float(curve[starts[name]]) for name, curve in lost.items())
        for ffn in group:
            curve = lost.get(ffn.name)
            if curve is None:  # no token reached it: as costly as the others of its block are on average
                curve = _mean([lost[other.name] for other in group if other.name in lost and other.width == ffn.width])
            costs[ffn.name] = torch.zeros(ffn.width + 1) if curve is None else curve * (moved / max(whole, 1e-300))
            if progress is not None:
                progress(len(costs), len(room.found), ffn.name)
        blockwise.advance(group)
    return [costs[ffn.name] for ffn in room.found]


def _mean(curves: list[Tensor]) -> Tensor | None:
    return torch.stack(curves).mean(0) if curves else None


def _measured(ffn: FFN, seen: Statistics[Part], width: int, dimensions: Tensor) -> tuple[Tensor | None, Neurons]:
    """The squared error at each width, summed over tokens and experts, and the FFN narrowed to ``width``."""
    total: Tensor | None = None
    parts: list[Neurons] = []
    old = lifted(ffn.raw())
    for number, single in enumerate(singles(old)):
        part = seen.parts.pop((ffn.name, number), None)
        if part is None:
            kept = torch.sort(norms(single), descending=True, stable=True).indices[:width].sort().values
            parts.append(single.take(kept))
            continue
        curve, narrow = _narrowed(single, part, width, dimensions)
        lost = curve.lost * part.moments.count
        total = lost if total is None else total + lost
        parts.append(narrow)
    return total, (concatenate(parts) if old.experts else parts[0])


def _narrowed(old: Neurons, part: Part, width: int, dimensions: Tensor) -> tuple[Curve, Neurons]:
    """The curve of one FFN or expert, and its narrow form, as data-aware fusion has it before its regression."""
    moments = part.moments
    gram = (moments.centred() if old.down_bias is not None else moments.second()).float()
    curve = output_curve(gram, weighed(old.down, dimensions), RIDGE)
    kept = curve.order[:width].sort().values.to(gram.device)
    down, _ = refit(gram, old.down, kept, RIDGE)
    narrow = dataclasses.replace(old.take(kept), down=down.to(old.down.dtype))
    if old.down_bias is not None:
        mean = moments.mean()
        bias = old.down_bias.double() + old.down.double() @ mean - down @ mean[kept]
        narrow = dataclasses.replace(narrow, down_bias=bias.to(old.down_bias.dtype))
    return curve, narrow


def costs_of(
    room: Room, model: nn.Module, data: Iterable[Batch] | StatisticsFile | None, progress: Progress | None
) -> list[Tensor]:
    """The costs (ff + 1,) of every FFN: from data where there are any, else from the weights.

    Raises:
        FfnkitError: an FFN is edited already, empty, quantized or not finite; data that some FFN does not see.
    """
    for ffn in room.found:
        ffn.check_plain(f"choosing the width of {ffn.name}")
        check_weights(ffn.raw(), ffn.name)
    if data is None:
        return from_weights(room, progress)
    with Blockwise(model, data, room.found) as blockwise:
        return from_data(room, blockwise, progress)
