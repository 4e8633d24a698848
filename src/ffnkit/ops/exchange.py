"""Lowering the inertia of a clustering by moving points, with their effect on the means counted in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ffnkit.ops import room
from ffnkit.ops.distances import CHUNK, Clusters


class MeanDistances(Protocol):
    """Anything that gives squared distances from the means of clusters to all points."""

    def to_means(self, clusters: Clusters, weights: Tensor) -> Tensor:
        """Squared distances (t, n) of the weighted means of ``clusters`` to all points."""
        ...


class Clustering:
    """A clustering while it is being improved; no cluster is or becomes empty.

    Moving a point of weight w from cluster a to b changes the inertia by
    w W_b / (W_b + w) d_b^2 - w W_a / (W_a - w) d_a^2, where d are distances to the means and W sums of weights.
    ``costs`` (k, n) float32 is the one large array: the first term, per unit of w, for every cluster but the point's
    own, where it is infinite. Only the rows of clusters that changed are computed again.
    """

    def __init__(self, distances: MeanDistances, labels: Tensor, weights: Tensor, k: int) -> None:
        self.distances, self.labels, self.weights, self.k = distances, labels.clone(), weights, k
        # One column is enough to broadcast where all weights are equal.
        self.unit = weights[:1] if bool((weights == weights[0]).all()) else weights
        self.own = torch.empty_like(weights)
        self.mass = weights.new_empty(k, dtype=torch.float64)
        self.inertias = torch.empty_like(self.mass)
        self.costs = weights.new_empty(0, 0)
        if k * len(labels) > CHUNK:
            self.costs = room.empty((k, len(labels)), weights)
        self.update(torch.arange(k, device=labels.device))

    @property
    def inertia(self) -> Tensor:
        """Sum of weight times squared distance to the own mean, float64."""
        return self.inertias.sum()

    def update(self, changed: Tensor) -> None:
        """Compute what belongs to the clusters ``changed`` (ascending) again."""
        self.counts = torch.bincount(self.labels, minlength=self.k)
        for some in changed.split(max(1, CHUNK // len(self.labels))):
            clusters = Clusters.of(self.labels, some, self.k)
            rows = self.distances.to_means(clusters, self.weights)
            own = rows[clusters.position, clusters.members]
            self.own[clusters.members] = own
            w = self.weights[clusters.members].double()
            mass, inertia = clusters.totals(torch.stack([w, w * own], 1)).unbind(1)
            self.mass[some], self.inertias[some] = mass, inertia
            rows /= 1 + self.unit / mass[:, None].float()
            rows[clusters.position, clusters.members] = torch.inf
            if len(some) == self.k:
                self.costs = rows
            else:
                self.costs[some] = rows

    def gains(self) -> tuple[Tensor, Tensor]:
        """How much each point would save (n,), per unit of its weight, by its best move, and who may move (n,)."""
        spread = (self.inertias / self.mass).float()[self.labels] + self.own
        mass = self.mass[self.labels]
        # The second bound holds always; it replaces a difference of nearly equal numbers for a dominant weight.
        stay = torch.minimum(self.own * (mass / (mass - self.weights)).float(), spread)
        sizes = self.counts[self.labels]
        gain = stay - self.costs.amin(0)
        noise = torch.finfo(torch.float32).eps * (8 + sizes.sqrt())
        return gain, (gain > noise * spread) & (sizes > 1)

    def targets(self, movers: Tensor) -> Tensor:
        """The best other cluster of each of ``movers``."""
        chunks = movers.split(max(1, (CHUNK >> 4) // self.k))  # each chunk is copied twice
        # On the CPU the smallest of a contiguous row is found several times faster than that of a column.
        return torch.cat([self.costs.index_select(1, some).T.contiguous().argmin(1) for some in chunks])

    def move(self, points: Tensor, targets: Tensor) -> None:
        """Put ``points`` into the clusters ``targets`` and update."""
        touched = torch.zeros(self.k, dtype=torch.bool, device=self.labels.device)
        touched[self.labels[points]] = True
        touched[targets] = True
        self.labels[points] = targets
        self.update(touched.nonzero()[:, 0])


def improve(clustering: Clustering, max_iterations: int, tolerance: float) -> int:
    """Move points to other clusters, many in a round, until no move pays. Returns the number of rounds.

    First, large clusters take part in several moves of a round, as long as that lowers the inertia. Then moves of a
    round share no cluster, so that their savings add up exactly. Where no single move pays, every point is in the
    cluster of its nearest mean, so Lloyd's iterations would end there as well; they also end far above, where
    clusters are small: a point holds the mean of its cluster near itself.

    Source: Hartigan and Wong, "Algorithm AS 136", Applied Statistics 28, 1979; Telgarsky and Vattani, "Hartigan's
    method: k-means clustering without Voronoi", AISTATS 2010.
    """
    done = 0
    for shared in (True, False):
        while done < max_iterations:
            gain, may = clustering.gains()
            movers = may.nonzero()[:, 0]
            if len(movers) == 0:
                return done
            done += 1
            before = clustering.inertia
            points, targets = exchanges(clustering, gain, movers, shared)
            home = clustering.labels[points]
            clustering.move(points, targets)
            saved = before - clustering.inertia
            if bool(saved < 0):  # the means moved too far, or what was to be saved is below rounding
                clustering.move(points, home)
            if bool(saved <= tolerance * before):
                break
    return done


def exchanges(clustering: Clustering, gain: Tensor, movers: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """The moves of a round, (point, cluster), of ``movers``: those that save most, each cluster up to its quota.

    The quota is one move, or with ``shared`` a quarter of the members: so few do not shift the mean far.
    """
    quota = torch.ones_like(clustering.counts)
    if shared:
        quota = torch.maximum(quota, clustering.counts // 4)
    saved = gain[movers] * clustering.weights[movers]
    # Each move takes two places, so twice as many as there can be are enough to choose from.
    movers = movers[saved.argsort(descending=True, stable=True)[: int(quota.sum())]]
    targets = clustering.targets(movers)
    chosen = within(clustering.labels[movers], targets, quota)
    return movers[chosen], targets[chosen]


def within(sources: Tensor, targets: Tensor, quota: Tensor, rounds: int = 4) -> Tensor:
    """Which moves (source, target), in order of preference, to make so that no cluster is in more than its quota."""
    k = len(quota)  # of moves that are made or out: a cluster that has room for none
    left, nowhere = torch.cat([quota, quota.new_zeros(1)]), sources.new_full((), k)
    each = torch.arange(2 * len(sources), device=sources.device)
    alive = torch.ones_like(sources, dtype=torch.bool)
    taken = torch.zeros_like(alive)

    def sizes(ends: Tensor) -> Tensor:
        return left.new_zeros(k + 1).scatter_add_(0, ends, torch.ones_like(ends))

    for _ in range(rounds):  # none of them makes the host wait
        pairs = torch.where(alive[:, None], torch.stack([sources, targets], 1), nowhere)
        ends = pairs.view(-1)
        order, held = ends.argsort(stable=True), sizes(ends)
        place = torch.empty_like(order)
        place[order] = each - (held.cumsum(0) - held)[ends[order]]
        fits = (place < left[ends]).view(-1, 2).all(1)
        taken |= fits
        left -= sizes(torch.where(fits[:, None], pairs, nowhere).view(-1))
        left[k] = 0
        alive &= ~fits & (left[sources] > 0) & (left[targets] > 0)
    return taken.nonzero()[:, 0]


def refill(labels: Tensor, paid: Tensor, k: int) -> None:
    """Give each empty cluster the point that pays most where it is, in place.

    Args:
        labels: (n,) in 0..k-1, n at least k; changed in place. No cluster loses its last member.
        paid: (n,) weight times squared distance of each point to its centre.
    """
    counts = torch.bincount(labels, minlength=k)
    paid = paid.clone()
    for cluster in (counts == 0).nonzero():
        point = torch.where(counts[labels] > 1, paid, -1).argmax(0, keepdim=True)
        counts[labels[point]] -= 1
        counts[cluster] += 1
        labels[point] = cluster
        paid[point] = 0
