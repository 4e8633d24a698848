"""Neurons that hardly fluctuate go, and the output bias takes over their means: FLAP."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import telling
from ffnkit.calibration.hooks import Activations, watch
from ffnkit.edits import Edit, ReplaceNeurons
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, each, largest, lifted, need_data, singles
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.plans import Draft, Progress


@dataclass(frozen=True)
class Flap(Refitting):
    """Keep the neurons whose activations fluctuate most, weighed by their output weights; a bias stands for the others.

    Scores are var(h_i) ||down_i||^2 over tokens; the output bias grows by sum_gone mean(h_i) down_i. Experts alike,
    each on its own tokens, weighed by their squared routing weight.

    Source: FLAP (arXiv 2312.11983), metric WIFV and bias compensation.
    Differs: the paper finds each layer's width by scores standardised across layers; here widths are as asked for.
    """

    name: ClassVar[str] = "flap"
    summary: ClassVar[str] = "keep the neurons that fluctuate, a bias for the means of the others (FLAP)"
    paper: ClassVar[str] = "arXiv 2312.11983"
    measures: ClassVar[bool] = True

    @property
    def beyond(self) -> str | None:
        return "means of hidden neurons"

    def chosen(self, model: nn.Module) -> list[tuple[FFN, int]]:
        """The FFNs to narrow and their widths. Raises FfnkitError where they do not fit, or one has no output bias."""
        found = super().chosen(model)
        for ffn, _ in found:
            if ffn.raw().down_bias is None:
                do = "Open it with biases (mlp_bias=True, where its config has that), or use importance with refit=True"
                raise FfnkitError(f"flap of {ffn.name}", "it has no output bias to take over what goes", do)
        return found

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        batches = need_data(data, self.name, beyond=self.beyond)
        found = self.chosen(model)
        for ffn, _ in found:
            ffn.check_plain(f"pruning {ffn.name}")
        seen = spreads(model, telling(batches, progress), [ffn for ffn, _ in found])
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for ffn, width, neurons in each(found, progress, "pruning"):
            made, lost = [], []
            for expert, old in enumerate(singles(lifted(neurons))):
                narrow, share = _narrowed(old, width, seen.get((ffn.name, expert), Spread()))
                made.append(narrow)
                lost.append(share)
            whole = concatenate(made) if ffn.experts else made[0]
            edits.append(ReplaceNeurons.of(ffn.name, whole.to(neurons.up.dtype)))
            quantities[ffn.name] = {"score lost": sum(lost) / len(lost)}
        return Draft(tuple(edits), quantities)


def _narrowed(old: Neurons, width: int, spread: Spread) -> tuple[Neurons, float]:
    """One FFN or expert of the neurons that fluctuate most, and the share of the scores that goes."""
    assert old.down_bias is not None
    scores = fluctuation(spread.variance(old.ff), old.down)
    index = largest(scores, width).long()
    gone = torch.ones(old.ff, dtype=torch.bool).index_fill_(0, index, False).nonzero().squeeze(1)
    lost = old.down[:, gone].double() @ spread.mean(old.ff)[gone].to(old.down.device)
    bias = (old.down_bias.double() + lost).to(old.down_bias.dtype)
    made = dataclasses.replace(old.take(index.to(old.up.device)), down_bias=bias)
    return made, float(scores[gone].sum() / scores.sum().clamp_min(1e-300))


def fluctuation(variance: Tensor, down: Tensor) -> Tensor:
    """var(h_i) ||down_i||^2, (ff,), on the CPU; without any fluctuation ||down_i||^2."""
    size = down.double().square().sum(0).cpu()
    return variance * size if bool(variance.any()) else size


class Spread:
    """Means and variances of the hidden neurons of one FFN or expert, float64 on the CPU; zeros where no token came."""

    def __init__(self) -> None:
        self.count = 0.0
        self._sum = self._squares = torch.zeros(())

    def update(self, acts: Activations) -> None:
        rows = acts.counted()
        hidden = rows.hidden.double()
        weights = hidden.new_ones(len(hidden)) if rows.weights is None else rows.weights.double()
        self.count += float(weights.sum())
        self._sum = self._sum + (weights @ hidden).cpu()
        self._squares = self._squares + (weights @ hidden.square()).cpu()

    def mean(self, width: int) -> Tensor:
        """(width,)."""
        return (self._sum.double() / max(self.count, 1e-300)).expand(width)

    def variance(self, width: int) -> Tensor:
        """(width,), of the tokens seen."""
        mean = self.mean(width)
        return (self._squares.double() / max(self.count, 1e-300) - mean.square()).clamp_min(0).expand(width)


def spreads(model: nn.Module, data: Iterable[Batch], found: list[FFN]) -> dict[tuple[str, int], Spread]:
    """By the FFN's name and expert (0 without), from one pass; those that no token was routed to are missing."""
    seen: dict[tuple[str, int], Spread] = {}
    watch(model, data, found, lambda ffn, acts: seen.setdefault((ffn.name, acts.expert or 0), Spread()).update(acts))
    return seen
