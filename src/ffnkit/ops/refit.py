"""An output layer fitted to data: from sums over tokens, under several ridges, mixed by tokens that no fit saw.

One ridge is too weak for some layers and too strong for others, and the error on the fitted tokens cannot tell. So a
tenth of the tokens is held out (:mod:`ffnkit.ops.apart`): half of those decide how much of each fit is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnkit.ops.apart import MOST, held_out, lost, turns
from ffnkit.ops.mixing import mixed
from ffnkit.ops.moments import Moments
from ffnkit.ops.ridge import pulled

COLUMNS = 1024  # of a matrix that is widened to float64 at a time
RIDGES = (0.1, 0.01, 1.0, 10.0)  # of the refits that are mixed
UNDECIDED = 1.0  # in their place where nothing decides, mostly for want of tokens: less of it fits few tokens' noise


def ridges_of(ridge: float | None) -> tuple[float, ...]:
    """The one that is set, or those that are mixed."""
    return RIDGES if ridge is None else (ridge,)


@dataclass(frozen=True)
class Deciding:
    """Tokens that no fit saw: what comes in (n, columns), what is wanted (n, d), and how much each counts (n,)."""

    rows: Tensor
    wanted: Tensor
    weights: Tensor | None = None


class Refit:
    """The output layer (d, width) of the neurons S that does on the data what the whole one did: least squares.

    Minimises ||H W^T + E - H_S D^T||_F^2 + lambda ||D - W_S||_F^2 with lambda = ridge x the mean diagonal of G_SS:
    ``D = W_S + (W_R G_RS + E^T H_S) (G_SS + lambda I)^-1`` with R the neurons that go, float64. The ridge pulls towards
    the columns as they were: much of it leaves plain cutting, where one that pulls towards zero would leave nothing.

    Args:
        square: (width, width) G_SS. cross: (d, width) (H W^T + E)^T H_S.
        start: (d, width) W_S. centre: the means of H_S (width,) and of what is wanted (d,), where an output bias takes
            them up: ``square`` and ``cross`` are around them then.

    Source: GRAIL (arXiv 2602.23795), least squares behind any selection. Differs: its ridge pulls towards zero.
    """

    def __init__(
        self, square: Tensor, cross: Tensor, start: Tensor, centre: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.start, self.centre = start.double(), centre
        self._square, self._cross = square.double(), cross.double()

    @classmethod
    def of(
        cls,
        gram: Tensor,
        down: Tensor,
        kept: Tensor,
        missing: Tensor | None = None,
        centre: tuple[Tensor, Tensor] | None = None,
    ) -> Refit:
        """The problem of the neurons ``kept`` of an FFN.

        Args:
            gram: (ff, ff) H^T H. down: (d, ff) W. kept: (width,) S.
            missing: (d, ff) E^T H of what the outputs are to give beyond H W^T, E (n, d).
        """
        square = gram[kept[:, None], kept].double()
        cross = square.new_zeros(len(kept), len(down))  # G_{S,:} W^T
        for part in torch.arange(gram.shape[1], device=gram.device).split(COLUMNS):
            cross += gram[kept[:, None], part].double() @ down[:, part].double().T
        if missing is not None:
            cross += missing[:, kept].double().T
        return cls(square, cross.T, down[:, kept], centre)

    def solve(self, ridge: float) -> Tensor:
        """D, (d, width), float64 (:func:`~ffnkit.ops.ridge.pulled`)."""
        return pulled(self._square, self._cross, self.start, ridge)

    def mixed(
        self,
        ridges: Sequence[float],
        decide: Deciding | None,
        dimensions: Tensor | None = None,
        beside: Sequence[Tensor] = (),
    ) -> Tensor:
        """D, (d, width), float64: what the fits under several ridges change, by the shares that carry over.

        Args:
            ridges: of several, ``UNDECIDED`` alone counts where nothing decides. decide: tokens that no fit saw.
            dimensions: what errors count by there (:func:`~ffnkit.ops.mixing.mixed`). beside: output layers to mix in.
        """
        if decide is None and len(ridges) > 1:
            return self.solve(UNDECIDED)
        down = self.solve(ridges[0])
        if decide is None or len(ridges) + len(beside) < 2:
            return down
        rows, gap = decide.rows.double(), decide.wanted.double()
        if self.centre is not None:
            rows, gap = rows - self.centre[0], gap - self.centre[1]
        gap = gap - rows @ self.start.T
        changes = [each.double() - self.start for each in (down, *map(self.solve, ridges[1:]), *beside)]
        shares = mixed(changes, rows, gap, dimensions, decide.weights)
        return sum((share * each for share, each in zip(shares, changes, strict=True)), self.start)

    def explained(self, down: Tensor) -> float:
        """How much of the squared norm of what is wanted an output layer explains, less that of E alone."""
        return float((down * (2 * self._cross - down @ self._square)).sum())

    def bias(self, down: Tensor) -> Tensor | None:
        """The output bias (d,), float64, that goes with an output layer; None without ``centre``."""
        return None if self.centre is None else self.centre[1] - down @ self.centre[0]


def refit(
    gram: Tensor, down: Tensor, kept: Tensor, ridge: float, missing: Tensor | None = None
) -> tuple[Tensor, float]:
    """The output layer of the neurons ``kept`` under one ridge, and what it explains (:class:`Refit`)."""
    problem = Refit.of(gram, down, kept, missing)
    fitted = problem.solve(ridge)
    return fitted, problem.explained(fitted)


class Pairs:
    """What comes in and what is wanted of it, token by token: enough to fit a linear, and to tell its error.

    Of what is added a tenth of each call is held out of the sums, of which ``MOST`` tokens are held at most.

    Args:
        columns, outputs: of what comes in (n, columns) and of what is wanted (n, outputs).
    """

    def __init__(self, columns: int, outputs: int, device: torch.device) -> None:
        self.columns = columns
        self._moments = Moments(columns + outputs, device)
        self._held: list[tuple[Tensor, ...]] = []
        self._room = MOST

    def add(self, rows: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Tokens, each weighing ``weights`` (n,) or 1."""
        out = held_out(len(rows)).to(rows.device)
        both = torch.cat((rows.float(), wanted.float()), 1)
        self._moments.add(both[~out], None if weights is None else weights[~out])
        if self._room > 0 and bool(out.any()):
            weights = rows.new_ones(len(rows)) if weights is None else weights
            self._held.append(tuple(each[out][: self._room].float() for each in (rows, wanted, weights)))
            self._room -= len(self._held[-1][0])

    def fit(
        self,
        start: Tensor,
        bias: Tensor | None,
        ridge: float | None,
        dimensions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, float]:
        """Weight (outputs, columns), float64, the bias where there is one, and the relative error on tokens held out.

        The weight is pulled towards ``start``; the bias is free. Where no tokens are held out the error is that of the
        fitted ones. The sums are spent.

        Args:
            ridge: relative to the mean square of what comes in; None: several, mixed (:meth:`Refit.mixed`).
            dimensions: (outputs,) what errors count by.
        """
        mean, at = self._moments.mean(), self.columns
        gram = self._moments.second(last=True) if bias is None else self._moments.centred(last=True)
        centre = None if bias is None else (mean[:at], mean[at:])
        problem = Refit(gram[:at, :at], gram[at:, :at], start, centre)
        decide, tell = self._split()
        weight = problem.mixed(ridges_of(ridge), decide, dimensions)
        fresh = problem.bias(weight)
        if tell is None:
            total = float(gram.diagonal()[at:].sum())
            rest = max(total - problem.explained(weight), 0.0) / max(total, 1e-300)
        else:
            given = tell.rows.double() @ weight.T + (0.0 if fresh is None else fresh)
            rest = lost(given - tell.wanted, tell.wanted, tell.weights, dimensions)
        self._moments.forget()
        self._held.clear()
        return weight, None if bias is None or fresh is None else fresh.to(bias.dtype), rest**0.5

    def _split(self) -> tuple[Deciding | None, Deciding | None]:
        """The tokens held out that decide, and those that tell the error."""
        if not self._held:
            return None, None
        parts = [torch.cat(each) for each in zip(*self._held, strict=True)]
        decide, tell = (Deciding(*(each[places] for each in parts)) for places in turns(len(parts[0])))
        return decide if len(decide.rows) else None, tell
