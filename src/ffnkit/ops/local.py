"""Fit a narrow FFN to a wide one's outputs on the same inputs: plain regression, one FFN at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.ops.neurons import Neurons
from ffnkit.ops.products import is_slow


@dataclass(frozen=True)
class Gating:
    """What down receives (n, ff) of both gate and up (n, ff), where it is not act(gate) * up."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.function(gate, up)


Activation = Callable[[Tensor], Tensor] | Gating
STEP = 0.02  # Adam's step, relative to the rms of the tensor that it moves
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # of what a fit learnt, which are tried on held-out tokens
ENOUGH = 0.5  # of what was learnt in a quarter of the steps: where no more carries over, more steps add noise


def forward(neurons: Neurons, x: Tensor, activation: Activation) -> Tensor:
    """The FFN's output (n, d) for inputs x (n, d)."""
    return nn.functional.linear(hidden(neurons, x, activation), neurons.down, neurons.down_bias)


def hidden(neurons: Neurons, x: Tensor, activation: Activation) -> Tensor:
    """What down receives, (n, ff), in the dtype of the neurons."""
    x = x.to(neurons.up.dtype)
    up = nn.functional.linear(x, neurons.up, neurons.up_bias)
    gate = None if neurons.gate is None else nn.functional.linear(x, neurons.gate, neurons.gate_bias)
    return active(activation, up, gate)


def active(activation: Activation, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """What down receives of what up and gate give."""
    if isinstance(activation, Gating):
        assert gate is not None
        return activation(gate, up)
    return activation(up) if gate is None else activation(gate) * up


@dataclass(frozen=True)
class Sample:
    """Inputs of an FFN (n, d), what it is to give (n, d), and how much each token counts (n,)."""

    inputs: Tensor
    wanted: Tensor
    weights: Tensor | None = None

    def take(self, rows: Tensor) -> Sample:
        return Sample(self.inputs[rows], self.wanted[rows], None if self.weights is None else self.weights[rows])


def regress(
    start: Neurons,
    sample: Sample,
    activation: Activation,
    *,
    steps: int,
    generator: torch.Generator,
    held: Sample | None = None,
    dimensions: Tensor | None = None,
    batch: int = 1024,
    products: torch.dtype | None = None,
) -> Neurons:
    """Minimise ||FFN(x) - wanted||^2 over all of the neurons' weights by Adam, from ``start``.

    What the fit learnt is taken by the share of it under which the error on held-out tokens is least: few tokens teach
    much that does not carry over. Where a quarter of the steps is taken by half or less, the others are left out.

    Args:
        sample: tokens to fit, float32. held: tokens that decide; None holds out a tenth of the others.
        dimensions: (d,) each dimension, or (d, d) a metric M, symmetric: an error e counts e^T M e.
        steps: of Adam, with the step falling to zero along a cosine.
        products: dtype of the matrix products (:func:`multiplying`); weights, errors and steps stay as they are.
    """
    if held is None:
        order = torch.randperm(len(sample.inputs), generator=generator).to(sample.inputs.device)
        tenth = len(order) // 10
        held, sample = sample.take(order[:tenth]), sample.take(order[tenth:])
    count = len(sample.inputs)
    if steps == 0 or not len(held.inputs) or not count:
        return start

    def error(neurons: Neurons, of: Sample) -> Tensor:
        with multiplying(of.inputs.device, products):
            return _loss(neurons, of, activation, dimensions)

    def taken(fitted: Neurons) -> tuple[float, Neurons]:
        """The share of what was learnt that is best on held-out tokens, and the start with it."""
        with torch.no_grad():
            tried = [(0.0, start)] + [(share, between(start, fitted, share)) for share in SHARES]
            return min(tried, key=lambda each: error(each[1], held).item())

    parts = {name: value.clone() for name, value in start.tensors().items()}
    sizes = [STEP * max(value.square().mean().sqrt().item(), 1e-8) for value in parts.values()]
    groups = [{"params": [p.requires_grad_()], "lr": size} for p, size in zip(parts.values(), sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fitted = Neurons(**parts)
    for step in range(1, steps + 1):
        rows = torch.randint(count, (min(batch, count),), generator=generator).to(sample.inputs.device)
        optimizer.zero_grad()
        with torch.enable_grad():
            error(fitted, sample.take(rows)).backward()
        optimizer.step()
        schedule.step()
        if step == -(-steps // 4) and taken(fitted)[0] <= ENOUGH:
            break
    forget(optimizer)
    return taken(fitted)[1]


def between(start: Neurons, end: Neurons, share: float) -> Neurons:
    """``start`` with a share of what it lacks of ``end``."""
    moved = end.tensors()
    return Neurons(**{name: value.lerp(moved[name].detach(), share) for name, value in start.tensors().items()})


def multiplying(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where the weights came in it, unless the device multiplies float32 faster."""
    wanted = dtype is torch.bfloat16 and not (device.type == "cpu" and is_slow(dtype))
    return torch.autocast(device.type, dtype, enabled=wanted, cache_enabled=False)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Let go of what an optimizer holds: it is part of a cycle, and would keep it until garbage is collected."""
    optimizer.state.clear()
    optimizer.param_groups.clear()


def _loss(neurons: Neurons, of: Sample, activation: Activation, dimensions: Tensor | None) -> Tensor:
    gap = forward(neurons, of.inputs, activation).to(of.wanted.dtype) - of.wanted
    if dimensions is None:
        squared = gap.square().mean(1)
    elif dimensions.ndim == 1:
        squared = gap.square() @ dimensions / len(dimensions)
    else:
        squared = ((gap @ dimensions) * gap).mean(1)
    return squared.mean() if of.weights is None else (squared * of.weights).sum() / of.weights.sum().clamp_min(1e-30)


def activation_of(
    neurons: Neurons,
    x: Tensor,
    observed: Tensor,
    candidates: list[Activation],
    gives: Callable[[Neurons, Tensor, Activation], Tensor] = hidden,
) -> Activation | None:
    """The candidate that gives what was observed for inputs x; None where none does.

    Args:
        gives: what was observed of them: ``hidden``, or the outputs (``forward``).
    """
    wanted = observed.float()
    for candidate in candidates:
        try:
            found = gives(neurons, x, candidate)
        except Exception:  # whatever something raises that is no function of numbers (the transform of FNet)
            continue
        if found.shape == wanted.shape and bool((found - wanted).norm() <= 2e-2 * wanted.norm()):
            return candidate
    return None
