"""Heads and neurons as units of one kind: what each is worth, what it costs, and how many stay of each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ffnkit.errors import FfnkitError
from ffnkit.methods.common import lifted
from ffnkit.methods.narrow.selection import contribution
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import features, own_weight
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.coefficients import carries_update
from ffnkit.ops.knapsack import cheapest

MOST = 1e6  # times the shares that are asked for: nothing more can go then
NEURON_SCORES = ("weight", "update", "both", "activation", "coefficients", "random")


@dataclass(frozen=True, eq=False)
class Units:
    """What can go alone of one attention or FFN.

    Attributes:
        name: of the attention or FFN. scores: (1, units) float64, or (E, units) with experts: units of one number are
            those of one rank in each expert, and go together.
        flops: a token, of one unit. step: how many stay is a multiple of it, the whole aside.
        relative: scores are divided by their mean where layers are compared.
        neurons: whether they are hidden neurons, not heads.
    """

    name: str
    scores: Tensor
    flops: float
    step: int = 1
    relative: bool = True
    neurons: bool = False

    @property
    def count(self) -> int:
        """How many there are."""
        return self.scores.shape[1]

    @cached_property
    def options(self) -> list[int]:
        """How many may stay, ascending."""
        return [*range(self.step, self.count, self.step), self.count]

    @cached_property
    def _tail(self) -> Tensor:
        """(units + 1,) the sum of the scores that go where so many stay."""
        ranked = self.scores.sort(dim=1, descending=True).values.sum(0)
        return torch.cat((ranked.flip(0).cumsum(0).flip(0), ranked.new_zeros(1)))

    def lost(self, kept: int) -> float:
        """The share of the scores' sum that goes where so many stay."""
        total = float(self._tail[0])
        return float(self._tail[kept]) / total if total > 0 else 0.0

    def price(self, kept: int) -> float:
        """What it costs that so many stay: the scores that go, times their FLOPs."""
        lead = self.scores.shape[0]
        mean = float(self._tail[0]) / (lead * self.count) if self.relative else 1.0
        return float(self._tail[kept]) / lead / mean * self.flops if mean > 0 else 0.0

    def left(self, amount: int | float) -> int:
        """How many stay where this share or number goes; at least one step, and a multiple of it."""
        if isinstance(amount, int) and amount >= self.count:
            do = f"Give 0 to {self.count - 1}: one has to stay"
            raise FfnkitError(f"{amount} units of {self.name}", f"it has {self.count}", do)
        kept = self.count - (round(amount * self.count) if isinstance(amount, float) else amount)
        return min(self.count, max(self.step, -(-kept // self.step) * self.step))


# --- how many stay ------------------------------------------------------------------------------------------------


def uniform_counts(
    units: list[Units], shares: Callable[[float], list[int]], budget: float, asked: str = "a budget"
) -> list[int]:
    """How many stay with one share for all layers, the smallest that keeps to the budget; found by bisection.

    Heads are few, and go in all layers at once: the share of neurons is found again beside the heads that stay. Where
    that would bring all neurons back, fewer heads go.

    Args:
        shares: how many stay where a multiple of the shares goes; falls as that rises.

    Raises:
        FfnkitError: the budget cannot be kept.
    """
    low, high = 0.0, 1.0
    while _flops(units, shares(high)) > budget:
        low, high = high, 2 * high
        if high > MOST:
            raise _too_little(units, shares(high), budget, asked)
    low, high = _bisect(lambda times: _flops(units, shares(times)) <= budget, low, high)
    most = high

    def beside(heads: float, neurons: float) -> list[int]:
        pairs = zip(units, shares(heads), shares(neurons), strict=True)
        return [second if each.neurons else first for each, first, second in pairs]

    def fits(heads: float, neurons: float) -> bool:
        return _flops(units, beside(heads, neurons)) <= budget

    if fits(high, 0.0):
        while not fits(low, most) and most < MOST:
            most *= 2
        if not fits(low, most):
            return beside(high, 0.0)
        high = low
    return beside(high, _bisect(lambda times: fits(high, times), 0.0, most)[1])


def _bisect(fits: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Two values next to each other, to rounding: the greatest that does not fit, and the least that does."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low, high


def cheapest_counts(units: list[Units], budget: float, asked: str = "a budget") -> list[int]:
    """How many stay such that their FLOPs keep to the budget and the price of what goes is least.

    The choice is exact where it is exact in ``ops.knapsack``. Whatever still fits then comes back, so that the budget
    is met up to one step of one layer.

    Raises:
        FfnkitError: the budget cannot be kept.
    """
    least = [each.options[0] for each in units]
    if _flops(units, least) > budget:
        raise _too_little(units, least, budget, asked)
    sizes = [[-int(-each.flops * kept // 1) for kept in each.options] for each in units]
    prices = [[each.price(kept) for kept in each.options] for each in units]
    picked = cheapest(sizes, prices, int(budget))
    slack = budget - _flops(units, [each.options[p] for each, p in zip(units, picked, strict=True)])
    while True:
        best: tuple[float, int, float] | None = None
        for place, (each, at) in enumerate(zip(units, picked, strict=True)):
            if at + 1 == len(each.options):
                continue
            cost = (each.options[at + 1] - each.options[at]) * each.flops
            gain = (prices[place][at] - prices[place][at + 1]) / cost
            if cost <= slack and (best is None or gain > best[0]):
                best = (gain, place, cost)
        if best is None:
            return [each.options[p] for each, p in zip(units, picked, strict=True)]
        picked[best[1]] += 1
        slack -= best[2]


def _flops(units: list[Units], kept: list[int]) -> float:
    return sum(count * each.flops for count, each in zip(kept, units, strict=True))


def _too_little(units: list[Units], least: list[int], budget: float, asked: str) -> FfnkitError:
    found = (
        f"the smallest that may stay takes {_flops(units, least):,.0f} FLOPs a token of the {budget:,.0f} that are left"
        " for what can go"
    )
    return FfnkitError(asked, found, "Give a larger flops, more layers, or a smaller multiple")


# --- scores of neurons --------------------------------------------------------------------------------------------


def neuron_scores(ffn: FFN, by: str, draw: torch.Generator, rms: Tensor | None = None) -> Tensor:
    """(1, ff) float64, or (E, ff) with experts, the higher the better. Raises FfnkitError where they cannot be had.

    Args:
        rms: (ff,) or (E, ff), of the hidden neurons, for "activation".
    """
    if by == "random":
        return torch.rand(max(ffn.experts, 1), ffn.width, generator=draw, dtype=torch.float64)
    if by == "coefficients":
        linear = None if ffn.layout.experts else ffn.linear("down")
        values = linear.by_input() if isinstance(linear, AdapterLayer) else None
        if values is None:
            do = "Tune with coefficients=0.1 or so, keep the updates apart (merge=False), or take another score"
            raise FfnkitError(f"by coefficients in {ffn.name}", "no coefficients are on it", do)
        return values.double().abs().cpu()[None]
    if by == "activation":
        assert rms is not None
        scores = contribution(rms, lifted(ffn.raw()).down).cpu()
    elif by == "update":
        scores = _updates(ffn)
    elif by == "weight" and not ffn.layout.experts:
        scores = _sums(ffn, own_weight)
    else:
        own = ffn.raw()
        rows = [own.up] if own.gate is None else [own.up, own.gate]
        scores = sum((value.detach().float().abs().sum(-1, dtype=torch.float64) for value in rows), torch.zeros(()))
        scores = (scores + own.down.detach().float().abs().sum(-2, dtype=torch.float64)).cpu()
    return scores if scores.ndim == 2 else scores[None]


def _updates(ffn: FFN) -> Tensor:
    if ffn.layout.experts or not any(carries_update(ffn.linear(site)) for site in ffn.sites):
        do = "Tune with updates on the FFNs first (targets=ffn or all), give neurons_by=weight, or neurons=0"
        raise FfnkitError(f"by update in {ffn.name}", "none of its linears carries an update", do)

    def read(linear: torch.nn.Module) -> Tensor:
        if carries_update(linear):
            update: Tensor = linear.update()  # type: ignore[operator]
            return update
        return torch.zeros(features(linear))

    return _sums(ffn, read)


def _sums(ffn: FFN, read: Callable[..., Tensor]) -> Tensor:
    """(ff,) float64: absolute sums over each neuron's rows of up and gate and its column of down."""
    total = torch.zeros(ffn.width, dtype=torch.float64)
    for site in ffn.sites:
        size = read(ffn.linear(site)).detach().float().abs()
        along = size.sum(0 if site == "down" else 1, dtype=torch.float64).cpu()
        total += along if site == "down" else along.view(-1, ffn.width).sum(0)
    return total
