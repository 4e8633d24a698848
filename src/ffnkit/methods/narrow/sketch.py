"""Random sketching of the hidden dimension, with or without neurons that are kept as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.edits import Edit, ReplaceNeurons
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, each, generator, largest, lifted, norms, singles
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc


@dataclass(frozen=True)
class Sketch(Refitting):
    """Project the neurons on random directions: W1 S, b1 S and S^T W2 with S ~ N(0, 1/c), (ff, c).

    The activation is applied to the sketched pre-activations, so this is a coarse stand-in: it keeps the linear part
    of the FFN in expectation only.

    Source: MLP Fusion (arXiv 2307.08941), the baseline "Sketch".
    Differs: gated FFNs use one S for gate and up; the paper has none.
    """

    keep: Annotated[
        int | float,
        Doc(
            "how many of them are the neurons with the largest ||up|| ||down||, as they are; the "
            "others are sketched. The paper's variant keeps 256 of 768. An int counts, a float is a "
            "share of the new width."
        ),
    ] = 0
    seed: Annotated[int, Doc("of the random directions.", at_least=0)] = 0

    name: ClassVar[str] = "sketch"
    summary: ClassVar[str] = "random combinations of neurons, the largest ones kept if wanted (baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"

    def chosen(self, model: nn.Module) -> list[tuple[FFN, int]]:
        """The FFNs to narrow and their new widths. Raises FfnkitError where layers, width or keep do not fit."""
        found = super().chosen(model)
        for ffn, width in found:
            self._kept(width, ffn.name)
        return found

    def _kept(self, width: int, name: str) -> int:
        keep = self.keep
        if (
            isinstance(keep, bool)
            or not isinstance(keep, int | float)
            or (isinstance(keep, float) and not 0 <= keep <= 1)
        ):
            raise FfnkitError(f"keep {keep!r}", "not a count of neurons and not a share", "Give an int, or 0.0 to 1.0")
        count = round(keep * width) if isinstance(keep, float) else keep
        if not 0 <= count <= width:
            raise FfnkitError(f"keep {keep} of {name}", f"its new width is {width}", f"Keep 0 to {width} neurons")
        return count

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        for number, (ffn, width, neurons) in enumerate(each(self.chosen(model), progress, "sketching")):
            kept = self._kept(width, ffn.name)
            parts = [
                _sketched(single, kept, width, generator(self.seed, number, e))
                for e, single in enumerate(singles(lifted(neurons)))
            ]
            made = concatenate(parts) if neurons.experts else parts[0]
            edits.append(ReplaceNeurons.of(ffn.name, made.to(neurons.up.dtype)))
        return Draft(tuple(edits))


def _sketched(neurons: Neurons, keep: int, width: int, generator: torch.Generator) -> Neurons:
    """``keep`` neurons as they are, and ``width - keep`` random combinations of the others."""
    if width == neurons.ff:
        return neurons
    index = largest(norms(neurons), keep).long().to(neurons.up.device)
    others = torch.ones(neurons.ff, dtype=torch.bool, device=neurons.up.device).index_fill_(0, index, False)
    rest, count = neurons.take(others.nonzero().squeeze(1)), width - keep
    if not count:
        return neurons.take(index)
    sketch = (torch.randn(rest.ff, count, generator=generator) / count**0.5).to(rest.up)
    mixed: dict[str, Tensor] = {}
    for name, value in rest.tensors().items():
        if name == "down":
            mixed[name] = value @ sketch
        elif name != "down_bias":
            mixed[name] = sketch.T @ value
    return joined(neurons.take(index), Neurons(**mixed, down_bias=neurons.down_bias))


def joined(first: Neurons, second: Neurons) -> Neurons:
    """The neurons of both, side by side."""
    other = second.tensors()
    parts = {
        name: torch.cat([value, other[name]], dim=-2 if name in ("up", "gate") else -1)
        for name, value in first.tensors().items()
        if name != "down_bias"
    }
    return Neurons(**parts, down_bias=first.down_bias)
