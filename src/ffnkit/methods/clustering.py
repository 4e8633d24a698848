"""Clustering with root counts: as MLP Fusion, but the root of each cluster's size stands on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ffnkit import blocks
from ffnkit.edits import Edit, Resize
from ffnkit.methods.common import Batch, Width, check_counts, each, targets
from ffnkit.ops.clusters import cluster_neurons
from ffnkit.plans import Draft, Progress


@dataclass(frozen=True)
class Clustering:
    """Narrow each FFN to the centroids of its neurons, P^(1/2) on up, its bias and down.

    ``y = down P^(1/2) act(P^(1/2) (up x + up_bias)) + down_bias``. With ReLU this equals MLP Fusion and its kernel
    under SGD; with other activations it is another function.

    Attributes:
        width: neurons left in each FFN: an int counts them, a float is a share (1.0 = all); or one by FFN's name.
        layers: which layers, e.g. "all", "last:8", "4-11", "4,5,9", "encoder:last:4".
        seed: of the k-means starts.
        restarts: k-means starts; the best is kept.

    Source: MLP Fusion (arXiv 2307.08941), the baseline "Clustering".
    Differs: the paper has no gated FFNs; there the root stands on up and down and the gate is the plain mean, which
        keeps the function of MLP Fusion exactly.
    """

    width: Width
    layers: str = "all"
    seed: int = 0
    restarts: int = 10

    name: ClassVar[str] = "clustering"
    summary: ClassVar[str] = "cluster neurons, the root of the cluster sizes on both sides (baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def targets(self, model: nn.Module) -> list[tuple[blocks.FFN, int]]:
        """The FFNs to narrow and their new widths. Raises FfnkitError where layers or width do not fit."""
        check_counts(self, seed=0, restarts=1)
        return targets(model, self.layers, self.width)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for ffn, width, neurons in each(self.targets(model), progress, "clustering"):
            balanced = neurons.gated and ffn.linear_in_up
            labels, loss = cluster_neurons(neurons, width, seed=self.seed, restarts=self.restarts, balanced=balanced)
            edits.append(Resize(ffn.name, width=width, labels=labels, balance=balanced, root=True))
            quantities[ffn.name] = {"within-cluster variance": loss}
        return Draft(tuple(edits), quantities)
