"""Which hidden neurons to keep, and the output layer that suits them best, from the Gram matrix of the activations.

With H (n, ff) the hidden activations on n tokens and W (d, ff) the output layer, keeping the neurons S with a new
output layer D costs ||H W^T - H_S D^T||_F^2. All of it follows from G = H^T H: the best D is W G_{:,S} (G_SS)^-1, and
what remains is tr(W (G - G_{:,S} G_SS^-1 G_{S,:}) W^T).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ffnkit.ops.ridge import factored

AT_ONCE = 512  # scores are computed anew at least so many times
DELAY = 32  # neurons whose effect on what is left of the outputs is subtracted together
COLUMNS = 1024  # of a matrix that is widened to float64 at a time


@dataclass(frozen=True)
class Chosen:
    """A nested sequence of neurons.

    Attributes:
        order: (width,) int64, in the order in which they were chosen: every head of it is the choice for that width.
        remains: (width + 1,) float64, the squared output error, ridge included, after 0, 1, ... neurons.
        outputs: ||H W^T||_F^2, without ridge.
    """

    order: Tensor
    remains: Tensor
    outputs: float


def choose(gram: Tensor, down: Tensor, width: int, ridge: float = 0.0) -> Chosen:
    """Greedy forward selection: each step adds the neuron that lowers the output error most.

    Adding i to S lowers the error by ||g_i W^T||^2 / g_ii, with g the Schur complement of G_SS in G. One column of a
    Cholesky factor a step: width x ff x (width / 2 + 2 d) multiplications and additions. Beyond 1024 neurons a few
    are taken at once. g W^T is brought up to date for ``DELAY`` neurons together; in between only the norms of its
    rows are, which is one pass over it a step.

    Args:
        gram: (ff, ff) H^T H, float32 or float64. down: (d, ff). width: neurons to choose.
        ridge: added to the diagonal, relative to its mean: keeps rounding and noise from being fitted.

    Source: orthogonal matching pursuit for many right sides (Tropp et al. 2006, simultaneous OMP); column subset
        selection.
    """
    ff, d = gram.shape[0], down.shape[0]
    shift = ridge * gram.diagonal().mean()
    diagonal = gram.diagonal() + shift
    tiny = torch.finfo(gram.dtype).eps * diagonal.max().clamp_min(torch.finfo(gram.dtype).tiny)
    left = Left(gram, down.to(gram.dtype), shift)
    factor = gram.new_zeros(width, ff)  # rows: columns of the Cholesky factor
    taken = torch.zeros(ff, dtype=torch.bool, device=gram.device)
    order = torch.empty(width, dtype=torch.int64)
    remains = torch.empty(width + 1, dtype=torch.float64)
    remains[0] = left.total
    at_once = max(1, width // AT_ONCE)
    moved = gram.new_empty(DELAY + at_once, d)  # what the neurons since ``base`` take from the outputs
    base = 0
    for start in range(0, width, at_once):
        stop = min(start + at_once, width)
        gain = left.sizes / diagonal.clamp_min(tiny)
        picked = gain.masked_fill_(taken, -1.0).topk(stop - start).indices
        taken[picked] = True
        for step, best in enumerate(picked.tolist(), start):
            order[step] = best
            root = diagonal[best].clamp_min(tiny).sqrt()
            column = gram[best] - factor[:step, best] @ factor[:step]
            column[best] += shift
            factor[step] = column.div_(root)
            moved[step - base] = (left.rows[best] - factor[base:step, best] @ moved[: step - base]) / root
            diagonal -= column.square_()
        fresh = moved[start - base : stop - base]
        remains[start + 1 : stop + 1] = remains[start] - fresh.square().sum(1, dtype=torch.float64).cumsum(0).cpu()
        if stop - base >= DELAY:
            left.subtract(factor[base:stop], moved[: stop - base])
            base = stop
        elif stop < width:
            left.shrink(factor[base:stop], moved[: stop - base], stop - start)
    return Chosen(order, remains.clamp_min_(0), left.outputs)


class Left:
    """What the neurons could still add to the outputs.

    Attributes:
        rows: (ff, d) (G + shift I) W^T, less what was subtracted. sizes: (ff,) squared norms of its present rows.
        total: the squared norm of all outputs, ridge included; outputs: without it.
    """

    def __init__(self, gram: Tensor, weight: Tensor, shift: Tensor) -> None:
        self.rows = (gram @ weight.T).addcmul_(weight.T, shift)
        parts = zip(self.rows.split(COLUMNS), weight.T.split(COLUMNS), strict=True)
        sums = [(float((a * b).sum(dtype=torch.float64)), float(b.square().sum(dtype=torch.float64))) for a, b in parts]
        self.total = sum(total for total, _ in sums)
        self.outputs = max(self.total - float(shift) * sum(square for _, square in sums), 0.0)
        self._measure()

    def subtract(self, factor: Tensor, moved: Tensor) -> None:
        """Take off the product of factor (k, ff) and moved (k, d)."""
        self.rows.addmm_(factor.T, moved, alpha=-1)
        self._measure()

    def shrink(self, factor: Tensor, moved: Tensor, last: int) -> None:
        """Bring ``sizes`` up to date for the ``last`` of the neurons that are not subtracted yet."""
        new, own, before = moved[-last:], factor[-last:], len(moved) - last
        inner = self.rows @ new.T  # (ff, last)
        inner.addmm_(factor[:before].T, moved[:before] @ new.T, alpha=-1)
        change = own.T @ (new @ new.T) - 2 * inner
        self.sizes.add_((change * own.T).sum(1)).clamp_min_(0)

    def _measure(self) -> None:
        self.sizes = torch.linalg.vector_norm(self.rows, dim=1).square_()


def weighed(rows: Tensor, metric: Tensor) -> Tensor:
    """Rows of outputs (d, k) in a metric M: R (d, k) with R^T R = rows^T M rows, so that plain squares count as M does.

    Args:
        metric: (d,), weights of the dimensions, or (d, d), symmetric and positive definite.
    """
    metric = metric.to(rows.device)
    if metric.ndim == 1:
        return rows * metric.to(rows.dtype).sqrt()[:, None]
    return torch.linalg.cholesky(metric.double()).T.to(rows.dtype) @ rows


def outputs(gram: Tensor, down: Tensor) -> float:
    """||H W^T||_F^2 of Gram matrix and output layer (d, ff)."""
    weight = down.to(gram.dtype)
    return max(float(((weight @ gram) * weight).sum(dtype=torch.float64)), 0.0)


def leverage(gram: Tensor, ridge: float, down: Tensor | None = None) -> Tensor:
    """What no other neuron can stand for, (ff,): ridge leverage scores, or the loss without each neuron.

    Without ``down`` the scores are diag(G (G + lambda I)^-1), between 0 and 1: how much of a neuron the others do not
    give, whatever the output layer makes of it. With ``down`` (d, ff) they are ||w_i||^2 / ((G + lambda I)^-1)_ii: how
    much the squared output error grows where this neuron alone goes and the output layer is refitted. lambda = ridge x
    the mean diagonal of G.

    Source: MoDeGPT (arXiv 2408.09632), the FFN part; optimal brain surgeon (Hassibi and Stork 1992), OBC (arXiv
        2208.11580) with a whole column as the unit.
    """
    factor, shift = factored(gram, ridge)
    inverse = torch.cholesky_inverse(factor).diagonal()
    return 1 - shift * inverse if down is None else down.to(gram.dtype).square().sum(0) / inverse


def ranked(gram: Tensor, ridge: float, down: Tensor, share: float) -> Tensor:
    """The neurons, (ff,), best first: a share of those that stay by the loss without each, the rest by leverage.

    The two orders of :func:`leverage` are taken from in turn, so that of the first k about ``share`` x k are those that
    lose most and the others those that the rest can least give; at share 1 it is the first order, at 0 the second.

    Source: ours.
    """
    factor, _ = factored(gram, ridge)
    alone = 1 / torch.cholesky_inverse(factor).diagonal()
    lost = down.to(gram.dtype).square().sum(0) * alone
    orders = [iter(torch.sort(scores, descending=True, stable=True).indices.tolist()) for scores in (lost, alone)]
    order: dict[int, int] = {}
    for place in range(1, len(alone) + 1):
        turn = orders[0 if ceil(share * place) > ceil(share * (place - 1)) else 1]
        order[next(each for each in turn if each not in order)] = place
    return torch.tensor([*order], device=gram.device)
