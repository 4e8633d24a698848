"""Single weights become zero and stay zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ffnkit.edits import Edit, Mask
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import open_errors
from ffnkit.methods.common import Batch, Narrowing, Width, each
from ffnkit.model.finding import ffns
from ffnkit.model.linear import is_transposed
from ffnkit.model.targets import select
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc, check


@dataclass(frozen=True)
class Unstructured(Narrowing):
    """Keep the largest weights of every matrix, as many as an FFN of the given width has; the others become zero.

    The zeros stay zero while tuning. Memory, disk and time do not shrink: dense hardware multiplies zeros too. It is
    a baseline for quality at an equal number of weights.

    With ``masks`` the weights that stay are those of a file, as of another run's lottery ticket.

    Source: MLP Fusion (arXiv 2307.08941), the baseline of unstructured pruning, with given masks too; Han et al. (arXiv
        1506.02626).
    """

    width: Annotated[
        Width | None,
        Doc(
            "the narrower FFN whose number of weights is left: an int counts neurons, a float is a "
            "share, which is the density; or one by FFN's name."
        ),
    ] = None  # type: ignore[assignment]
    masks: Annotated[
        str | Path | None,
        Doc("instead: a safetensors file with a mask for each weight by its name; what is not 0 stays."),
    ] = None

    name: ClassVar[str] = "unstructured"
    summary: ClassVar[str] = "keep the largest single weights by a mask; saves no time (baseline)"
    paper: ClassVar[str] = "arXiv 1506.02626"

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        if (self.width is None) == (self.masks is None):
            found = "width and masks are both given" if self.masks is not None else "no width is given and no masks"
            raise FfnkitError("method unstructured", found, "Give width=0.5, or masks=FILE")
        if self.masks is not None:
            return self._given(model, self.masks)
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

    def _given(self, model: nn.Module, file: str | Path) -> Draft:
        """The masks of a file, for the FFNs that were chosen; each weight of theirs has one."""
        check(self)
        asked = f"masks {file}"
        with open_errors(asked):
            stored = load_file(Path(file).expanduser())
        edits: list[Edit] = []
        for ffn in select(ffns(model), self.layers):
            for site in ffn.sites:
                name, weight = f"{ffn.name}.{ffn.path(site)}".lstrip("."), ffn.oriented(site)
                key = next((k for k in (f"{name}.weight", name) if k in stored), None)
                if key is None:
                    raise FfnkitError(asked, f"it has no mask for {name}.weight", "Give a mask for each weight")
                lies = ffn.layout.transposed if ffn.layout.experts else is_transposed(ffn.linear(site))
                mask, shape = stored[key] != 0, tuple((weight.mT if lies else weight).shape)
                if tuple(mask.shape) != shape:
                    raise FfnkitError(asked, f"{key} is {tuple(mask.shape)}, the weight {shape}", "Give its shape")
                edits.append(Mask.of(ffn.name, site, mask.mT.contiguous() if lies else mask))
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
