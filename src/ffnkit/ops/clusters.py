"""The clustering of an FFN's neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnkit.ops.kmeans import kmeans
from ffnkit.ops.neurons import Neurons, balance


def cluster_neurons(
    neurons: Neurons, width: int, *, seed: int, restarts: int, balanced: bool = True
) -> tuple[Tensor, float]:
    """Labels, int32 (ff,) or (E, ff), and the share of the neurons' variance that the centroids lose.

    Args:
        balanced: bring gated neurons to one scale and sign first (:func:`ffnkit.ops.neurons.balance`).

    Source: MLP Fusion (arXiv 2307.08941), k-means on the rows [W1, b1, W2].
    """
    if neurons.experts:
        parts = [
            cluster_neurons(neurons.expert(e), width, seed=seed, restarts=restarts, balanced=balanced)
            for e in range(neurons.experts)
        ]
        return torch.stack([labels for labels, _ in parts]), sum(loss for _, loss in parts) / len(parts)
    # float32: distances decide labels only; bf16 would merge neurons that differ. Experts one at a time.
    single = neurons.to(torch.float32)
    points = (balance(single) if balanced else single).matrix()
    result = kmeans(points, width, seed=seed, restarts=restarts)
    total = points.var(dim=0, correction=0).double().sum().item() * len(points)  # no second copy of the points
    return result.labels.to("cpu", torch.int32), result.inertia / total if total > 0 else 0.0
