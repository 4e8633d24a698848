"""How much of several changes of a linear to take: what held-out rows say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-9  # relative: candidates that differ by less are one
HEAVY = 1e4  # how much the row that makes shares add up to 1 counts, relative to the others


def mixed(
    candidates: Sequence[Tensor],
    rows: Tensor,
    gap: Tensor,
    dimensions: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The shares c_i >= 0 of at most 1 together, (k,) float64, for which sum_i c_i rows A_i^T comes nearest to ``gap``.

    Fits that were pulled more and less towards where they started are weighed on rows that none of them saw: noise that
    a fit took for signal is left out by as much as it does not carry over.

    Args:
        candidates: (d, columns) each, A_i. rows: (n, columns). gap: (n, d).
        dimensions: (d,) each dimension, or (d, d) a metric M, symmetric: an error e counts e^T M e.
        weights: (n,) how much each row counts.

    Source: stacking under non-negative weights, Breiman, "Stacked Regressions" (1996).
    """
    from scipy.optimize import nnls

    given = [rows.double() @ each.double().T for each in candidates]
    seen = [_read(each, dimensions, weights) for each in given]
    square = torch.stack([torch.stack([(a * b).sum() for b in given]) for a in seen])
    cross = torch.stack([(each * gap.double()).sum() for each in seen])
    square.diagonal().add_(ROUNDING * square.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    factor = torch.linalg.cholesky(square)
    wanted = torch.linalg.solve_triangular(factor, cross[:, None], upper=False)[:, 0]
    left, right = factor.T.cpu().numpy(), wanted.cpu().numpy()
    shares, _ = nnls(left, right)
    if shares.sum() > 1:  # on the border: one more row, which counts far more than the others, makes them add up to 1
        heavy = HEAVY * max(abs(left).max(), abs(right).max())
        shares, _ = nnls(np.vstack((left, np.full((1, len(left)), heavy))), np.append(right, heavy))
    return torch.from_numpy(shares).to(square)


def _read(rows: Tensor, dimensions: Tensor | None, weights: Tensor | None) -> Tensor:
    if dimensions is not None:
        metric = dimensions.to(rows)
        rows = rows * metric if metric.ndim == 1 else rows @ metric
    return rows if weights is None else rows * weights.to(rows)[:, None]
