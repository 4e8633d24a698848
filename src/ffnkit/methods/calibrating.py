"""One pass over calibration data for every method, width and budget: its statistics, in a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from ffnkit.calibration.batches import Batch, kept
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.fingerprints import batch_fingerprint, model_fingerprint
from ffnkit.calibration.statistics import NeuronSquares, Statistics
from ffnkit.calibration.stored import (
    Make,
    StatisticsFile,
    StatisticsWriter,
    Together,
    first_batches,
    tokens_of,
    writing,
)
from ffnkit.errors import FfnkitError, FfnkitWarning
from ffnkit.methods.narrow.calibrated import CalibratedFusion
from ffnkit.methods.narrow.observed import Part
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.targets import select
from ffnkit.ops.moments import DOUBLE_UP_TO
from ffnkit.plans import Progress, check_weights
from ffnkit.settings import WhichLayers

HELD = CalibratedFusion.tokens


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    path: str | Path | None = None,
    *,
    layers: WhichLayers = "all",
    held: int = HELD,
    progress: Progress | None = None,
) -> StatisticsFile:
    """Statistics of what a model's FFNs do on data: ``fk.plan(model, method, data=statistics)``.

    They hold what every method needs that narrows by hidden neurons (data-aware fusion, importance, structured pruning
    of neurons), at any width and under any budget: plans are equal to the bit to those made from the batches with
    ``sequential=False``. With ``refit`` behind a choice of whole neurons they are those of nine tenths of the tokens,
    which the sums are of. Not for methods that measure other things (gradients, attention, features token by token) or
    a model that changes on the way (``sequential``).

    The model runs block by block, in eval mode; each block's statistics go to the disk before the next one's are
    taken. Memory beyond the model: one block's statistics, and its output for all batches.

    Args:
        batches: for ``model(**batch)``. The tokens of the first of them (about 4,000) lie in the file.
        path: of the file; None makes a temporary one, which :meth:`StatisticsFile.save` copies.
        layers: which FFNs, e.g. "all", "last:8".
        held: inputs of each FFN that are kept for regressions, at most; its experts share them. 0 keeps none
            (``refine=0``).
        progress: called with (done, total, FFN name).

    Raises:
        FfnkitError: no batches, or FFNs that do not run on them, are edited already, empty, quantized or not finite.
    """
    if isinstance(held, bool) or not isinstance(held, int) or held < 0:
        raise FfnkitError(f"held {held!r}", "not a number of tokens", "Give held=16384 or so, or 0")
    batches, found = kept(batches), select(ffns(model), layers)
    for ffn in found:
        ffn.check_plain(f"calibrating {ffn.name}")
        check_weights(ffn.raw(), ffn.name)
    given = {
        "model": model_fingerprint(model),
        "data": [batch_fingerprint(batch) for batch in batches],
        "tokens": sum(map(tokens_of, batches)),
        "layers": {ffn.name: max(ffn.experts, 1) for ffn in found},
        "held": held,
        "dtype": str(found[0].raw().up.dtype).removeprefix("torch."),
    }
    done = 0
    with (
        Blockwise(model, batches, found) as blocks,
        writing(path, given, first_batches(batches)) as (writer, files),
    ):
        for group in blocks.groups:
            seen = Statistics(_maker({ffn.name: max(ffn.experts, 1) for ffn in group}, held))
            blocks.watch(group, seen.update, last=True)
            for ffn in group:
                _write(writer, ffn.name, max(ffn.experts, 1), seen)
                done += 1
                if progress is not None:
                    progress(done, len(found), ffn.name)
            blocks.advance(group)
    return files[0]


def _maker(experts: dict[str, int], held: int) -> Make:
    """Empty accumulators of all that such files hold, by the FFN's name."""
    return lambda name: Together(NeuronSquares(), Part(held // experts[name]))


def _write(writer: StatisticsWriter, name: str, experts: int, seen: Statistics[Together]) -> None:
    for number in range(experts):
        if (part := seen.parts.pop((name, number), None)) is not None:
            writer.add(name, number, part)


def merge(
    files: Sequence[StatisticsFile], path: str | Path | None = None, progress: Progress | None = None
) -> StatisticsFile:
    """The statistics of one pass over the data of all of them, in their order, to rounding; FFN by FFN.

    Args:
        path: of the file to write; None makes a temporary one.

    Raises:
        FfnkitError: fewer than two, or they are of several models or layers.
    """
    if len(files) < 2:
        raise FfnkitError("merging statistics", f"{len(files)} is given", "Name two files or more")
    first = files[0]
    for other in files[1:]:
        for what in ("model", "layers"):
            if getattr(other, what) != getattr(first, what):
                found = f"{other.path} is of another {what.removesuffix('s')} than {first.path}"
                raise FfnkitError("merging statistics", found, "Merge those of one model and the same layers")
    data = [digest for each in files for digest in each.data]
    if again := len(data) - len(set(data)):
        said = f"merging statistics: {again} of {len(data)} batches were there already, and count again"
        warnings.warn(said, FfnkitWarning, stacklevel=2)
    held = min(each.held for each in files)
    given = {
        "model": first.model,
        "data": data,
        "tokens": sum(each.tokens for each in files),
        "layers": first.layers,
        "held": held,
        "dtype": first.dtype,
    }
    probe = first_batches(batch for each in files for batch in each.probe)
    make = _maker(first.layers, held)
    with writing(path, given, probe) as (writer, done):
        for number, (name, experts) in enumerate(first.layers.items(), 1):
            for expert in range(experts):
                seen: Together | None = None
                for each in files:
                    if state := each.state(name, expert):
                        part = make(name)
                        part.load(state)
                        if seen is None:
                            seen = part
                        else:
                            seen.merge(part)
                if seen is not None:
                    writer.add(name, expert, seen)
            if progress is not None:
                progress(number, len(first.layers), name)
    return done[0]


def expected_bytes(found: list[FFN], tokens: int, held: int) -> dict[str, int]:
    """About how large such a file becomes: its "sums", and the "inputs" that it keeps.

    Args:
        tokens: of the data.
    """
    sums = inputs = 0
    for ffn in found:
        sums += max(ffn.experts, 1) * ffn.width**2 * (8 if ffn.width <= DOUBLE_UP_TO else 4)
        inputs += min(held, tokens) * ffn.d * min(ffn.raw().up.element_size(), 4)
    return {"sums": sums, "inputs": inputs}
