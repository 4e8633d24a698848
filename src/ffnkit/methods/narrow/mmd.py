"""Few points that stand for all neurons: maximum mean discrepancy, minimised by gradient descent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.edits import Edit, ReplaceNeurons
from ffnkit.methods.common import Batch, each, generator, lifted, singles
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.ops.local import forget
from ffnkit.ops.neurons import Neurons, balance, concatenate
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels, times the mean squared distance
AT_ONCE = 1024  # rows that are compared with all points at a time


@dataclass(frozen=True)
class Mmd(Refitting):
    """Move c points, random neurons at first, until their distribution is close to that of all neurons.

    The loss is the biased MMD^2 between the points and the rows [up, up_bias, down], with five kernels
    exp(-||a - b||^2 / bw_i), bw_i = the mean of the squared distances times 2^(i-2), i = 0..4. Afterwards up, up_bias
    and down are multiplied by (ff / c)^(1/2); the output bias stays.

    Source: MLP Fusion (arXiv 2307.08941), the baseline "MMD"; Gretton et al. 2012, eq. 5.
    Differs: the released code multiplies the output bias too. With a gate the neuron is [gate, up, down] in a
        canonical scale, and the root stands on up and down.
    """

    steps: Annotated[int, Doc("of AdamW.", at_least=0)] = 100
    learning_rate: Annotated[float, Doc("of AdamW.", above=0)] = 1e-2
    seed: Annotated[int, Doc("of the neurons that the points start from.", at_least=0)] = 0

    name: ClassVar[str] = "mmd"
    summary: ClassVar[str] = "points whose distribution matches the neurons' (maximum mean discrepancy, baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for number, (ffn, width, neurons) in enumerate(each(self.chosen(model), progress, "matching")):
            canonical = balance(lifted(neurons)) if ffn.linear_in_up else lifted(neurons)
            parts = [
                self._moved(single, width, generator(self.seed, number, e))
                for e, single in enumerate(singles(canonical))
            ]
            made = concatenate([p for p, _ in parts]) if neurons.experts else parts[0][0]
            edits.append(ReplaceNeurons.of(ffn.name, made.to(neurons.up.dtype)))
            quantities[ffn.name] = {"MMD^2": sum(loss for _, loss in parts) / len(parts)}
        return Draft(tuple(edits), quantities)

    def _moved(self, neurons: Neurons, width: int, generator: torch.Generator) -> tuple[Neurons, float]:
        if width == neurons.ff:
            return neurons, 0.0
        rows = neurons.matrix()
        start = torch.randperm(len(rows), generator=generator)[:width].to(rows.device)
        points = rows[start].clone()
        optimizer = torch.optim.AdamW([points], lr=self.learning_rate)
        for _ in range(self.steps):
            step(points, rows, optimizer)
        forget(optimizer)
        points.grad = None
        root = (len(rows) / width) ** 0.5
        found = neurons.with_matrix(points)
        bias = None if found.up_bias is None else found.up_bias * root
        scaled = dataclasses.replace(found, up=found.up * root, up_bias=bias, down=found.down * root)
        return scaled, mmd(points, rows)


def step(points: Tensor, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of the points (c, m) down the MMD^2 to the rows (n, m)."""
    points.grad = gradient(points, rows)
    optimizer.step()


def mmd(points: Tensor, rows: Tensor) -> float:
    """The biased MMD^2 of points (c, m) and rows (n, m)."""
    width = bandwidth(points, rows)
    if not width:
        return 0.0

    def mean(first: Tensor, second: Tensor) -> float:
        total = sum(
            float((squares / (-width * scale)).exp_().sum(dtype=torch.float64))
            for part in first.split(AT_ONCE)
            for squares in (_squared(part, second),)
            for scale in SCALES
        )
        return total / (len(first) * len(second))

    return mean(points, points) - 2 * mean(points, rows) + mean(rows, rows)


def gradient(points: Tensor, rows: Tensor) -> Tensor:
    """The gradient of :func:`mmd` in the points, (c, m), the bandwidth held fixed; rows are taken a few at a time.

    With k' the derivative of the sum of the kernels by the squared distance: 4 / c^2 sum_j k'(p_i, p_j) (p_i - p_j)
    - 4 / (c n) sum_j k'(p_i, r_j) (p_i - r_j).
    """
    width, result = bandwidth(points, rows), torch.zeros_like(points)
    if not width:
        return result
    for others, share in ((points, 4 / len(points) ** 2), (rows, -4 / (len(points) * len(rows)))):
        for part in others.split(AT_ONCE):
            squares = _squared(points, part)
            slope = torch.zeros_like(squares)
            for scale in SCALES:
                slope.sub_((squares / (-width * scale)).exp_().div_(width * scale))
            result.addcmul_(points, slope.sum(1, keepdim=True), value=share).addmm_(slope, part, alpha=-share)
    return result


def bandwidth(points: Tensor, rows: Tensor) -> Tensor:
    """The mean squared distance over all pairs of both sets: 2 (sum ||a||^2 / n - ||mean||^2) n / (n - 1).

    Zero where they differ by no more than rounding, as the neurons of a dead FFN do.
    """
    count = len(points) + len(rows)
    square = torch.linalg.vector_norm(points).square() + torch.linalg.vector_norm(rows).square()
    mean = (points.sum(0) + rows.sum(0)) / count
    found = (2 * count * square - 2 * count**2 * mean.square().sum()) / (count**2 - count)
    return torch.where(found > 16 * torch.finfo(found.dtype).eps * square / count, found, 0.0)


def _squared(first: Tensor, second: Tensor) -> Tensor:
    """Squared distances, (len(first), len(second)), never below 0."""
    one, other = (torch.linalg.vector_norm(each, dim=1).square() for each in (first, second))
    squares = one[:, None] + other
    return squares.addmm_(first, second.T, alpha=-2).clamp_min_(0)
