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
from ffnkit.methods.common import Batch, each, largest, lifted, need_data
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.model.ffn import FFN
from ffnkit.plans import Draft, Progress


@dataclass(frozen=True)
class Flap(Refitting):
    """Keep the neurons whose activations fluctuate most, weighed by their output weights; a bias stands for the others.

    Scores are var(h_i) ||down_i||^2 over tokens; the output bias grows by sum_gone mean(h_i) down_i.

    Source: FLAP (arXiv 2312.11983), metric WIFV and bias compensation.
    Differs: the paper finds each layer's width by scores standardised across layers; here widths are as asked for.
    """

    name: ClassVar[str] = "flap"
    summary: ClassVar[str] = "keep the neurons that fluctuate, a bias for the means of the others (FLAP)"
    paper: ClassVar[str] = "arXiv 2312.11983"
    measures: ClassVar[bool] = True

    def chosen(self, model: nn.Module) -> list[tuple[FFN, int]]:
        """The FFNs to narrow and their widths. Raises FfnkitError where they do not fit, or one has no output bias."""
        found = super().chosen(model)
        for ffn, _ in found:
            if ffn.raw().down_bias is None:
                do = "Open it with biases (mlp_bias=True, where its config has that), or use importance with refit=True"
                raise FfnkitError(f"flap of {ffn.name}", "it has no output bias to take over what goes", do)
        return found

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        batches = need_data(data, self.name, beyond="means of hidden neurons")
        found = self.chosen(model)
        for ffn, _ in found:
            ffn.check_plain(f"pruning {ffn.name}")
        seen = spreads(model, telling(batches, progress), [ffn for ffn, _ in found])
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for ffn, width, neurons in each(found, progress, "pruning"):
            old, spread = lifted(neurons), seen.get(ffn.name, Spread())
            scores = fluctuation(spread.variance(old.ff), old.down)
            index = largest(scores, width).long()
            gone = torch.ones(old.ff, dtype=torch.bool).index_fill_(0, index, False).nonzero().squeeze(1)
            lost = old.down[:, gone].double() @ spread.mean(old.ff)[gone].to(old.down.device)
            assert old.down_bias is not None
            bias = (old.down_bias.double() + lost).to(old.down_bias.dtype)
            made = dataclasses.replace(old.take(index.to(old.up.device)), down_bias=bias)
            edits.append(ReplaceNeurons.of(ffn.name, made.to(neurons.up.dtype)))
            quantities[ffn.name] = {"score lost": float(scores[gone].sum() / scores.sum().clamp_min(1e-300))}
        return Draft(tuple(edits), quantities)


def fluctuation(variance: Tensor, down: Tensor) -> Tensor:
    """var(h_i) ||down_i||^2, (ff,), on the CPU; without any fluctuation ||down_i||^2."""
    size = down.double().square().sum(0).cpu()
    return variance * size if bool(variance.any()) else size


class Spread:
    """Means and variances of the hidden neurons of one FFN, float64 on the CPU; zeros where no token came."""

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


def spreads(model: nn.Module, data: Iterable[Batch], found: list[FFN]) -> dict[str, Spread]:
    """By the FFN's name, from one pass; FFNs that tokens are routed to may be missing."""
    seen: dict[str, Spread] = {}
    watch(model, data, found, lambda ffn, acts: seen.setdefault(ffn.name, Spread()).update(acts))
    return seen
