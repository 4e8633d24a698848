"""Refit the output layer that several FFNs are to share to what each of them gave."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ffnkit.calibration.drift import Drift
from ffnkit.edits import ReplaceNeurons
from ffnkit.methods.common import Batch, lifted
from ffnkit.methods.share.fitting import Fitting
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.refit import ridges_of
from ffnkit.ops.ridge import pulled
from ffnkit.ops.sharing import Own, errors
from ffnkit.ops.union import biases, pooled, with_one_bias
from ffnkit.surgery.temporary import temporarily


def shared(group: list[FFN], orders: Tensor) -> Neurons:
    """The mean of FFNs with their neurons in the first one's order, float32 at least; ``orders`` empty: the first."""
    sums = lifted(group[0].raw()).map(lambda value: value.clone())
    if not len(orders):
        return sums
    for ffn, order in zip(group[1:], orders, strict=True):
        fits = lifted(ffn.raw().take(order.to(sums.up.device).long()))
        for name, value in sums.tensors().items():
            value += getattr(fits, name)
    return sums.map(lambda value: value / len(group))


class Correction:
    """The output layer of a shared FFN refitted to all members, in closed form.

    Minimises sum over members i of w_i ||h(X_i) D^T + b - Y_i||_F^2 + lambda ||D - D_0||_F^2, with X_i and Y_i what the
    i-th FFN receives and gives on the data, h the shared hidden layer, D_0 its output layer as it was made, w_i one
    over the variance of Y_i and lambda = ridge x the mean square of h. b only where the FFN has an output bias. Tokens,
    and the variances, count as the norms that read the outputs see them.

    Args:
        start: the shared FFN. seen: what the members did on data.

    Raises:
        FfnkitError: an activation function that is not known.
    """

    def __init__(self, group: list[FFN], start: Neurons, seen: Fitting) -> None:
        self.group, self.start = group, lifted(start)
        self.plain = start.to(group[0].raw().up.dtype)  # what does not change, once for all ridges
        self.members, self.judges = (seen.members(group, when) for when in (0, 1))
        self.activation = seen.activation(group[0], self.members[0], "correcting", "Set correct='none'")
        self.moments = with_one_bias(pooled(self.start, self.members, self.activation), self.members)

    def solve(self, ridge: float) -> tuple[Neurons, dict[str, float]]:
        """The shared FFN, and each member's relative output error on rows kept apart."""
        down = pulled(self.moments.gram, self.moments.cross.T, self.start.down, ridge)
        made = dataclasses.replace(self.start, down=down.to(self.start.down.dtype))
        every = torch.arange(made.ff, device=down.device)
        (bias, *_) = biases(made, self.moments, every, self.members, one=True)
        made = dataclasses.replace(made, down_bias=bias)
        told = errors(made, [Own.none(made)] * len(self.group), self.judges, self.activation)
        found = {ffn.name: error**0.5 for ffn, error in zip(self.group, told, strict=True)}
        dtype = self.plain.up.dtype
        bias = None if bias is None else bias.to(dtype)
        return dataclasses.replace(self.plain, down=made.down.to(dtype), down_bias=bias), found


class Corrector:
    """Corrects all groups under one ridge: the one that is set, or that with which the model's end moves least.

    Errors of single FFNs do not tell: where one member's error changes what the next one gets, large weights that fit
    what it got before break the model.

    Args:
        seen: what the FFNs did on data. held: rows kept apart, on which the model's end is compared.
    """

    def __init__(self, model: nn.Module, seen: Fitting, held: list[Batch], ridge: float | None) -> None:
        self.model, self.seen, self.ridges = model, seen, ridges_of(ridge)
        self._moved = Drift(model, held) if ridge is None else None

    def best(self, starts: list[tuple[list[FFN], Neurons]]) -> list[tuple[Neurons, dict[str, float]]]:
        """The shared FFN of each group, the anchor first, and each member's error (:meth:`Correction.solve`)."""
        under = [self._solved(group, start) for group, start in starts]
        made = [list(each) for each in zip(*under, strict=True)]  # by ridge
        if len(made) == 1:
            return made[0]
        groups = [group for group, _ in starts]
        return min(made, key=lambda each: self._far([(g, n) for g, (n, _) in zip(groups, each, strict=True)]))

    def _solved(self, group: list[FFN], start: Neurons) -> list[tuple[Neurons, dict[str, float]]]:
        """Under each ridge. What the members did, and its moments, are held of one group at a time."""
        correction = Correction(group, start, self.seen)
        return [correction.solve(ridge) for ridge in self.ridges]

    def _far(self, found: list[tuple[list[FFN], Neurons]]) -> float:
        """How far the model's end moves where each member has the shared weights."""
        assert self._moved is not None
        edits = [ReplaceNeurons.of(ffn.name, neurons) for group, neurons in found for ffn in group]
        with temporarily(self.model, edits):
            return self._moved()
