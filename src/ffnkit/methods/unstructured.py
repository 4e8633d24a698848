"""Single weights become zero and stay zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit import blocks
from ffnkit.edits import Edit, Mask
from ffnkit.methods.common import Batch, Width, each, targets
from ffnkit.plans import Draft, Progress


@dataclass(frozen=True)
class Unstructured:
    """Keep the largest weights of every matrix, as many as an FFN of the given width has; the others become zero.

    The zeros stay zero while tuning. Memory, disk and time do not shrink: dense hardware multiplies zeros too. It is
    a baseline for quality at an equal number of weights.

    Attributes:
        width: the narrower FFN whose number of weights is left: an int counts neurons, a float is a share, which is
            the density; or one by FFN's name.
        layers: which layers, e.g. "all", "last:8", "4-11", "4,5,9", "encoder:last:4".

    Source: MLP Fusion (arXiv 2307.08941), the baseline of unstructured pruning; Han et al. (arXiv 1506.02626).
    """

    width: Width
    layers: str = "all"

    name: ClassVar[str] = "unstructured"
    summary: ClassVar[str] = "keep the largest single weights by a mask; saves no time (baseline)"
    paper: ClassVar[str] = "arXiv 1506.02626"

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def targets(self, model: nn.Module) -> list[tuple[blocks.FFN, int]]:
        """The FFNs and the widths whose weights they keep. Raises FfnkitError where layers or width do not fit."""
        return targets(model, self.layers, self.width)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        for ffn, width, neurons in each(self.targets(model), progress, "pruning"):
            if width == neurons.ff:
                continue
            for site in ffn.sites:
                weight = ffn._oriented(site)
                parts = list(weight) if weight.ndim == 3 else [weight]
                count = parts[0].numel() * width // neurons.ff
                masks = [largest_weights(part, count) for part in parts]
                edits.append(Mask.of(ffn.name, site, torch.stack(masks) if weight.ndim == 3 else masks[0]))
        return Draft(tuple(edits))


def largest_weights(weight: Tensor, count: int) -> Tensor:
    """A mask, bool, of exactly ``count`` weights of the largest magnitude; ties go to the first."""
    order = torch.sort(weight.detach().abs().flatten(), descending=True, stable=True).indices[:count]
    return torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, order.cpu(), True).view(weight.shape)
