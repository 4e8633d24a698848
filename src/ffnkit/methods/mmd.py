"""Few points that stand for all neurons: maximum mean discrepancy, minimised by gradient descent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit import blocks
from ffnkit.edits import Edit, Rewrite
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, Width, check_counts, each, generator, lifted, singles, targets
from ffnkit.ops.neurons import Neurons, balance, concatenate
from ffnkit.plans import Draft, Progress

KERNELS = 5


@dataclass(frozen=True)
class Mmd:
    """Move c points, random neurons at first, until their distribution is close to that of all neurons.

    The loss is the biased MMD^2 between the points and the rows [up, up_bias, down], with five kernels
    exp(-||a - b||^2 / bw_i), bw_i = the mean of the squared distances times 2^(i-2), i = 0..4. Afterwards up, up_bias
    and down are multiplied by (ff / c)^(1/2); the output bias stays.

    Attributes:
        width: neurons left in each FFN: an int counts them, a float is a share (1.0 = all); or one by FFN's name.
        layers: which layers, e.g. "all", "last:8", "4-11", "4,5,9", "encoder:last:4".
        steps: of AdamW.
        learning_rate: of AdamW.
        seed: of the neurons that the points start from.

    Source: MLP Fusion (arXiv 2307.08941), the baseline "MMD"; Gretton et al. 2012, eq. 5.
    Differs: the released code multiplies the output bias too. With a gate the neuron is [gate, up, down] in a
        canonical scale, and the root stands on up and down.
    """

    width: Width
    layers: str = "all"
    steps: int = 100
    learning_rate: float = 1e-2
    seed: int = 0

    name: ClassVar[str] = "mmd"
    summary: ClassVar[str] = "points whose distribution matches the neurons' (maximum mean discrepancy, baseline)"
    paper: ClassVar[str] = "arXiv 2307.08941"

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def targets(self, model: nn.Module) -> list[tuple[blocks.FFN, int]]:
        """The FFNs to narrow and their new widths. Raises FfnkitError where layers or settings do not fit."""
        check_counts(self, seed=0, steps=0)
        if not self.learning_rate > 0:
            raise FfnkitError(f"learning_rate {self.learning_rate!r}", "not above 0", "Give a positive number")
        return targets(model, self.layers, self.width)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for number, (ffn, width, neurons) in enumerate(each(self.targets(model), progress, "matching")):
            canonical = balance(lifted(neurons)) if ffn.linear_in_up else lifted(neurons)
            parts = [
                self._moved(single, width, generator(self.seed, number, e))
                for e, single in enumerate(singles(canonical))
            ]
            made = concatenate([p for p, _ in parts]) if neurons.experts else parts[0][0]
            edits.append(Rewrite.of(ffn.name, made.to(neurons.up.dtype)))
            quantities[ffn.name] = {"MMD^2": sum(loss for _, loss in parts) / len(parts)}
        return Draft(tuple(edits), quantities)

    def _moved(self, neurons: Neurons, width: int, generator: torch.Generator) -> tuple[Neurons, float]:
        if width == neurons.ff:
            return neurons, 0.0
        rows = neurons.matrix()
        start = torch.randperm(len(rows), generator=generator)[:width].to(rows.device)
        with torch.enable_grad():
            points = rows[start].clone().requires_grad_()
            optimizer = torch.optim.AdamW([points], lr=self.learning_rate)
            for _ in range(self.steps):
                optimizer.zero_grad()
                mmd(points, rows, constant=False).backward()
                optimizer.step()
        points = points.detach()
        root = (len(rows) / width) ** 0.5
        found = neurons.with_matrix(points)
        bias = None if found.up_bias is None else found.up_bias * root
        scaled = dataclasses.replace(found, up=found.up * root, up_bias=bias, down=found.down * root)
        return scaled, mmd(points, rows).item()


def mmd(points: Tensor, rows: Tensor, *, constant: bool = True) -> Tensor:
    """The biased MMD^2 of points (c, m) and rows (n, m).

    Args:
        constant: whether the mean over pairs of rows, (n, n), which no point changes but by the bandwidth, is added.
            Without it gradients in the points are the same, and memory is (c, n).
    """
    among, across = _squared(points, points), _squared(points, rows)
    count, total = len(points) + len(rows), 0.0
    # The mean squared distance over all pairs of both sets, in closed form: 2 sum ||a||^2 / n - 2 ||mean||^2.
    with torch.no_grad():
        square = points.square().sum() + rows.square().sum()
        mean = (points.sum(0) + rows.sum(0)) / count
        width = (2 * count * square - 2 * count**2 * mean.square().sum()) / (count**2 - count)
    result = points.new_zeros(())
    for number in range(KERNELS):
        bandwidth = width * 2.0 ** (number - KERNELS // 2)
        result = result + (-among / bandwidth).exp().mean() - 2 * (-across / bandwidth).exp().mean()
        if constant:
            total += sum((-_squared(part, rows) / bandwidth).exp().sum().item() for part in rows.split(1024))
    return result + total / len(rows) ** 2


def _squared(first: Tensor, second: Tensor) -> Tensor:
    """Squared distances, (len(first), len(second)), never below 0."""
    squares = first.square().sum(1)[:, None] + second.square().sum(1)[None] - 2 * first @ second.T
    return squares.clamp_min(0)
