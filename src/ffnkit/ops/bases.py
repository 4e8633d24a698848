"""Bases in which gradients are sparse: the factors of a higher-order SVD, from streamed sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnkit.ops.routes import route

Zeros = Callable[..., Tensor]
DOUBLE_UP_TO = 4096  # rows; a float64 Gram matrix of more takes over 128 MB, and its eigenvectors minutes
TOKENS = 2048  # of a training step, where the number is not known


class Grams:
    """Sums of G G^T (out, out) and G^T G (in, in) over gradients G (out, in) of one shape.

    Memory: out^2 + in^2 numbers, however many gradients there are. Summed in float64 up to 4,096 rows, beyond in
    float32: directions of small energy lose their order there, which costs nothing.

    Args:
        zeros: makes a tensor of zeros of a shape and dtype: where the sums are kept.
    """

    def __init__(self, out: int, inner: int, zeros: Zeros = torch.zeros) -> None:
        self.left = zeros((out, out), dtype=_exact(out))
        self.right = zeros((inner, inner), dtype=_exact(inner))

    def add(self, gradient: Tensor) -> None:
        """One more gradient; its products are formed in float32."""
        g = gradient.detach().float()
        self.left += (g @ g.T).to(self.left.device)
        self.right += (g.T @ g).to(self.right.device)

    def bases(self, reach: float = 1.0, count: int = 1) -> tuple[Basis, Basis]:
        """The bases of the rows' side (V, (m, out)) and of the columns' side (U, (l, in)).

        Args:
            reach: as in :func:`eigenbasis`. count: there are to be four times as many entries, m times l, to choose
                so many of; where a side has no more, all of it.

        Source: SparseGrad (arXiv 2410.07383), section 3.1: V = u2^T and U = u3^T of the HOSVD of stacked gradients;
            u2 are the eigenvectors of the sum of G G^T, u3 those of the sum of G^T G, so no stack is needed.
        """
        (out, inner), side = (len(self.left), len(self.right)), 2 * math.isqrt(count) + 2
        rows = min(out, max(side, -(-4 * count // inner)))
        columns = min(inner, max(side, -(-4 * count // out)))
        return eigenbasis(self.left, reach, rows), eigenbasis(self.right, reach, columns)


@dataclass(frozen=True)
class Basis:
    """Leading eigenvectors as rows (m, n), float32, and their eigenvalues (m,); ``total`` sums up all eigenvalues."""

    rows: Tensor
    sizes: Tensor
    total: float


def eigenbasis(gram: Tensor, reach: float = 1.0, least: int = 1) -> Basis:
    """The eigenvectors of most weight of a symmetric positive matrix, that of the largest eigenvalue first.

    Args:
        reach: so many are kept that their eigenvalues make this share of the sum, and ``least`` at least.

    The sign of each is fixed (its largest entry is positive), so that equal sums give equal bases.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = float(values.sum())
    kept = len(values)
    if reach < 1 and total > 0:
        kept = int((values.cumsum(0) < reach * total).sum()) + 1
    kept = min(max(kept, least), len(values))
    rows = vectors[:, :kept].T
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return Basis((rows * signs).float().contiguous(), values[:kept].clone(), total)


def turned(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """V G U^T: the gradient (out, in) in the bases V (r, out) and U (c, in); (r, c).

    Source: SparseGrad (arXiv 2410.07383), section 3: gW~ = V gW U^T.
    """
    result = gradient if left is None else left.to(gradient) @ gradient
    return result if right is None else result @ right.to(gradient).T


def top_share(energies: Tensor, count: int) -> float:
    """The sum of the ``count`` largest entries."""
    flat = energies.flatten()
    return float(torch.topk(flat, min(count, flat.numel()), sorted=False).values.sum(dtype=torch.float64))


def core_of(
    energies: Tensor,
    count: int,
    share: float,
    out: int,
    inner: int,
    *,
    fresh: Tensor | None = None,
    room: int = 1,
    tokens: int = TOKENS,
) -> tuple[int, int]:
    """The cheapest leading rectangle (r, c) whose ``count`` largest entries hold ``share`` of what the largest hold.

    Cheapest: by the operations of a training step (``ops.routes``). Fewer rows never need fewer columns, so one walk
    along the border of what is enough sees every candidate on a grid of 32 a side.

    Args:
        energies: (m, l) of the entries of a weight (out, in), in the order of the bases.
        fresh: energies of other gradients, on which the entries are judged that the first ones choose: those that a
            rectangle was taken from flatter it.
        room: the rectangle has so many times ``count`` entries at least, if there are as many.
        tokens: of a step.
    """
    rows, columns = energies.shape
    judged = energies if fresh is None else fresh
    least, free = min(room * count, rows * columns), _held(energies, judged, count)

    def enough(r: int, c: int) -> bool:
        return r * c >= least and _held(energies[:r, :c], judged[:r, :c], count) >= share * free

    r_step, c_step = -(-rows // 32), -(-columns // 32)
    best, found = float("inf"), (rows, columns)
    r, c = rows, min(c_step, columns)
    while True:
        if enough(r, c):
            cost = route(out, inner, r, c, tokens).cost
            if cost < best:
                best, found = cost, (r, c)
            if r == 1:
                break
            r = max(r - r_step, 1)
        elif c < columns:
            c = min(c + c_step, columns)
        else:
            break
    return found


def _held(energies: Tensor, judged: Tensor, count: int) -> float:
    """What the entries hold in ``judged`` that are largest in ``energies``."""
    flat = energies.flatten()
    chosen = torch.topk(flat, min(count, flat.numel()), sorted=False).indices
    return float(judged.flatten()[chosen].sum(dtype=torch.float64))


def _exact(size: int) -> torch.dtype:
    return torch.float64 if size <= DOUBLE_UP_TO else torch.float32
