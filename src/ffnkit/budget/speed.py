"""How long a model takes with edits, to what it takes without: measured in turn on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, model_inputs, prepared
from ffnkit.calibration.latency import latency
from ffnkit.calibration.stored import tokens_of
from ffnkit.edits import Edit
from ffnkit.surgery.temporary import TemporaryPlan

ROUNDS, ROWS, TOKENS = 7, 8, 1024  # of a batch: so many rows at most, and about so many tokens
REPEATS, LONG = 3, 0.5  # passes a round; one where it takes longer, in seconds, since its noise is a smaller part of it


class Speed:
    """Seconds of a batch of a model with edits and without.

    Args:
        row: inputs of one row, repeated to ``ROWS``, or as many as have ``TOKENS``.

    Attributes:
        last: medians of seconds before and after, and of their ratio, as they were measured last.
    """

    def __init__(self, model: nn.Module, row: Batch) -> None:
        self.model = model
        given = model_inputs(model, prepared(model, row))
        count = min(ROWS, max(1, TOKENS // tokens_of(given)))
        self.batch = {k: _repeated(v, count) for k, v in given.items()}
        self.last: dict[str, float] = {}

    def ratio(self, edits: Sequence[Edit]) -> float:
        """The median over rounds of the seconds with the edits to those without."""
        plan = TemporaryPlan(self.model, edits)
        before: list[float] = []
        after: list[float] = []
        warmup = [self._seconds(1, warmup=1)]
        with plan:
            warmup.append(self._seconds(1, warmup=1))
        repeats = 1 if min(warmup) > LONG else REPEATS
        for _ in range(ROUNDS):
            before.append(self._seconds(repeats))
            with plan:
                after.append(self._seconds(repeats))
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        self.last = {"before": statistics.median(before), "after": statistics.median(after), "ratio": ratio}
        return ratio

    def _seconds(self, repeats: int, warmup: int = 0) -> float:
        return latency(self.model, self.batch, repeats=repeats, warmup=warmup).median


def _repeated(value: Any, count: int) -> Any:
    return value.repeat(count, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
