"""Least squares that are pulled towards what is there, from sums over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnkit.ops.moments import Moments

LEAST = 1e-10  # of the mean diagonal: with less, columns that depend on each other are told apart by rounding


def factored(gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor of G + lambda I, and lambda: ridge x the mean diagonal of G, more where that fails."""
    shift = max(ridge * gram.diagonal().mean().item(), torch.finfo(gram.dtype).tiny)
    while True:
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return factor, shift
        shift = max(10 * shift, torch.finfo(gram.dtype).eps * gram.abs().max().item())


def pulled(square: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The D (d, w) that minimises ||H D^T - Y||_F^2 + lambda ||D - start||_F^2, float64.

    ``D = start + (Y^T H - start H^T H) (H^T H + lambda I)^-1`` with lambda = ridge x the mean diagonal of H^T H: much
    of it leaves ``start``. At least ``LEAST`` of it is taken, for columns that depend on each other.

    Args:
        square: (w, w) H^T H. cross: (d, w) Y^T H. start: (d, w). All by the same count of tokens.
    """
    square, start = square.double(), start.double()
    missing = (cross.double() - start @ square).T
    return start + torch.cholesky_solve(missing, factored(square, max(ridge, LEAST))[0]).T


class Pairs:
    """What comes in and what is wanted of it, token by token: enough to fit a linear, and to tell its error.

    Args:
        columns, outputs: of what comes in (n, columns) and of what is wanted (n, outputs).
    """

    def __init__(self, columns: int, outputs: int, device: torch.device) -> None:
        self.columns = columns
        self._moments = Moments(columns + outputs, device)

    def add(self, rows: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Tokens, each weighing ``weights`` (n,) or 1."""
        self._moments.add(torch.cat((rows.float(), wanted.float()), 1), weights)

    def fit(self, start: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None, float]:
        """Weight (outputs, columns), float64, the bias where there is one, and the relative error on these tokens.

        The weight is pulled towards ``start`` (:func:`pulled`); the bias is free. The sums are spent.
        """
        mean, at = self._moments.mean(), self.columns
        gram = self._moments.second(last=True) if bias is None else self._moments.centred(last=True)
        square, cross = gram[:at, :at].double(), gram[at:, :at].double()
        weight = pulled(square, cross, start, ridge)
        fresh = None if bias is None else (mean[at:] - weight @ mean[:at]).to(bias.dtype)
        total = float(gram.diagonal()[at:].sum())
        rest = total - float((weight * (2 * cross - weight @ square)).sum())
        self._moments.forget()
        return weight, fresh, (max(rest, 0.0) / max(total, 1e-300)) ** 0.5
