"""Lowering the inertia of a clustering: Lloyd's iterations, then exchanges of single points."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ffnkit.ops.distances import CHUNK, Clusters


class MeanDistances(Protocol):
    """Anything that gives squared distances from the means of clusters to all points."""

    def to_means(self, clusters: Clusters, weights: Tensor) -> Tensor:
        """Squared distances (t, n) of the weighted means of ``clusters`` to all points."""
        ...


class Clustering:
    """A clustering while it is being improved.

    ``costs`` (k, n) float32 is the one large array: what a point pays, per unit of its weight, in each other cluster;
    infinite in its own. Only the rows of clusters that changed are computed again.
    """

    def __init__(self, distances: MeanDistances, labels: Tensor, weights: Tensor, k: int) -> None:
        self.distances, self.labels, self.weights, self.k = distances, labels.clone(), weights, k
        # One column is enough to broadcast where all weights are equal.
        self.unit = weights[:1] if bool((weights == weights[0]).all()) else weights
        self.own = torch.empty_like(weights)
        self.mass = weights.new_empty(k, dtype=torch.float64)
        self.inertias = torch.empty_like(self.mass)
        self.costs = weights.new_empty(0, 0)
        self.restart(exchanging=False)

    def restart(self, exchanging: bool) -> None:
        """Compute everything again, for Lloyd's iterations or for exchanges."""
        self.exchanging = exchanging
        if self.k * len(self.labels) > CHUNK:
            self.costs = self.weights.new_empty(self.k, len(self.labels))
        self.update(torch.arange(self.k, device=self.labels.device))

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
            if self.exchanging:
                rows /= 1 + self.unit / mass[:, None].float()
            rows[clusters.position, clusters.members] = torch.inf
            if len(some) == self.k:
                self.costs = rows
            else:
                self.costs[some] = rows

    @property
    def inertia(self) -> Tensor:
        """Sum of weight times squared distance to the own mean, float64."""
        return self.inertias.sum()

    def gains(self) -> tuple[Tensor, Tensor]:
        """How much each point would save (n,), per unit of its weight, by its best move, and who may move (n,)."""
        spread = (self.inertias / self.mass).float()[self.labels] + self.own
        stay = self.own
        if self.exchanging:
            mass = self.mass[self.labels]
            # The second bound holds always; it replaces a difference of nearly equal numbers for a dominant weight.
            stay = torch.minimum(stay * (mass / (mass - self.weights)).float(), spread)
        sizes = self.counts[self.labels]
        gain = stay - self.costs.amin(0)
        noise = torch.finfo(torch.float32).eps * (8 + sizes.sqrt())
        return gain, (gain > noise * spread) & (sizes > 1)

    def targets(self, movers: Tensor) -> Tensor:
        """The best other cluster of each of ``movers``."""
        chunks = movers.split(max(1, CHUNK // self.k))
        # On the CPU the smallest of a contiguous row is found several times faster than that of a column.
        return torch.cat([self.costs.index_select(1, some).T.contiguous().argmin(1) for some in chunks])

    def move(self, movers: Tensor, targets: Tensor) -> None:
        """Put ``movers`` into the clusters ``targets``, refill clusters that lost everyone, update."""
        touched = torch.zeros(self.k, dtype=torch.bool, device=self.labels.device)
        touched[self.labels[movers]] = True
        touched[targets] = True
        self.labels[movers] = targets
        if not self.exchanging:
            taken = refill(self.labels, self.own * self.weights, self.k)
            touched[taken] = True
        self.update(touched.nonzero()[:, 0])


def improve(clustering: Clustering, max_iterations: int, tolerance: float) -> int:
    """Lloyd's iterations until nothing moves, then exchanges until none pays. Returns the number of iterations.

    A Lloyd iteration moves every point that is nearer to another mean. An exchange also counts how the two means
    follow: moving a point of weight w from cluster a to b changes the inertia by
    w W_b / (W_b + w) d_b^2 - w W_a / (W_a - w) d_a^2, so it leaves the local minima of Lloyd's iterations, which are
    poor where clusters are small. Moves that share no cluster are made together: their savings add up exactly. Where
    no exchange pays, every point is in the cluster of its nearest mean.

    Source: Hartigan and Wong, "Algorithm AS 136", Applied Statistics 28, 1979; Telgarsky and Vattani, "Hartigan's
    method: k-means clustering without Voronoi", AISTATS 2010.
    """
    done = 0
    for exchanging in (False, True):
        if clustering.exchanging != exchanging:
            clustering.restart(exchanging)
        while done < max_iterations:
            gain, may = clustering.gains()
            movers = may.nonzero()[:, 0]
            if len(movers) == 0:
                break
            done += 1
            if exchanging:
                # Those that save most first. At most k / 2 are made at once, so the first k are enough to choose from.
                saved = gain[movers] * clustering.weights[movers]
                movers = movers[saved.argsort(descending=True, stable=True)[: clustering.k]]
            targets = clustering.targets(movers)
            if exchanging:
                chosen = apart(clustering.labels[movers], targets, clustering.k)
                movers, targets = movers[chosen], targets[chosen]
            before = clustering.inertia
            clustering.move(movers, targets)
            # At tolerance 0 too: an iteration that does not lower the inertia moves points within rounding, and back.
            if bool(before - clustering.inertia <= tolerance * before):
                break
    return done


def apart(sources: Tensor, targets: Tensor, k: int, rounds: int = 4) -> Tensor:
    """Which moves (source, target), in order of preference, can be made together: no two of them share a cluster."""
    rank = torch.arange(len(sources), device=sources.device)
    free = torch.ones_like(rank, dtype=torch.bool)
    taken = torch.zeros_like(free)
    ends = torch.cat([sources, targets])
    for _ in range(rounds):
        offer = torch.where(free, rank, len(rank)).repeat(2)
        first = rank.new_full((k,), len(rank)).scatter_reduce_(0, ends, offer, "amin")
        wins = (first[sources] == rank) & (first[targets] == rank)
        taken |= wins
        used = torch.zeros(k, dtype=torch.bool, device=rank.device)
        used[ends[taken.repeat(2)]] = True
        free = ~(used[sources] | used[targets])
    return taken.nonzero()[:, 0]


def refill(labels: Tensor, paid: Tensor, k: int) -> Tensor:
    """Give each empty cluster the point that pays most where it is, in place; returns the clusters that changed.

    Args:
        labels: (n,) in 0..k-1, n at least k; changed in place. No cluster loses its last member.
        paid: (n,) weight times squared distance of each point to its centre.
    """
    counts = torch.bincount(labels, minlength=k)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return labels[:0]
    paid, changed = paid.clone(), []
    for cluster in empty:
        point = int(torch.where(counts[labels] > 1, paid, -1).argmax())
        changed += [cluster, int(labels[point])]
        counts[labels[point]] -= 1
        counts[cluster] += 1
        labels[point] = cluster
        paid[point] = 0
    return torch.tensor(changed, device=labels.device)
