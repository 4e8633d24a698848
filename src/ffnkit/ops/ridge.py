"""Least squares that are pulled towards what is there, from sums over tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ffnkit.errors import FfnkitError

LEAST = 1e-10  # of the mean diagonal: with less, columns that depend on each other are told apart by rounding


def factored(gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor of G + lambda I, and lambda: ridge x the mean diagonal of G, more where that fails.

    Raises FfnkitError where G holds NaN or infinity: no lambda helps then.
    """
    shift = max(ridge * gram.diagonal().mean().item(), torch.finfo(gram.dtype).tiny)
    sound = bool(torch.isfinite(gram).all())
    while sound and math.isfinite(shift):
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return factor, shift
        shift = max(10 * shift, torch.finfo(gram.dtype).eps * gram.abs().max().item())
    found = f"sums over tokens are NaN or infinite in {str(gram.dtype).removeprefix('torch.')}"
    do = "Load the model with dtype float32 or bfloat16, or repair its weights"
    raise FfnkitError("a least-squares fit", found, do)


def pulled(square: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The D (d, w) that minimises ||H D^T - Y||_F^2 + lambda ||D - start||_F^2, float64.

    Where H is zero it is ``start``.

    ``D = start + (Y^T H - start H^T H) (H^T H + lambda I)^-1`` with lambda = ridge x the mean diagonal of H^T H: much
    of it leaves ``start``. At least ``LEAST`` of it is taken, for columns that depend on each other.

    Args:
        square: (w, w) H^T H. cross: (d, w) Y^T H. start: (d, w). All by the same count of tokens.
    """
    square, start = square.double(), start.double()
    if not bool(square.any()):
        return start
    missing = (cross.double() - start @ square).T
    return start + torch.cholesky_solve(missing, factored(square, max(ridge, LEAST))[0]).T
