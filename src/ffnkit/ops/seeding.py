"""Greedy k-means++: starting points that are far apart."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class PointDistances(Protocol):
    """Anything that gives squared distances from some points to all."""

    bound: Tensor

    def to_points(self, index: Tensor) -> Tensor:
        """Squared distances (q, n) of the points ``index`` (q,) to all points."""
        ...


def uniforms(k: int, restarts: int, seed: int) -> Tensor:
    """The draws of every restart, (restarts, k, trials) float64, made on the CPU: equal on every device.

    A restart's draws do not depend on how many follow it.
    """
    generator = torch.Generator().manual_seed(seed)
    trials = 2 + int(math.log(k))
    return torch.stack([torch.rand(k, trials, generator=generator, dtype=torch.float64) for _ in range(restarts)])


def plus_plus(distances: PointDistances, weights: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters around starting points drawn by greedy k-means++, all restarts side by side.

    Each step draws ``trials`` points with probability in proportion to weight times squared distance to the nearest
    start, and keeps the one that lowers the inertia most. A point at distance zero from a start is never drawn while
    another is left: cumulative sums are integers, so they are exact, the same in any order of summation, and flat
    over every such point.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007, section 2.2 and the greedy variant of section 5.

    Args:
        distances: squared distances of points.
        weights: (n,) positive float32.
        draws: (restarts, k, trials) uniform in [0, 1).

    Returns:
        Labels (restarts, n) of the nearest start, and the squared distances (restarts, n) to it. A cluster is empty
        only where fewer than k points differ.
    """
    restarts, k, trials = draws.shape
    n = len(weights)
    run = torch.arange(restarts, device=weights.device)
    labels = torch.zeros(restarts, n, dtype=torch.int64, device=weights.device)
    # Powers that keep the sum of n integers below 2^62.
    shares = weights.double() * (2.0**61 / weights.double().sum())
    start = _draw(shares.repeat(restarts, 1), draws[:, 0, :1])
    closest = distances.to_points(start[:, 0])
    ticks = weights.double() * (2.0**61 / (n * weights.max().double() * distances.bound.double().clamp(min=1e-300)))
    for step in range(1, k):
        drawn = _draw(closest * ticks, draws[:, step])
        rows = distances.to_points(drawn.view(-1)).view(restarts, trials, n)
        torch.minimum(rows, closest[:, None], out=rows)
        best = (rows @ weights).argmin(1)
        nearer = rows[run, best]
        labels.masked_fill_(nearer < closest, step)
        closest = nearer
    return labels, closest


def _draw(ticks: Tensor, uniform: Tensor) -> Tensor:
    """Indices (r, q) drawn in proportion to the whole part of ticks (r, n) by the uniforms (r, q)."""
    cumulative = ticks.long().cumsum(1)
    total = cumulative[:, -1:]
    aim = torch.minimum((uniform * total).long(), total - 1)
    return torch.searchsorted(cumulative, aim, right=True)
