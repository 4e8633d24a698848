"""Squared distances among points, and from points to the means of clusters, in two forms.

Every squared distance that k-means asks for follows from the pairwise ones d_ij = |x_i - x_j|^2. With weights w, the
members of a cluster c, its mass W_c = sum_c w_j, S_ci = sum_{j in c} w_j d_ij and q_c = sum_{i in c} w_i S_ci:

    |x_i - mean_c|^2 = S_ci / W_c - q_c / (2 W_c^2)

so ``PairDistances`` looks at the points once, in one matrix product, and never again; an update of t clusters adds up
rows of an n x n matrix. ``DirectDistances`` keeps no n x n matrix and multiplies by the means each time.

Source: the identity is Huygens' theorem (the sum of pairwise squared distances of a cluster is its mass times twice
its inertia).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ffnkit.ops import room

CHUNK = 1 << 26  # elements of a temporary matrix


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast and no TF32 or bfloat16 inside float32 products: distances are differences."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def one_thread() -> Iterator[int]:
    """Single-threaded torch for short steps on the CPU; gives the number of threads that there were.

    The second thread saves little there, and where the cores are shared each of thousands of steps would wait for it
    to be scheduled: a hundred times slower at worst.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Clusters:
    """Some clusters: their members one cluster after the other, where each starts, and which one each belongs to.

    Shapes: members (p,), offsets (t,), position (p,), all int64; position counts the t clusters held here.
    """

    members: Tensor
    offsets: Tensor
    position: Tensor

    @classmethod
    def of(cls, labels: Tensor, wanted: Tensor, k: int) -> Clusters:
        """The clusters ``wanted`` (ascending), of ``labels`` (n,) in 0..k-1. Members are ascending in a cluster."""
        order = labels.argsort(stable=True)
        sizes = torch.bincount(labels, minlength=k)[wanted]
        place = labels.new_full((k,), -1)
        place[wanted] = torch.arange(len(wanted), device=labels.device)
        position = place[labels[order]]
        inside = position >= 0
        return cls(order[inside], sizes.cumsum(0) - sizes, position[inside])

    def sums(self, table: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of the rows of ``table`` (n, m) over each cluster, (t, m), in a fixed order (no atomics)."""
        if len(self.offsets) == 0:
            return table.new_empty(0, table.shape[1])
        scale = weights[self.members].to(table.dtype)
        return embedding_bag(self.members, table, self.offsets, mode="sum", per_sample_weights=scale)

    def totals(self, values: Tensor) -> Tensor:
        """Sums (t, c) of ``values`` (p, c), one row a member, over each cluster."""
        index = torch.arange(len(values), device=values.device)
        return embedding_bag(index, values, self.offsets, mode="sum")


class PairDistances:
    """All pairwise squared distances of n points, float32 (n, n): 4 n^2 bytes.

    Args:
        points: (n, m) float32, centred, entries of order one or less.
    """

    def __init__(self, points: Tensor, block: int | None = None) -> None:
        self.pairs = pairwise(points, block)
        self.bound = self.pairs.max()

    def to_points(self, index: Tensor) -> Tensor:
        """Squared distances (q, n) of the points ``index`` (q,) to all points."""
        return self.pairs.index_select(0, index)

    def to_means(self, clusters: Clusters, weights: Tensor) -> Tensor:
        """Squared distances (t, n) of the weighted means of ``clusters`` to all points."""
        out = clusters.sums(self.pairs, weights)
        w = weights[clusters.members].double()
        mine = out[clusters.position, clusters.members].double() * w
        both = clusters.totals(torch.stack([mine, w], 1))
        mass = both[:, 1]
        out.mul_((1 / mass).float()[:, None]).sub_((both[:, 0] / (2 * mass * mass)).float()[:, None])
        return out.clamp_(min=0)


class DirectDistances:
    """The same without the n x n matrix: each call multiplies by the points, in chunks.

    Points nearer to each other than the rounding of a float32 product count as equal.

    Args:
        points: (n, m) float32, centred, entries of order one or less.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self.squares = _squares(points)
        self.bound = 4 * self.squares.max()

    def to_points(self, index: Tensor) -> Tensor:
        """Squared distances (q, n) of the points ``index`` (q,) to all points."""
        out, scale = self._expand(self.points[index], self.squares[index])
        out.masked_fill_(out < scale.mul_(rounding(self.points.shape[1])), 0)
        out.scatter_(1, index[:, None], 0)
        return out

    def to_means(self, clusters: Clusters, weights: Tensor) -> Tensor:
        """Squared distances (t, n) of the weighted means of ``clusters`` to all points."""
        mass = clusters.totals(weights[clusters.members].double()[:, None])
        means = clusters.sums(self.points, weights).mul_((1 / mass).float())
        return self._expand(means, _squares(means))[0].clamp_(min=0)

    def _expand(self, rows: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        scale = squares[:, None] + self.squares
        return torch.addmm(scale, rows, self.points.T, alpha=-2), scale


def pairwise(points: Tensor, block: int | None = None) -> Tensor:
    """Squared distances (n, n) of points (n, m) float32: symmetric, zero diagonal, none negative.

    |x|^2 + |y|^2 - 2 x.y in float32 may be wrong by ``rounding(m)`` times |x|^2 + |y|^2. Columns of a block that hold
    a pair nearer than that are done again in float64, so that equal points come out at distance zero and nearly equal
    ones at their true, tiny, distance, not at noise that k-means++ could draw. Half of the product is computed.
    """
    n, m = points.shape
    step = block or max(512, math.ceil(n / 16))
    squares = _squares(points)
    out = room.empty((n, n), points)
    for top in range(0, n, step):
        room.pause()
        stop = min(top + step, n)
        rows = slice(top, stop)
        scale = squares[rows, None] + squares[:stop]
        panel = torch.addmm(scale, points[rows], points[:stop].T, alpha=-2)
        near = panel < scale.mul_(rounding(m))
        near[:, rows].fill_diagonal_(False)
        if bool(near.any()):
            columns = near.any(0).nonzero()[:, 0]
            for some in columns.split(step):
                panel[:, some] = _tile64(points[rows], points[some])
        corner = panel[:, rows].tril_(-1)
        corner += corner.T.clone()
        out[rows, :stop] = panel
        out[:top, rows] = panel[:, :top].T
    return out


def rounding(m: int) -> float:
    """Relative error allowed for a float32 inner product of m terms, in units of |x|^2 + |y|^2.

    The error of a blocked sum grows like the square root of the number of terms; the constants leave a margin of
    several times over what is seen.
    """
    return torch.finfo(torch.float32).eps * (8 + math.sqrt(m) / 4)


def _tile64(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    tile = torch.addmm(scale, a, b.T, alpha=-2)
    tile.masked_fill_(tile < scale * (64 * torch.finfo(torch.float64).eps), 0)
    return tile.float()


def _squares(points: Tensor) -> Tensor:
    return torch.linalg.vector_norm(points, dim=1).square()
