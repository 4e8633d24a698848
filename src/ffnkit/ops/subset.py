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
    rows are, which is one pass over it a step. Neurons that never fire (0 on the diagonal of G) come last.

    Args:
        gram: (ff, ff) H^T H, float32 or float64. down: (d, ff). width: neurons to choose.
        ridge: added to the diagonal, relative to its mean: keeps rounding and noise from being fitted.

    Source: orthogonal matching pursuit for many right sides (Tropp et al. 2006, simultaneous OMP); column subset
        selection.
    """
    ff = len(gram)
    shift = ridge * gram.diagonal().mean()
    diagonal = gram.diagonal() + shift
    tiny = torch.finfo(gram.dtype).eps * diagonal.max().clamp_min(torch.finfo(gram.dtype).tiny)
    weight = down.T.to(gram.dtype)
    most = least_needed(gram, down)
    factor = gram.new_zeros(width, ff)  # rows: columns of the Cholesky factor
    taken = torch.zeros(ff, dtype=torch.bool, device=gram.device)
    order = torch.empty(width, dtype=torch.int64)
    remains = torch.empty(width + 1, dtype=torch.float64)
    rows = (gram @ weight).addcmul_(weight, shift)  # (G + shift I) W^T: what each neuron could still add to the outputs
    remains[0], whole = _energy(rows, weight, float(shift))
    at_once = max(1, width // AT_ONCE)
    left = Delayed(rows, factor, at_once)
    for start in range(0, width, at_once):
        stop = min(start + at_once, width)
        gain = torch.minimum(left.sizes / diagonal.clamp_min(tiny), most)
        picked = gain.masked_fill_(taken, -torch.inf).topk(stop - start).indices
        taken[picked] = True
        for step, best in enumerate(picked.tolist(), start):
            order[step] = best
            root = diagonal[best].clamp_min(tiny).sqrt()
            column = gram[best] - factor[:step, best] @ factor[:step]
            column[best] += shift
            factor[step] = column.div_(root)
            left.move(best, step, root)
            diagonal -= column.square_()
        fresh = left.moved(start, stop)
        remains[start + 1 : stop + 1] = remains[start] - fresh.square().sum(1, dtype=torch.float64).cumsum(0).cpu()
        left.advance(start, stop)
    return Chosen(order, remains.clamp_min_(0), whole)


def least_needed(gram: Tensor, down: Tensor) -> Tensor:
    """What scores may be at most, (ff,): of neurons that never fire less than nothing, by their columns; else anything.

    A score of such a neuron is of the ridge alone, which counts its column as if it gave something.
    """
    squares = down.to(gram.dtype).square().sum(0).clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.where(gram.diagonal() == 0, -1 / squares, torch.inf)


def _energy(rows: Tensor, weight: Tensor, shift: float) -> tuple[float, float]:
    """||H W^T||_F^2 of (G + shift I) W^T and W^T (ff, d): the ridge included, and without it."""
    parts = zip(rows.split(COLUMNS), weight.split(COLUMNS), strict=True)
    sums = [(float((a * b).sum(dtype=torch.float64)), float(b.square().sum(dtype=torch.float64))) for a, b in parts]
    total = sum(total for total, _ in sums)
    return total, max(total - shift * sum(square for _, square in sums), 0.0)


class Delayed:
    """Rows, one a neuron, from which the part of each chosen neuron is taken: of ``DELAY`` neurons together.

    Args:
        rows: (ff, d), changed in place. factor: (steps, ff), whose row of each step is there before :meth:`advance`.
        at_once: steps between two calls of :meth:`advance`, at most.

    Attributes:
        rows: less what was subtracted. sizes: (ff,) squared norms that the rows would have with all subtracted.
    """

    def __init__(self, rows: Tensor, factor: Tensor, at_once: int) -> None:
        self.rows, self._factor = rows, factor
        self._moved = rows.new_empty(DELAY + at_once, rows.shape[1])
        self._base = 0  # the first step that is not subtracted yet
        self._measure()

    def move(self, number: int, step: int, root: Tensor) -> None:
        """A step's neuron: its row as it is now, over ``root``, times the factor's row is to be taken off."""
        held = self.moved(self._base, step)
        own = self.rows[number] - self._factor[self._base : step, number] @ held
        self._moved[step - self._base] = own / root

    def moved(self, start: int, stop: int) -> Tensor:
        """(stop - start, d), of the steps since the last :meth:`advance`."""
        return self._moved[start - self._base : stop - self._base]

    def advance(self, start: int, stop: int) -> None:
        """Bring ``sizes`` up to date for the steps from ``start`` to ``stop``, and the rows where enough are held."""
        if stop - self._base >= DELAY:
            self.subtract(stop)
            self._measure()
            return
        moved, factor = self.moved(self._base, stop), self._factor[self._base : stop]
        before, new, own = start - self._base, self.moved(start, stop), self._factor[start:stop]
        inner = self.rows @ new.T  # (ff, last)
        inner.addmm_(factor[:before].T, moved[:before] @ new.T, alpha=-1)
        change = own.T @ (new @ new.T) - 2 * inner
        self.sizes.add_((change * own.T).sum(1)).clamp_min_(0)

    def subtract(self, stop: int) -> Tensor:
        """The rows with all up to step ``stop`` taken off."""
        self.rows.addmm_(self._factor[self._base : stop].T, self.moved(self._base, stop), alpha=-1)
        self._base = stop
        return self.rows

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
    much the squared output error grows where this neuron alone goes and the output layer is refitted; below 0 for
    neurons that never fire (:func:`least_needed`). lambda = ridge x the mean diagonal of G.

    Source: MoDeGPT (arXiv 2408.09632), the FFN part; optimal brain surgeon (Hassibi and Stork 1992), OBC (arXiv
        2208.11580) with a whole column as the unit.
    """
    factor, shift = factored(gram, ridge)
    inverse = torch.cholesky_inverse(factor).diagonal()
    if down is None:
        return 1 - shift * inverse
    return torch.minimum(down.to(gram.dtype).square().sum(0) / inverse, least_needed(gram, down))


def ranked(gram: Tensor, ridge: float, down: Tensor, share: float) -> Tensor:
    """The neurons, (ff,), best first: a share of those that stay by the loss without each, the rest by leverage.

    The two orders of :func:`leverage` are taken from in turn, so that of the first k about ``share`` x k are those that
    lose most and the others those that the rest can least give; at share 1 it is the first order, at 0 the second.

    Source: ours.
    """
    factor, _ = factored(gram, ridge)
    alone = 1 / torch.cholesky_inverse(factor).diagonal()
    lost, most = down.to(gram.dtype).square().sum(0) * alone, least_needed(gram, down)
    scores = torch.minimum(torch.stack((lost, alone)), most)
    orders = [iter(order) for order in torch.sort(scores, descending=True, stable=True).indices.tolist()]
    order: dict[int, int] = {}
    for place in range(1, len(alone) + 1):
        turn = orders[0 if ceil(share * place) > ceil(share * (place - 1)) else 1]
        order[next(each for each in turn if each not in order)] = place
    return torch.tensor([*order], device=gram.device)
