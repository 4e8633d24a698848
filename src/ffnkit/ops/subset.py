"""Which hidden neurons to keep, and the output layer that suits them best, from the Gram matrix of the activations.

With H (n, ff) the hidden activations on n tokens and W (d, ff) the output layer, keeping the neurons S with a new
output layer D costs ||H W^T - H_S D^T||_F^2. All of it follows from G = H^T H: the best D is W G_{:,S} (G_SS)^-1, and
what remains is tr(W (G - G_{:,S} G_SS^-1 G_{S,:}) W^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 512  # scores are computed anew at least so many times


@dataclass(frozen=True)
class Chosen:
    """A nested sequence of neurons.

    Attributes:
        order: (width,) int64, in the order in which they were chosen: every head of it is the choice for that width.
        remains: (width + 1,) float64, the squared output error, ridge included, after 0, 1, ... neurons.
    """

    order: Tensor
    remains: Tensor


def choose(gram: Tensor, down: Tensor, width: int, ridge: float = 0.0) -> Chosen:
    """Greedy forward selection: each step adds the neuron that lowers the output error most.

    Adding i to S lowers the error by ||g_i W^T||^2 / g_ii, with g the Schur complement of G_SS in G. One column of a
    Cholesky factor a step: width x ff x (width / 2 + 2 d) multiplications and additions. Beyond 1024 neurons a few
    are taken at once, so that the passes over memory stay few.

    Args:
        gram: (ff, ff) H^T H, float32 or float64. down: (d, ff). width: neurons to choose.
        ridge: added to the diagonal, relative to its mean: keeps rounding and noise from being fitted.

    Source: orthogonal matching pursuit for many right sides (Tropp et al. 2006, simultaneous OMP); column subset
        selection.
    """
    ff = gram.shape[0]
    weight = down.to(gram.dtype)
    shift = ridge * gram.diagonal().mean()
    diagonal = gram.diagonal() + shift
    tiny = torch.finfo(gram.dtype).eps * diagonal.max().clamp_min(torch.finfo(gram.dtype).tiny)
    projected = gram @ weight.T + shift * weight.T  # g W^T, (ff, d)
    factor = gram.new_zeros(width, ff)  # rows: columns of the Cholesky factor
    taken = torch.zeros(ff, dtype=torch.bool, device=gram.device)
    order = torch.empty(width, dtype=torch.int64)
    remains = torch.empty(width + 1, dtype=torch.float64)
    remains[0] = (projected * weight.T).sum(dtype=torch.float64)
    at_once = max(1, width // AT_ONCE)
    for start in range(0, width, at_once):
        stop = min(start + at_once, width)
        gain = projected.square().sum(1) / diagonal.clamp_min(tiny)
        picked = gain.masked_fill_(taken, -1.0).topk(stop - start).indices
        taken[picked] = True
        for step, best in enumerate(picked.tolist(), start):
            order[step] = best
            column = gram[best] - factor[:step, best] @ factor[:step]
            column[best] += shift
            column /= diagonal[best].clamp_min(tiny).sqrt()
            factor[step] = column
            diagonal -= column.square()
        fresh = factor[start:stop]
        moved = fresh @ weight.T  # (picked, d)
        remains[start + 1 : stop + 1] = remains[start] - moved.square().sum(1, dtype=torch.float64).cumsum(0).cpu()
        projected -= fresh.T @ moved
    return Chosen(order, remains.clamp_min(0))


def refit(gram: Tensor, down: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The output layer (d, width) of the neurons ``kept`` that is closest to the whole one on the data.

    ``D = W G_{:,S} (G_SS + lambda I)^-1`` with lambda = ridge x the mean diagonal of G_SS; in float64.
    """
    square = gram[kept][:, kept].double()
    shift = max(ridge * square.diagonal().mean().item(), torch.finfo(torch.float64).tiny)
    square.diagonal().add_(shift)
    cross = gram[kept].double() @ down.double().T
    factor, failed = torch.linalg.cholesky_ex(square)
    if int(failed):  # neurons that are linearly dependent and no ridge
        return torch.linalg.lstsq(square, cross).solution.T
    return torch.cholesky_solve(cross, factor).T


def remaining(gram: Tensor, down: Tensor, kept: Tensor, fitted: Tensor) -> float:
    """||H W^T - H_S D^T||_F^2 / ||H W^T||_F^2, from the Gram matrix, float64."""
    whole = down.double()
    change = whole.clone()
    change[:, kept] -= fitted.double()
    exact = gram.double()
    total = ((whole @ exact) * whole).sum()
    return float(((change @ exact) * change).sum().clamp_min(0) / total.clamp_min(torch.finfo(torch.float64).tiny))
