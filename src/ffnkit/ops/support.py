"""Which entries of a weight train: the support of a sparse update, always exactly so many.

Every way is free of scale: a weight times a number has the support of the weight, where the product is exact. GreBsmo
multiplies small differences by millions: a weight that was rounded anew, in float32 say, is another one to it. The
other ways change entries only that are equal to within rounding. Ties go to the first entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EXACT = 1024  # shorter side up to which all singular vectors are computed
OVERSAMPLED, ITERATIONS = 16, 6  # of the randomized singular vectors beyond
THRESHOLD = 0.24  # in standard deviations of the weight: the released code's 0.01 at its scale
STEP = 5  # rows that each round of GreBsmo appends
LARGEST_RANK = 496  # what its 100 rounds come to


def largest(scores: Tensor, count: int) -> Tensor:
    """(count,) int64, ascending: the flat places of the largest scores; ties go to the first ones.

    Raises:
        ValueError: not so many scores are there, or one is not a number.
    """
    flat = scores.flatten()
    if not 0 <= count <= len(flat):
        raise ValueError(f"{count} of {len(flat)} entries")
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=flat.device)
    edge = torch.topk(flat, count, sorted=False).values.min()
    if bool(torch.isnan(flat).any()):
        raise ValueError("a score is not a number")
    above = (flat > edge).nonzero()[:, 0]
    equal = (flat == edge).nonzero()[: count - len(above), 0]
    return torch.cat([above, equal]).sort().values


def magnitude(weight: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest entries."""
    return largest(weight.abs(), count)


def drawn(size: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) int64, ascending: places drawn from ``range(size)`` without repetition."""
    if not 0 <= count <= size:
        raise ValueError(f"{count} of {size} entries")
    if 4 * count > size or size <= 1 << 20:
        return torch.randperm(size, generator=generator)[:count].sort().values
    found = torch.zeros(0, dtype=torch.int64)
    while len(found) < count:  # repetitions are drawn again
        more = torch.randint(size, (count - len(found),), generator=generator)
        found = torch.unique(torch.cat([found, more]))
    return found


def svd(weight: Tensor, rank: int, count: int, seed: int = 0) -> Tensor:
    """The places of the ``count`` largest entries of what a truncated SVD leaves of the weight.

    Rank is confined to half of the shorter side: beyond, there is nothing but rounding left to choose from.
    """
    scaled = _scaled(weight)
    return largest(residual(scaled, _confined(rank, weight, 0.5), seed).abs_(), count)


def residual(weight: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The weight less its best approximation of that rank; beyond a side of 1024 by randomized singular vectors."""
    if rank == 0:
        return weight.clone()
    tall = weight.shape[0] > weight.shape[1]
    wide = weight.T if tall else weight
    basis = _leading(wide, rank) if len(wide) <= EXACT else _sketched(wide, rank, seed)
    left = torch.addmm(wide, basis, basis.T @ wide, alpha=-1)
    return left.T if tall else left


def grebsmo(
    weight: Tensor,
    count: int,
    *,
    rank: int = LARGEST_RANK,
    rounds: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The places of the ``count`` largest entries of S in W ~ U V + S, by greedy bilateral smoothing.

    Each round: S = 0; twice, U = orthonormal columns of (W - S) V^T, V = U^T (W - S), S = W - U V where it is at least
    0.24 std(W) in size; then five rows are appended to V, from what is left. All in float64, from the weight in units
    of its standard deviation rounded to float32: the last bits of a scaled weight change nothing.

    Args:
        rank: at most; rounds end where V would have more rows, or more than 0.65 of the shorter side.

    Source: GreBsmo (Zhou and Tao, AISTATS 2013), as the released code of DSEE (arXiv 2111.00160) has it.
    Differs: the threshold goes with the weight, 0.24 std(W) for 0.01. The appended rows, the first of R in the
        decomposition of what is left into Q R, are taken from Q of its first columns. Where fewer entries of S are not
        zero than are asked for, the largest of |W - U V| fill up.
    """
    w = _scaled(weight).double()
    limit, least = _confined(rank, weight, 0.65), THRESHOLD * float(w.std())
    v = torch.randn(1, w.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(w.device)
    s, left = torch.zeros_like(w), w
    for number in range(rounds):
        s = torch.zeros_like(w)
        for _ in range(2):
            rest = w - s
            u = torch.linalg.qr(rest @ v.T)[0]
            v = u.T @ rest
            left = torch.addmm(w, u, v, alpha=-1)
            s = torch.where(left.abs() < least, 0, left)
        if progress is not None:
            progress(number + 1, rounds)
        if number + 1 == rounds or len(v) + STEP > limit:
            break
        v = torch.cat([v, appended(left - s)])
    sizes = s.abs()
    missing = count - int((sizes > 0).sum())
    if missing > 0:  # all of S, and the largest of the rest
        sizes = torch.where(sizes > 0, math.inf, left.abs())
    return largest(sizes, count)


def appended(left: Tensor, step: int = STEP) -> Tensor:
    """The first rows of R in ``left = Q R``: Q of the first columns decides them."""
    q = torch.linalg.qr(left[:, :step])[0]
    return q.T @ left


# --- helpers ------------------------------------------------------------------------------------------------------


def _scaled(weight: Tensor) -> Tensor:
    """The weight in units of its standard deviation (a constant one as it is), rounded to float32."""
    exact = weight.detach().double()
    size = float(exact.std()) if exact.numel() > 1 else 1.0
    if not math.isfinite(size):
        raise ValueError("the weight is not finite")
    return (exact / size if size > 0 else exact).float()


def _confined(rank: int, weight: Tensor, share: float) -> int:
    return max(0, min(rank, int(share * min(weight.shape))))


def _leading(wide: Tensor, rank: int) -> Tensor:
    """(rows, rank): leading left singular vectors, from the products of rows."""
    exact = wide.double()
    vectors = torch.linalg.eigh(exact @ exact.T)[1]
    return vectors[:, -rank:].to(wide.dtype)


def _sketched(wide: Tensor, rank: int, seed: int) -> Tensor:
    """(rows, rank): nearly the leading left singular vectors.

    Source: Halko, Martinsson and Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    draw = torch.randn(len(wide), rank + OVERSAMPLED, generator=torch.Generator().manual_seed(seed)).to(wide)
    q = torch.linalg.qr(draw)[0]
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(wide @ (wide.T @ q))[0]
    u = torch.linalg.svd(q.T @ wide, full_matrices=False)[0]
    return (q @ u)[:, :rank]
