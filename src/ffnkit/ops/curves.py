"""What an FFN's output loses at every width at once, for choosing widths: from data, or from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffnkit.ops.subset import least_needed

PASSES = 256  # blocks in which neurons are taken at most; narrow FFNs take one at a time


@dataclass(frozen=True)
class Curve:
    """A nested choice of neurons and what is lost with each head of it.

    Attributes:
        order: (ff,) int64, the most needed first.
        lost: (ff + 1,) float64, the squared output error with 0, 1, ... ff neurons; the last one is 0.
    """

    order: Tensor
    lost: Tensor


@torch.no_grad()
def output_curve(gram: Tensor, down: Tensor, ridge: float) -> Curve:
    """The whole curve of greedy forward selection with the output layer refitted at each width.

    The greedy of ``ops.subset.choose`` to the full width, with neurons taken by blocks, so that the Cholesky factor is
    read once a block: matrix products, about ff^3 + 4 d ff^2 multiplications and additions. Within a block each neuron
    is taken off the others exactly; only the scores by which they were picked are those of the block's beginning.

    Args:
        gram: (ff, ff) H^T H, float32 or float64, left as it is. down: (d, ff).
        ridge: added to the diagonal, relative to its mean; ``lost`` includes it.
    """
    ff = len(gram)
    weight = down.to(gram.dtype)
    shift = ridge * gram.diagonal().mean()
    diagonal = gram.diagonal() + shift
    tiny = torch.finfo(gram.dtype).eps * diagonal.max().clamp_min(torch.finfo(gram.dtype).tiny)
    left = (gram @ weight.T).addcmul_(weight.T, shift)  # (ff, d): what each neuron could still explain
    total = (left * weight.T).sum(dtype=torch.float64)
    most = least_needed(gram, down)
    factor = gram.new_empty(ff, ff)  # rows: columns of the Cholesky factor
    taken = torch.zeros(ff, dtype=torch.bool, device=gram.device)
    order = torch.empty(ff, dtype=torch.int64, device=gram.device)
    gained = torch.empty(ff, dtype=torch.float64, device=gram.device)
    block = max(1, ff // PASSES)
    for start in range(0, ff, block):
        stop = min(start + block, ff)
        scores = torch.minimum(torch.linalg.vector_norm(left, dim=1).square_() / diagonal.clamp_min(tiny), most)
        picked = scores.masked_fill_(taken, -torch.inf).topk(stop - start).indices
        taken[picked] = True
        order[start:stop] = picked
        columns = gram[picked]
        columns[torch.arange(stop - start, device=gram.device), picked] += shift
        columns.addmm_(factor[:start, picked].T, factor[:start], alpha=-1)
        for number, neuron in enumerate(picked):
            if number:
                columns[number] -= columns[:number, neuron] @ columns[:number]
            pivot = columns[number, neuron]  # none is left where earlier neurons span it, up to rounding
            columns[number] *= torch.where(pivot > tiny, pivot.clamp_min(tiny).rsqrt(), 0.0)
        factor[start:stop] = columns
        diagonal -= columns.square().sum(0)
        moved = columns @ weight.T
        gained[start:stop] = moved.square().sum(1, dtype=torch.float64)
        left.addmm_(columns.T, moved, alpha=-1)
    lost = torch.cat([total[None], total - gained.cumsum(0)]).clamp_min_(0)
    lost[-1] = 0.0
    return Curve(order.cpu(), lost.cpu())


def tail_curve(sizes: Tensor) -> Curve:
    """The curve of keeping the neurons of the largest ``sizes`` (ff,): the sum of those that go."""
    ordered = torch.sort(sizes.double(), descending=True, stable=True)
    whole = ordered.values.sum()
    lost = torch.cat([whole[None], whole - ordered.values.cumsum(0)]).clamp_min_(0)
    lost[-1] = 0.0
    return Curve(ordered.indices.cpu(), lost.cpu())
