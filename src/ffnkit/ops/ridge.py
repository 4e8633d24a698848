"""Least squares that are pulled towards what is there, from sums over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

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
