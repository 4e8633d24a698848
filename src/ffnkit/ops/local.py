"""Fit a narrow FFN to a wide one's outputs on the same inputs: plain regression, one FFN at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.ops.neurons import Neurons
from ffnkit.ops.products import is_slow

Activation = Callable[[Tensor], Tensor]
STEP = 0.02  # Adam's step, relative to the rms of the tensor that it moves


def forward(neurons: Neurons, x: Tensor, activation: Activation) -> Tensor:
    """The FFN's output (n, d) for inputs x (n, d)."""
    return nn.functional.linear(hidden(neurons, x, activation), neurons.down, neurons.down_bias)


def hidden(neurons: Neurons, x: Tensor, activation: Activation) -> Tensor:
    """What down receives, (n, ff), in the dtype of the neurons."""
    x = x.to(neurons.up.dtype)
    up = nn.functional.linear(x, neurons.up, neurons.up_bias)
    if neurons.gate is None:
        return activation(up)
    return activation(nn.functional.linear(x, neurons.gate, neurons.gate_bias)) * up


def regress(
    start: Neurons,
    x: Tensor,
    target: Tensor,
    activation: Activation,
    *,
    steps: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    dimensions: Tensor | None = None,
    batch: int = 1024,
    products: torch.dtype | None = None,
) -> Neurons:
    """Minimise ||FFN(x) - target||^2 over all of the neurons' weights by Adam, from ``start``.

    A tenth of the tokens is held out; where a fit is no better on them, smaller steps are tried, and then the start
    comes back.

    Args:
        x, target: (n, d), float32. weights: (n,) how much each token counts.
        dimensions: (d,) each dimension, or (d, d) a metric M, symmetric: an error e counts e^T M e.
        steps: of Adam, with the step falling to zero along a cosine.
        products: dtype of the matrix products (:func:`multiplying`); weights, errors and steps stay as they are.
    """
    order = torch.randperm(len(x), generator=generator).to(x.device)
    held, used = order[: len(x) // 10], order[len(x) // 10 :]
    if steps == 0 or len(held) == 0:
        return start

    def error(neurons: Neurons, rows: Tensor) -> Tensor:
        with multiplying(x.device, products):
            return _loss(neurons, x[rows], target[rows], activation, _rows(weights, rows), dimensions)

    def fit(steps: int, size: float) -> Neurons:
        """``start`` after so many steps of this size; as it is where a quarter of them has made it no better."""
        parts = {name: value.detach().clone().requires_grad_() for name, value in start.tensors().items()}
        sizes = {name: size * max(p.detach().square().mean().sqrt().item(), 1e-8) for name, p in parts.items()}
        groups = [{"params": [p], "lr": sizes[name]} for name, p in parts.items()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        fitted = Neurons(**parts)
        for step in range(steps):
            rows = used[torch.randint(len(used), (min(batch, len(used)),), generator=generator).to(x.device)]
            optimizer.zero_grad()
            with torch.enable_grad():
                error(fitted, rows).backward()
            optimizer.step()
            schedule.step()
            if step == steps // 4 and not gains(fitted):
                break
        forget(optimizer)
        fitted = fitted.map(lambda value: value.detach())
        return fitted if gains(fitted) else start

    def gains(fitted: Neurons) -> bool:
        return bool(error(fitted, held) < before)

    with torch.no_grad():
        before = error(start, held)
        fitted = fit(steps, STEP)
        return fit(steps, STEP / 4) if fitted is start else fitted


def multiplying(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where the weights came in it, unless the device multiplies float32 faster."""
    wanted = dtype is torch.bfloat16 and not (device.type == "cpu" and is_slow(dtype))
    return torch.autocast(device.type, dtype, enabled=wanted, cache_enabled=False)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Let go of what an optimizer holds: it is part of a cycle, and would keep it until garbage is collected."""
    optimizer.state.clear()
    optimizer.param_groups.clear()


def _rows(weights: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if weights is None else weights[rows]


def _loss(
    neurons: Neurons,
    x: Tensor,
    target: Tensor,
    activation: Activation,
    weights: Tensor | None,
    dimensions: Tensor | None,
) -> Tensor:
    gap = forward(neurons, x, activation).to(target.dtype) - target
    if dimensions is None:
        squared = gap.square().mean(1)
    elif dimensions.ndim == 1:
        squared = gap.square() @ dimensions / len(dimensions)
    else:
        squared = ((gap @ dimensions) * gap).mean(1)
    return squared.mean() if weights is None else (squared * weights).sum() / weights.sum().clamp_min(1e-30)


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
