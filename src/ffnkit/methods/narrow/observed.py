"""What data-aware fusion sees of an FFN: moments of its hidden units, inputs held for fits, what is missing beyond."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ffnkit.calibration.hooks import Activations
from ffnkit.calibration.statistics import HeldInputs, HiddenMoments, Statistics
from ffnkit.model.ffn import FFN
from ffnkit.ops.apart import MOST
from ffnkit.ops.moments import Moments


class Beyond:
    """Sums over tokens of what outputs are to be more than they are (``Activations.missing``), with hidden units."""

    def __init__(self) -> None:
        self._count = 0.0
        self._sum: Tensor | None = None
        self._cross: Tensor | None = None

    def update(self, acts: Activations) -> None:
        if acts.missing is None or not len(acts.input):
            return
        missing, hidden = acts.missing.float(), acts.hidden.float()
        if self._sum is None or self._cross is None:
            self._sum = missing.new_zeros(missing.shape[1], dtype=torch.float64)
            self._cross = missing.new_zeros(missing.shape[1], hidden.shape[1], dtype=torch.float64)
        self._count += len(missing)
        self._sum += missing.sum(0, dtype=torch.float64)
        self._cross += missing.T @ hidden

    def mean(self) -> Tensor | float:
        """(d,), or 0 where nothing is missing."""
        return 0.0 if self._sum is None else self._sum / self._count

    def cross(self, around: Moments | None) -> Tensor | None:
        """(d, ff), the mean of missing x hidden^T, less the product of their means where moments are given."""
        if self._sum is None or self._cross is None:
            return None
        cross = self._cross / self._count
        return cross if around is None else cross.addr_(self._sum / self._count, around.mean(), alpha=-1)


class Part:
    """What one FFN, or one expert, did on the data.

    Attributes:
        moments: of the hidden activations. held: inputs for the regression, and what tells the activation.
        apart: inputs that neither saw (:meth:`~ffnkit.calibration.hooks.Activations.apart`), to judge fits by
            (:class:`~ffnkit.methods.narrow.judging.Judged`).
        beyond: what the outputs are to be more than they are.
    """

    stored: ClassVar[str] = "fusion"

    def __init__(self, most: int) -> None:
        self.hidden, self.held, self.apart = HiddenMoments(), HeldInputs(most), HeldInputs(MOST)
        self.beyond = Beyond()

    @property
    def moments(self) -> Moments:
        return self.hidden.moments

    def missing(self, *, centred: bool) -> Tensor | None:
        """(d, ff) E^T H / n of what is missing E (n, d), around the means or not; None where nothing is."""
        return self.beyond.cross(self.moments if centred else None)

    def update(self, acts: Activations) -> None:
        fitted, apart = acts.counted().apart()
        self.hidden.update(fitted)
        self.held.update(fitted)
        self.beyond.update(fitted)
        if len(apart.input):
            self.apart.update(apart)

    def merge(self, other: Part) -> None:
        for mine, theirs in zip(self._parts().values(), other._parts().values(), strict=True):
            mine.merge(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value for name, part in self._parts().items() for key, value in part.state_dict().items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        for name, part in self._parts().items():
            length = len(name) + 1
            part.load({key[length:]: value for key, value in state.items() if key.startswith(f"{name}.")})

    def _parts(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "held": self.held, "apart": self.apart}


def observing(group: list[FFN], tokens: int) -> Statistics[Part]:
    """Empty statistics of these FFNs; of each, ``tokens`` inputs are held at most, shared by its experts."""
    most = {ffn.name: tokens // max(ffn.experts, 1) for ffn in group}
    return Statistics(lambda name: Part(most[name]))
