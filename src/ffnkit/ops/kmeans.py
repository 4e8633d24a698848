"""k-means on the rows of a matrix, as one matrix product and cheap steps on its result."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnkit.errors import FfnkitError
from ffnkit.ops import room
from ffnkit.ops.distances import Clusters, DirectDistances, PairDistances, full_precision, one_thread
from ffnkit.ops.exchange import Clustering, improve, refill
from ffnkit.ops.seeding import plus_plus, uniforms

GRAM_LIMIT = 4 << 30
"""Bytes of the n x n matrix above which distances are computed anew at each step (n = 32768 in float32)."""
SHORT = 8192
"""Points up to which the steps after the matrix product are too short to be shared among threads."""


@dataclass(frozen=True)
class KMeans:
    """A clustering of n points of m coordinates into k clusters, numbered by their first member.

    Attributes:
        labels: (n,) int64, the cluster of each point.
        centroids: (k, m), the (weighted) means, in the floating type of the points (at least float32).
        counts: (k,) int64, the number of members, 1 or more.
        inertia: sum of (weight times) squared distance of each point to its centroid, in float64.
        iterations: rounds of moves of the best restart.

    For a batch of E matrices the tensors have a leading axis E, inertia is the sum and iterations the most.
    """

    labels: Tensor
    centroids: Tensor
    counts: Tensor
    inertia: float
    iterations: int


def kmeans(
    points: Tensor,
    k: int,
    *,
    seed: int = 0,
    restarts: int = 1,
    max_iterations: int = 1000,
    tolerance: float = 0.0,
    weights: Tensor | None = None,
    gram_limit_bytes: int = GRAM_LIMIT,
) -> KMeans:
    """Cluster the rows of ``points``: greedy k-means++, then moves of points by Hartigan's rule; the best restart.

    Runs on the device of ``points``. The same seed gives the same result, whatever the global random state. Equal
    points share a cluster as long as there are at most k different ones; where there are fewer, they are split so
    that no cluster is empty. At the end every point is in the cluster of its nearest centroid up to the rounding of
    float32 distances, unless ``max_iterations`` or ``tolerance`` stopped it earlier.

    Memory beyond the points, in bytes: 4 n^2 for the pairwise distances, and the larger of 4 n m (a centred copy,
    while they are computed) and 4 n k. Above ``gram_limit_bytes`` the n^2 term is dropped and the copy stays.
    On the CPU, for up to 8192 points, restarts run side by side, each with 4 n k bytes.
    Time: one product of n^2 m multiply-adds / 2; then O(n log(k)) a starting point and O(n) a member that changes.

    Args:
        points: (n, m), or (E, n, m) for E separate problems, floating.
        k: number of clusters, 1..n.
        seed: of all random draws.
        restarts: number of starts; the first does not depend on how many follow.
        max_iterations: most rounds of moves of a restart.
        tolerance: stop when a round lowers the inertia by no more than this share of it; 0: when no move pays.
        weights: (n,) or (E, n), importance of each point, none negative; all 1 when None.
        gram_limit_bytes: most bytes for the pairwise distances.

    Raises:
        FfnkitError: wrong rank or type, k outside 1..n, NaN or infinite points, bad weights or settings.
    """
    if points.dim() == 3:
        each = [
            kmeans(
                matrix,
                k,
                seed=seed,
                restarts=restarts,
                max_iterations=max_iterations,
                tolerance=tolerance,
                weights=None if weights is None else weights[e],
                gram_limit_bytes=gram_limit_bytes,
            )
            for e, matrix in enumerate(points)
        ]
        return _stack(each, points)
    points = points.detach()
    low, high = _check(points, k, restarts, max_iterations, tolerance, weights)
    n = len(points)
    with full_precision(points.device):
        if k == n:
            return _finish(points, torch.arange(n, device=points.device), weights, k, 0)
        first, same = distinct(points)
        if len(first) <= k:
            return _finish(points, _split(first, same, k), weights, k, 0)
        mass = _masses(same, len(first), weights)
        distances = _distances(_centred(points if len(first) == n else points[first], low, high), gram_limit_bytes)
        labels, iterations = _best(distances, mass, uniforms(k, restarts, seed), max_iterations, tolerance)
        return _finish(points, labels[same], weights, k, iterations)


def _best(
    distances: PairDistances | DirectDistances, mass: Tensor, draws: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    """Labels of the restart with the lowest inertia, and its number of iterations."""
    k = draws.shape[1]

    def run(start: tuple[Tensor, Tensor]) -> tuple[float, Tensor, int]:
        labels, paid = start
        refill(labels, paid * mass, k)
        clustering = Clustering(distances, labels, mass, k)
        iterations = improve(clustering, max_iterations, tolerance)
        return float(clustering.inertia), clustering.labels, iterations

    short = len(mass) <= SHORT and mass.device.type == "cpu"
    with one_thread() if short else nullcontext(1) as cores:
        starts = list(zip(*plus_plus(distances, mass, draws.to(mass.device)), strict=True))
        if short and min(cores, len(starts)) > 1:
            # Restarts do not depend on each other: one thread each, in the place of many threads for short steps.
            with ThreadPoolExecutor(min(cores, len(starts))) as pool:
                results = list(pool.map(run, starts))
        else:
            results = [run(start) for start in starts]
    _, best, iterations = min(results, key=lambda result: result[0])
    return best, iterations


def distinct(points: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each set of equal rows, ascending (u,), and for each row which of them it equals (n,).

    Rows are told apart by a 64-bit sum over their bits, of a few columns first; each match is then compared in full.
    """
    n, m = points.shape
    device = points.device
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[points.element_size()]

    def keys(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(rows.shape[1])
        odd = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
        # Adding zero turns -0.0 into 0.0: equal numbers, equal bits.
        return ((rows + 0.0).view(bits) * odd.to(device)).sum(1)

    representative = torch.arange(n, device=device)
    _, group, size = keys(points[:, :: max(1, m // 64)].contiguous()).unique(return_inverse=True, return_counts=True)
    suspects = (size[group] > 1).nonzero()[:, 0]
    if len(suspects):
        key = torch.cat([keys(points[some]) for some in suspects.split(max(1, (1 << 24) // m))])
        values, group = key.unique(return_inverse=True)
        lowest = suspects.new_full((len(values),), n).scatter_reduce_(0, group, suspects, "amin")
        other = lowest[group]
        equal = torch.cat(
            [
                (points[i] == points[j]).all(1)
                for i, j in zip(
                    suspects.split(max(1, (1 << 24) // m)), other.split(max(1, (1 << 24) // m)), strict=True
                )
            ]
        )
        representative[suspects[equal]] = other[equal]
    first = (representative == torch.arange(n, device=device)).nonzero()[:, 0]
    place = torch.empty_like(representative)
    place[first] = torch.arange(len(first), device=device)
    return first, place[representative]


def _distances(points: Tensor, limit: int) -> PairDistances | DirectDistances:
    return PairDistances(points) if 4 * len(points) ** 2 <= limit else DirectDistances(points)


def _centred(points: Tensor, low: float, high: float) -> Tensor:
    """Points less their mean, times a power of two that brings them to order one, float32 (n, m).

    A common offset would cost digits in every product, and large or tiny numbers would leave the range of squares.
    """
    values = points if points.dtype == torch.float64 else points.float()
    widest = 1000 if values.dtype == torch.float64 else 120
    exponent = math.frexp(high / 2 - low / 2)[1] + 1
    scale = 2.0 ** -max(-widest, min(exponent, widest))
    values = room.made(torch.mul, values, scale, shape=values.shape, like=values)
    return values.sub_(values.mean(0)).float()


def _masses(same: Tensor, u: int, weights: Tensor | None) -> Tensor:
    """Weights (u,) float32 of the different points, about 1. None is zero: even weightless points need a cluster."""
    if weights is None:
        return torch.bincount(same, minlength=u).float()
    members = Clusters.of(same, torch.arange(u, device=same.device), u)
    weights = weights.detach().to(same.device).double()
    mass = members.sums(weights[:, None], torch.ones_like(weights))[:, 0]
    return (mass / mass.mean()).clamp(min=1e-12).float()


def _split(first: Tensor, same: Tensor, k: int) -> Tensor:
    """Labels for at most k different points: a cluster each, and the first of the repeated ones fill the rest."""
    labels = same.clone()
    spare = torch.ones_like(same, dtype=torch.bool)
    spare[first] = False
    extra = spare.nonzero()[: k - len(first), 0]
    labels[extra] = torch.arange(len(first), k, device=same.device)
    return labels


def _finish(points: Tensor, labels: Tensor, weights: Tensor | None, k: int, iterations: int) -> KMeans:
    """Number the clusters by first member; centroids and inertia in float64 from the points."""
    n, m = points.shape
    device = points.device
    index = torch.arange(n, device=device)
    lowest = index.new_full((k,), n).scatter_reduce_(0, labels, index, "amin")
    rank = torch.empty_like(lowest)
    rank[lowest.argsort()] = torch.arange(k, device=device)
    labels = rank[labels]
    clusters = Clusters.of(labels, torch.arange(k, device=device), k)
    ones = torch.ones(n, dtype=torch.float64, device=device)
    given = ones if weights is None else weights.detach().to(device).double()
    mass = clusters.sums(given[:, None], ones)[:, 0]
    # A cluster without weight has the plain mean of its members.
    mean_weights = torch.where(mass[labels] > 0, given, ones)
    mass = clusters.sums(mean_weights[:, None], ones)
    centroids = room.empty((k, m), points, torch.promote_types(points.dtype, torch.float32))
    paid = torch.zeros_like(ones)
    for columns in torch.arange(m).split(max(1, (1 << 20) // n)):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        values = points[:, part].double()
        means = clusters.sums(values, mean_weights) / mass
        centroids[:, part] = means
        paid += (values - means[labels]).square_().sum(1)
    counts = torch.bincount(labels, minlength=k)
    return KMeans(labels, centroids, counts, float((paid * given).sum()), iterations)


def _stack(each: list[KMeans], points: Tensor) -> KMeans:
    if not each:
        raise FfnkitError("k-means", f"a batch of shape {tuple(points.shape)}", "Give at least one matrix")
    return KMeans(
        torch.stack([one.labels for one in each]),
        torch.stack([one.centroids for one in each]),
        torch.stack([one.counts for one in each]),
        math.fsum(one.inertia for one in each),
        max(one.iterations for one in each),
    )


def _check(
    points: Tensor, k: int, restarts: int, max_iterations: int, tolerance: float, weights: Tensor | None
) -> tuple[float, float]:
    """Refuse what cannot be clustered. Returns the smallest and the largest entry."""
    if points.dim() != 2 or not points.is_floating_point() or points.numel() == 0:
        found = f"a {points.dtype} tensor of shape {tuple(points.shape)}"
        raise FfnkitError("k-means", found, "Give a floating matrix (n, m) or a batch (E, n, m), not empty")
    n = len(points)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise FfnkitError(f"k-means with k={k!r}", f"{n} points", f"Choose a whole number from 1 to {n}")
    if restarts < 1 or max_iterations < 1 or not 0 <= tolerance < 1:
        found = f"restarts={restarts}, max_iterations={max_iterations}, tolerance={tolerance}"
        raise FfnkitError("k-means", found, "Give 1 or more of the first two and a tolerance in [0, 1)")
    low, high = (float(value) for value in points.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FfnkitError("k-means", "NaN or infinite points", "Check the weights of the model")
    if weights is not None:
        if weights.shape != (n,):
            raise FfnkitError("k-means weights", f"shape {tuple(weights.shape)}", f"Give one a point, ({n},)")
        if not bool(torch.isfinite(weights).all() & (weights >= 0).all() & (weights > 0).any()):
            raise FfnkitError("k-means weights", "NaN, infinite, negative or all zero", "Give some above zero")
    return low, high
