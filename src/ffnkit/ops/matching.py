"""Which neuron of one FFN does what which neuron of another does: by features or by weights, and the best pairing.

Features are (n, p) float32 on the same n tokens, in memory or memory-mapped; they are read a slice of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ffnkit.ops.neurons import Neurons

ROWS = 2048  # at a time


@dataclass(frozen=True)
class Spread:
    """Mean and root of the summed squares around it, of each column: (p,), float64."""

    mean: Tensor
    size: Tensor


def spread(x: Tensor) -> Spread:
    """Column means and sizes of features (n, p): two passes in float64, since one would cancel."""
    mean = torch.zeros(x.shape[1], dtype=torch.float64)
    for rows in x.split(ROWS):
        mean += rows.sum(0, dtype=torch.float64).cpu()
    mean /= max(len(x), 1)
    squares = torch.zeros_like(mean)
    for rows in x.split(ROWS):
        squares += (rows.cpu().double() - mean).square().sum(0)
    return Spread(mean, squares.sqrt())


def correlation(x: Tensor, y: Tensor, of_x: Spread | None = None, of_y: Spread | None = None) -> Tensor:
    """Pearson correlations of the columns of x (n, p) with those of y (n, q): (p, q), float32.

    Columns are centred and scaled in float64 first; the products are float32, so the error is that of a sum of n
    products of numbers of size 1 / sqrt(n). A column that never changes correlates 0 with all.

    Source: Verma et al., merging feed-forward sublayers (arXiv 2501.06126), the cross-correlation C.
    Differs: centred before the products are summed; E[xy] - E[x] E[y] cancels in float32.
    """
    of_x, of_y = of_x or spread(x), of_y or spread(y)
    result = torch.zeros(x.shape[1], y.shape[1], device=x.device)
    for mine, other in zip(x.split(ROWS), y.split(ROWS), strict=True):
        result.addmm_(_standard(mine, of_x).T, _standard(other, of_y))
    return result


def _standard(rows: Tensor, of: Spread) -> Tensor:
    """Rows of features centred, each column of length 1 over all rows."""
    floor = of.size.max().clamp_min(torch.finfo(torch.float64).tiny) * 1e-12
    inverse = torch.where(of.size > floor, 1 / of.size.clamp_min(floor), 0.0).to(rows.device)
    return ((rows.double() - of.mean.to(rows.device)) * inverse).float()


def likeness(x: Neurons, y: Neurons) -> Tensor:
    """How alike the neurons of two FFNs are by what they read and write: (p, q), -1 to 1; no data.

    The mean of the cosines of their rows of up and of gate, each with its bias, and of their columns of down. Cosines,
    since a neuron may hand a factor from one to the other. Copies in another order have likeness 1 with their own.
    """
    total = torch.zeros(x.ff, y.ff, dtype=x.up.dtype, device=x.up.device)
    parts = [_parts(x), _parts(y)]
    for mine, other in zip(*parts, strict=True):
        total.addmm_(normalize(mine), normalize(other.to(mine)).T)
    return total / len(parts[0])


def _parts(neurons: Neurons) -> list[Tensor]:
    """(ff, columns) of each kind of weight."""
    pairs = [(neurons.up, neurons.up_bias), (neurons.gate, neurons.gate_bias), (neurons.down.mT, None)]
    return [w if bias is None else torch.cat((w, bias[:, None]), 1) for w, bias in pairs if w is not None]


def assign(similarity: Tensor) -> Tensor:
    """The permutation pi (p,), int64, that maximises sum_j similarity[j, pi[j]], for a square matrix.

    Row j goes with column pi[j]. Solved exactly (shortest augmenting paths, O(p^3) at worst).
    """
    from scipy.optimize import linear_sum_assignment

    cost = similarity.cpu().to(torch.float64, copy=True).neg_()  # maximize=True would hold both signs
    _, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(columns).long()


def matched(similarity: Tensor, order: Tensor) -> float:
    """The mean of similarity[j, order[j]]."""
    rows = torch.arange(len(order), device=similarity.device)
    return similarity[rows, order.to(similarity.device)].double().mean().item()
