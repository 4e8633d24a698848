"""Whole neurons stay or go: at random, by the size of their weights, or by what they do on data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.edits import Edit, SelectNeurons
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, activity, each, generator, largest, lifted, need_data, norms
from ffnkit.methods.expecting import Work, fused
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.model.ffn import FFN
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc


@dataclass(frozen=True)
class Random(Refitting):
    """Keep neurons drawn at random.

    Source: MLP Fusion (arXiv 2307.08941), the baseline of random sampling.
    """

    seed: Annotated[int, Doc("of the draw; each FFN and each expert draws its own.", at_least=0)] = 0

    name: ClassVar[str] = "random"
    whole: ClassVar[bool] = True
    summary: ClassVar[str] = "keep random neurons (baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"

    @property
    def reads_weights(self) -> bool:
        """Whether numbers of the model are in the plan."""
        return self.refit

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        for number, (ffn, width, neurons) in enumerate(each(self.chosen(model), progress, "pruning")):
            lead = range(max(neurons.experts, 1))
            draws = [torch.randperm(neurons.ff, generator=generator(self.seed, number, e))[:width] for e in lead]
            index = torch.stack([draw.sort().values for draw in draws]).to(torch.int32)
            edits.append(SelectNeurons(ffn.name, width=width, index=index if neurons.experts else index[0]))
        return Draft(tuple(edits))


@dataclass(frozen=True)
class Magnitude(Refitting):
    """Keep the neurons with the largest weights: ||up_i|| ||down_i||, with a gate times ||gate_i||.

    A neuron goes whole: its row of up and gate, its biases and its column of down.

    Source: MLP Fusion (arXiv 2307.08941), the baseline of structured pruning.
    Differs: the released code ranks rows of W1 and columns of W2 apart, so that kept halves belong to different
        neurons; here a neuron has one score.
    """

    name: ClassVar[str] = "magnitude"
    whole: ClassVar[bool] = True
    summary: ClassVar[str] = "keep the neurons with the largest weights (structured pruning, baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"
    by_ffn: ClassVar[bool] = True

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for ffn, width, neurons in each(self.chosen(model), progress, "pruning"):
            edits.append(_kept(ffn, width, norms(lifted(neurons)), quantities))
        return Draft(tuple(edits), quantities)


@dataclass(frozen=True)
class Importance(Refitting):
    """Keep the neurons that add most to the output on data: rms(h_i) ||down_i||.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), and Minitron
        (arXiv 2407.14679) rank neurons by their activation; times the norm of their output weights it is the rms of
        what the neuron adds to the output.
    """

    name: ClassVar[str] = "importance"
    whole: ClassVar[bool] = True
    summary: ClassVar[str] = "keep the neurons that add most to the output on data (structured pruning, baseline)"
    paper: ClassVar[str] = "arXiv 2407.14679"
    measures: ClassVar[bool] = True

    def work(self, ffn: FFN, width: int, tokens: int) -> Work:
        """Sums of squares, and of a refit."""
        if self.refit:
            return fused(ffn, width, tokens, greedy=False, refine=0, kept=0)
        return Work(numbers=3 * tokens * ffn.active * ffn.width * max(ffn.experts, 1))

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        batches = need_data(data, self.name, beyond=None)  # of the choice; a refit has its own
        found = self.chosen(model)
        for ffn, _ in found:
            ffn.check_plain(f"pruning {ffn.name}")
        rms = activity(model, batches, [ffn for ffn, _ in found], progress)
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for ffn, width, neurons in each(found, progress, "pruning"):
            edits.append(_kept(ffn, width, contribution(rms[ffn.name], lifted(neurons).down), quantities))
        return Draft(tuple(edits), quantities)


def contribution(rms: Tensor, down: Tensor) -> Tensor:
    """rms(h_i) ||down_i||, (ff,) or (E, ff); an expert that no token reached is ranked by ||down_i|| alone."""
    size = down.double().norm(dim=-2)
    unseen = (rms.sum(-1, keepdim=True) == 0).to(rms.dtype).to(size.device)
    return (rms.to(size.device) + unseen) * size


def _kept(ffn: FFN, width: int, scores: Tensor, quantities: dict[str, dict[str, float]]) -> SelectNeurons:
    """The edit that keeps the largest scores, and the share of the scores' sum that goes.

    Raises FfnkitError where scores are not finite: they rank nothing.
    """
    if not bool(torch.isfinite(scores).all()):
        raise FfnkitError(f"scores of {ffn.name}", "not finite", "Repair the model's weights first")
    index = largest(scores, width)
    held = scores.cpu().gather(-1, index.long()).sum().item()
    total = scores.sum().item()
    quantities[ffn.name] = {"score lost": 1 - held / total if total > 0 else 0.0}
    return SelectNeurons(ffn.name, width=width, index=index)
