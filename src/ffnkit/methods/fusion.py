"""MLP Fusion: cluster the neurons of an FFN and keep each cluster's mean, times the cluster's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit import blocks
from ffnkit.edits import Edit, Resize, Swap
from ffnkit.errors import FfnkitError
from ffnkit.ops.kmeans import kmeans
from ffnkit.ops.neurons import Neurons, balance, cluster_sizes
from ffnkit.plans import Draft, Progress, check_weights


@dataclass(frozen=True)
class Fusion:
    """Narrow each FFN to the centroids of its neurons, keeping its neural tangent kernel close.

    ``y = down P act(up x + up_bias) + down_bias`` with up, up_bias, down the centroids and P the cluster sizes. P is
    a fixed factor that stays apart while tuning, so that under Adam a centroid moves the output as its members would
    have; ``fold`` multiplies it into down exactly.

    Attributes:
        width: neurons left in each FFN: an int counts them, a float is a share (1.0 = all).
        layers: which layers, e.g. "all", "last:8", "4-11", "4,5,9", "encoder:last:4".
        seed: of the k-means starts.
        restarts: k-means starts; the best is kept. The paper takes 30; further starts cost little here.

    Source: Wei, Guo, Chen, He, "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", ICML 2023,
        arXiv 2307.08941; each expert of a mixture on its own and routers untouched: its v3.
    Differs: gated neurons [gate; up; down] are brought to one scale and sign first (``ops.neurons.balance``), so that
        duplicates are found; the paper has no gated FFNs.
    """

    width: int | float
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
        for key, low in (("seed", 0), ("restarts", 1)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise FfnkitError(
                    f"{key} {value!r}", f"not a whole number of at least {low}", f"Give {key}={low} or more"
                )
        chosen = blocks.select(blocks.ffns(model), self.layers)
        return [(ffn, blocks.resolve_width(self.width, ffn.width, ffn.name)) for ffn in chosen]

    def draft(self, model: nn.Module, data: Iterable[dict[str, Tensor]] | None, progress: Progress | None) -> Draft:
        targets = self.targets(model)
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for number, (ffn, width) in enumerate(targets):
            if ffn.scale is not None:
                do = "Fold the model first (ffnkit.fold), then compress further"
                raise FfnkitError(f"fusing {ffn.name}", "its neurons still carry cluster sizes apart", do)
            neurons = ffn.read()
            check_weights(neurons, ffn.name)
            labels, loss = self._cluster(neurons, width)
            edits.append(Resize(ffn.name, width=width, labels=labels, balance=neurons.gated))
            if width < neurons.ff:
                sizes = cluster_sizes(labels, width)
                edits.append(Swap(ffn.name, site="down", layer="scaled", scale=sizes.float()))
            quantities[ffn.name] = {"within-cluster variance": loss}
            if progress is not None:
                progress(number + 1, len(targets), ffn.name)
        return Draft(tuple(edits), quantities)

    def _cluster(self, neurons: Neurons, width: int) -> tuple[Tensor, float]:
        """Labels, int32 (ff,) or (E, ff), and the share of the neurons' variance that the centroids lose."""
        if neurons.experts:
            parts = [self._cluster(neurons.expert(e), width) for e in range(neurons.experts)]
            return torch.stack([labels for labels, _ in parts]), sum(loss for _, loss in parts) / len(parts)
        # float32: distances decide labels only; bf16 would merge neurons that differ. Experts one at a time.
        points = balance(neurons.map(lambda value: value.float())).matrix()
        result = kmeans(points, width, seed=self.seed, restarts=self.restarts)
        total = points.var(dim=0, correction=0).double().sum().item() * len(points)  # no second copy of the points
        return result.labels.to("cpu", torch.int32), result.inertia / total if total > 0 else 0.0
