"""Single weights become zero and stay zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ffnkit.edits import Edit, Mask
from ffnkit.methods.common import Batch, Narrowing, Width, each
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc


@dataclass(frozen=True)
class Unstructured(Narrowing):
    """Keep the largest weights of every matrix, as many as an FFN of the given width has; the others become zero.

    The zeros stay zero while tuning. Memory, disk and time do not shrink: dense hardware multiplies zeros too. It is
    a baseline for quality at an equal number of weights.

    Source: MLP Fusion (arXiv 2307.08941), the baseline of unstructured pruning; Han et al. (arXiv 1506.02626).
    """

    width: Annotated[
        Width,
        Doc(
            "the narrower FFN whose number of weights is left: an int counts neurons, a float is a "
            "share, which is the density; or one by FFN's name."
        ),
    ]

    name: ClassVar[str] = "unstructured"
    summary: ClassVar[str] = "keep the largest single weights by a mask; saves no time (baseline)"
    paper: ClassVar[str] = "arXiv 1506.02626"

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        for ffn, width, neurons in each(self.chosen(model), progress, "pruning"):
            if width == neurons.ff:
                continue
            for site in ffn.sites:
                weight = ffn.oriented(site)
                parts = list(weight) if weight.ndim == 3 else [weight]
                count = parts[0].numel() * width // neurons.ff
                masks = [largest_weights(part, count) for part in parts]
                edits.append(Mask.of(ffn.name, site, torch.stack(masks) if weight.ndim == 3 else masks[0]))
        return Draft(tuple(edits))


def largest_weights(weight: Tensor, count: int) -> Tensor:
    """A mask, bool, of exactly ``count`` weights of the largest magnitude; ties go to the first."""
    sizes = weight.detach().abs().float().cpu().flatten()
    if count == 0:
        return torch.zeros(weight.shape, dtype=torch.bool)
    least = float(np.partition(sizes.numpy(), len(sizes) - count)[len(sizes) - count])  # of those that stay
    mask = sizes > least
    ties = (sizes == least).nonzero()[: count - int(mask.sum()), 0]
    return mask.index_fill_(0, ties, True).view(weight.shape)
