"""Narrow FFNs drawn anew: what the pretrained FFNs are worth at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.edits import Edit, ReplaceNeurons
from ffnkit.methods.common import Batch, Width, each, generator
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.ops.neurons import Neurons
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc


@dataclass(frozen=True)
class Reinit(Refitting):
    """Replace each FFN by one of the given width with random weights, N(0, std^2), and zero biases.

    Source: the baseline of MLP Fusion (arXiv 2307.08941) with FFNs that are trained from scratch.
    """

    width: Annotated[
        Width, Doc("neurons of the new FFNs: an int counts them, a float is a share (1.0 = all); or one by FFN's name.")
    ]

    std: Annotated[
        float | None,
        Doc(
            "of the weights; null takes the model's own initializer_range, 0.02 where it has none.",
            above=0,
            example=0.02,
        ),
    ] = None
    seed: Annotated[int, Doc("of the draw.", at_least=0)] = 0

    name: ClassVar[str] = "reinit"
    summary: ClassVar[str] = "narrow FFNs with random weights (baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"

    @property
    def reads_weights(self) -> bool:
        """Whether numbers of the model are in the plan."""
        return self.refit

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        config = getattr(model, "config", None)
        text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
        std = self.std or getattr(text, "initializer_range", None) or 0.02
        edits: list[Edit] = []
        for number, (ffn, width, neurons) in enumerate(each(self.chosen(model), progress, "replacing")):
            index = torch.zeros(width, dtype=torch.long, device=neurons.up.device)
            draw = generator(self.seed, number)
            edits.append(ReplaceNeurons.of(ffn.name, _drawn(neurons.take(index), std, draw)))
        return Draft(tuple(edits))


def _drawn(like: Neurons, std: float, generator: torch.Generator) -> Neurons:
    fresh: dict[str, Tensor] = {}
    for name, value in like.tensors().items():
        if name.endswith("bias"):
            fresh[name] = torch.zeros_like(value)
        else:
            fresh[name] = (torch.randn(value.shape, generator=generator) * std).to(value.dtype)
    return Neurons(**fresh)
