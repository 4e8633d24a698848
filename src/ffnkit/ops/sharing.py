"""All weights of a shared FFN fitted to its members at once, and what each member keeps for itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffnkit.ops import local
from ffnkit.ops.local import STEP, Activation
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.union import ROWS, Member


@dataclass(frozen=True)
class Own:
    """What one member has beside the shared weights: ``y = (W + second first) (scale * h) + bias``.

    Attributes:
        scale: (ff,) of the hidden neurons. bias: (d,), or None where the FFN has no output bias.
        first: (r, ff), second: (d, r), or None.
    """

    scale: Tensor
    bias: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None

    @classmethod
    def none(cls, neurons: Neurons) -> Own:
        """What changes nothing."""
        return cls(neurons.up.new_ones(neurons.ff), neurons.down_bias)

    def without(self) -> Own:
        """The difference, of the same rank, is none."""
        return self if self.second is None else dataclasses.replace(self, second=torch.zeros_like(self.second))

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if v is not None}

    def folded(self, neurons: Neurons) -> Neurons:
        """The member as an FFN of its own."""
        down = neurons.down
        if self.first is not None and self.second is not None:
            down = down + self.second @ self.first
        return dataclasses.replace(neurons, down=down * self.scale, down_bias=self.bias)


def forward(neurons: Neurons, own: Own, x: Tensor, activation: Activation) -> Tensor:
    """A member's output (n, d) for inputs (n, d)."""
    hidden = local.hidden(neurons, x, activation) * own.scale
    y = nn.functional.linear(hidden, neurons.down, own.bias)
    return y if own.first is None or own.second is None else y + (hidden @ own.first.T) @ own.second.T


def errors(neurons: Neurons, owns: list[Own], members: list[Member], activation: Activation) -> list[float]:
    """Each member's squared error in the metric of its reader, relative to the variance of its outputs there."""
    result = []
    for own, member in zip(owns, members, strict=True):
        gap = 0.0
        for x, y, w in zip(*(v.split(ROWS) for v in (member.inputs, member.outputs, member.tokens)), strict=True):
            squares = (forward(neurons, own, x, activation) - y).square() * w[:, None]
            gap += float((squares.sum(0) * member.dimensions).sum(dtype=torch.float64))
        result.append(gap * member.scale / float(member.tokens.sum()))
    return result


def regress(
    start: Neurons,
    owns: list[Own],
    members: list[Member],
    activation: Activation,
    *,
    steps: int,
    generator: torch.Generator,
    scales: bool,
    batch: int = 1024,
) -> tuple[Neurons, list[Own]]:
    """Minimise the sum of the members' relative errors (:func:`errors`) over all weights by Adam, from ``start``.

    Args:
        steps: of Adam, the step falling to zero along a cosine. scales: whether members' own scales are fitted too.
        owns: the very same one may stand for several members, which then go on sharing it.
        batch: tokens of each member a step.
    """
    parts = {name: value.detach().clone().requires_grad_() for name, value in start.tensors().items()}
    parts.pop("down_bias", None)
    copies = {id(own): {name: value.detach().clone() for name, value in own.tensors().items()} for own in owns}
    mine = [copies[id(own)] for own in owns]
    free = [(n, v) for own in copies.values() for n, v in own.items() if n != "scale" or scales]
    groups = [{"params": [p], "lr": STEP * _size(p)} for p in parts.values()]
    groups += [{"params": [value.requires_grad_()], "lr": STEP * _size(value)} for _, value in free]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        for own, member in zip(mine, members, strict=True):
            rows = torch.randint(len(member.inputs), (batch,), generator=generator).to(member.inputs.device)
            with torch.enable_grad():
                gap = forward(Neurons(**parts), Own(**own), member.inputs[rows], activation) - member.outputs[rows]
                squares = (gap.square() * member.dimensions).sum(1)
                weights = member.tokens[rows]
                (member.scale * (squares * weights).sum() / weights.sum()).backward()
        optimizer.step()
        schedule.step()
    local.forget(optimizer)
    done = Neurons(**{n: v.detach() for n, v in parts.items()}, down_bias=start.down_bias)
    fresh = {key: Own(**{n: v.detach() for n, v in own.items()}) for key, own in copies.items()}
    return done, [fresh[id(own)] for own in owns]


def between(
    start: tuple[Neurons, list[Own]], end: tuple[Neurons, list[Own]], share: float
) -> tuple[Neurons, list[Own]]:
    """``start`` with a share of what it lacks of ``end``; members that share what they keep go on sharing it."""
    owns = {
        id(new): Own(**{name: value.lerp(new.tensors()[name], share) for name, value in old.tensors().items()})
        for old, new in zip(start[1], end[1], strict=True)
    }
    return local.between(start[0], end[0], share), [owns[id(new)] for new in end[1]]


def _size(value: Tensor) -> float:
    return max(value.detach().square().mean().sqrt().item(), 1e-8)
