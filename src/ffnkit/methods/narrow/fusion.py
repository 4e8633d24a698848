"""MLP Fusion: cluster the neurons of an FFN and keep each cluster's mean, times the cluster's size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import nn

from ffnkit.edits import Edit, ScaleInputs
from ffnkit.methods.common import Batch, clusterings
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.ops.neurons import cluster_sizes
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc
from ffnkit.settings.presets import Preset, with_presets


@with_presets
@dataclass(frozen=True)
class Fusion(Refitting):
    """Narrow each FFN to the centroids of its neurons, keeping its neural tangent kernel close.

    ``y = down P act(up x + up_bias) + down_bias`` with up, up_bias, down the centroids and P the cluster sizes. P is
    a fixed factor that stays apart while tuning, so that under Adam a centroid moves the output as its members would
    have; ``fold`` multiplies it into down exactly.

    Source: Wei, Guo, Chen, He, "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", ICML 2023,
        arXiv 2307.08941; each expert of a mixture on its own and routers untouched: its v3.
    Differs: gated neurons [gate; up; down] are brought to one scale and sign first (``ops.neurons.balance``), so that
        duplicates are found; the paper has no gated FFNs.
    """

    seed: Annotated[int, Doc("of the k-means starts.", at_least=0)] = 0
    restarts: Annotated[
        int, Doc("k-means starts; the best is kept. The paper takes 30; further starts cost little here.", at_least=1)
    ] = 10
    preset: Annotated[Literal["paper"] | None, Doc("values for what is not given.")] = None

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "MLP Fusion (arXiv 2307.08941), released code; layers 4-11 of RoBERTa and GPT-2, the experts of blocks "
            "5, 7, 9, 11 of Switch",
            {"width": 0.25, "restarts": 30},
        )
    }
    name: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "cluster neurons into a narrower FFN that keeps the neural tangent kernel (MLP Fusion)"
    paper: ClassVar[str] = "arXiv 2307.08941"
    by_ffn: ClassVar[bool] = True

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        found = self.chosen(model)
        for edit, loss in clusterings(found, progress, "fusing", self.seed, self.restarts):
            edits.append(edit)
            if edit.width < edit.labels.shape[-1]:
                sizes = cluster_sizes(edit.labels, edit.width)
                edits.append(ScaleInputs(edit.target, site="down", scale=sizes.float()))
            quantities[edit.target] = {"within-cluster variance": loss}
        return Draft(tuple(edits), quantities)
