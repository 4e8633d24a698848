"""Clustering with root counts: as MLP Fusion, but the root of each cluster's size stands on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from ffnkit.methods.common import Batch, clusterings
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc


@dataclass(frozen=True)
class Clustering(Refitting):
    """Narrow each FFN to the centroids of its neurons, P^(1/2) on up, its bias and down.

    ``y = down P^(1/2) act(P^(1/2) (up x + up_bias)) + down_bias``. With ReLU this equals MLP Fusion and its kernel
    under SGD; with other activations it is another function.

    Source: MLP Fusion (arXiv 2307.08941), the baseline "Clustering".
    Differs: the paper has no gated FFNs; there the root stands on up and down and the gate is the plain mean, which
        keeps the function of MLP Fusion exactly.
    """

    seed: Annotated[int, Doc("of the k-means starts.", at_least=0)] = 0
    restarts: Annotated[int, Doc("k-means starts; the best is kept.", at_least=1)] = 10

    name: ClassVar[str] = "clustering"
    summary: ClassVar[str] = "cluster neurons, the root of the cluster sizes on both sides (baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"
    by_ffn: ClassVar[bool] = True

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        found = self.chosen(model)
        made = list(clusterings(found, progress, "clustering", self.seed, self.restarts, root=True))
        quantities = {edit.target: {"within-cluster variance": loss} for edit, loss in made}
        return Draft(tuple(edit for edit, _ in made), quantities)
