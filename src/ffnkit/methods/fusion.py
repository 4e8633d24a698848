"""MLP Fusion: cluster the neurons of an FFN and keep each cluster's mean, times the cluster's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ffnkit import blocks
from ffnkit.edits import Edit, Resize, Swap
from ffnkit.methods.common import Batch, Width, check_counts, each, targets
from ffnkit.ops.clusters import cluster_neurons
from ffnkit.ops.neurons import cluster_sizes
from ffnkit.plans import Draft, Progress


@dataclass(frozen=True)
class Fusion:
    """Narrow each FFN to the centroids of its neurons, keeping its neural tangent kernel close.

    ``y = down P act(up x + up_bias) + down_bias`` with up, up_bias, down the centroids and P the cluster sizes. P is
    a fixed factor that stays apart while tuning, so that under Adam a centroid moves the output as its members would
    have; ``fold`` multiplies it into down exactly.

    Attributes:
        width: neurons left in each FFN: an int counts them, a float is a share (1.0 = all); or one by FFN's name.
        layers: which layers, e.g. "all", "last:8", "4-11", "4,5,9", "encoder:last:4".
        seed: of the k-means starts.
        restarts: k-means starts; the best is kept. The paper takes 30; further starts cost little here.

    Source: Wei, Guo, Chen, He, "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", ICML 2023,
        arXiv 2307.08941; each expert of a mixture on its own and routers untouched: its v3.
    Differs: gated neurons [gate; up; down] are brought to one scale and sign first (``ops.neurons.balance``), so that
        duplicates are found; the paper has no gated FFNs.
    """

    width: Width
    layers: str = "all"
    seed: int = 0
    restarts: int = 10

    name: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "cluster neurons into a narrower FFN that keeps the neural tangent kernel (MLP Fusion)"
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
        for ffn, width, neurons in each(self.targets(model), progress, "fusing"):
            balanced = neurons.gated and ffn.linear_in_up
            labels, loss = cluster_neurons(neurons, width, seed=self.seed, restarts=self.restarts, balanced=balanced)
            edits.append(Resize(ffn.name, width=width, labels=labels, balance=balanced))
            if width < neurons.ff:
                sizes = cluster_sizes(labels, width)
                edits.append(Swap(ffn.name, site="down", layer="scaled", scale=sizes.float()))
            quantities[ffn.name] = {"within-cluster variance": loss}
        return Draft(tuple(edits), quantities)
