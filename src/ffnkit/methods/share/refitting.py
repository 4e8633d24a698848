"""Refit the output layer that several FFNs are to share to what each of them gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ffnkit.calibration.features import Features
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import lifted
from ffnkit.model.ffn import FFN, activations
from ffnkit.ops import local
from ffnkit.ops.matching import ROWS
from ffnkit.ops.neurons import Neurons


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


def corrected(
    group: list[FFN], orders: Tensor, held: Features, ridge: float, start: Neurons | None = None
) -> tuple[Neurons, dict[str, float]]:
    """The shared FFN with its output layer refitted to all members, and each member's relative output error then.

    Minimises sum over members i of ||h(X_i) D^T + b - Y_i||_F^2 + lambda ||D - D_0||_F^2, with X_i and Y_i what the
    i-th FFN receives and gives on the data, h the shared hidden layer, D_0 its averaged output layer and lambda =
    ridge x the mean square of h, times the tokens. b only where the FFN has an output bias.

    Args:
        group: the anchor first. orders: (len(group) - 1, ff), or empty: the anchor's weights are shared as they are.
        held: features "input" and "output" of all members. start: shared weights in place of both.

    Raises:
        FfnkitError: an activation function that is not known.
    """
    anchor = group[0]
    mean = lifted(start) if start is not None else shared(group, orders)
    act = _activation(anchor, held)
    device, bias = mean.up.device, mean.down_bias is not None
    gram = torch.zeros(mean.ff, mean.ff, dtype=torch.float64, device=device)
    cross = torch.zeros(mean.ff, mean.d, dtype=torch.float64, device=device)
    sums_h = torch.zeros(mean.ff, dtype=torch.float64, device=device)
    sums_r = torch.zeros(mean.d, dtype=torch.float64, device=device)
    count = 0
    for _, hidden, gap, _ in _passes(group, mean, held, act):
        gram += (hidden.T @ hidden).double()
        cross += (hidden.T @ gap).double()
        sums_h += hidden.sum(0, dtype=torch.float64)
        sums_r += gap.sum(0, dtype=torch.float64)
        count += len(hidden)
    shift = max(ridge * gram.diagonal().mean().item(), torch.finfo(torch.float64).tiny)
    if bias:
        gram -= torch.outer(sums_h, sums_h) / count
        cross -= torch.outer(sums_h, sums_r) / count
    gram.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(gram)
    change = torch.linalg.lstsq(gram, cross).solution if int(failed) else torch.cholesky_solve(cross, factor)
    fitted = dataclasses.replace(mean, down=(mean.down.double() + change.T).to(mean.down.dtype))
    if mean.down_bias is not None:
        moved = (sums_r - change.T @ sums_h) / count
        fitted = dataclasses.replace(fitted, down_bias=(mean.down_bias.double() + moved).to(mean.down_bias.dtype))
    dtype = anchor.raw().up.dtype
    return fitted.to(dtype), errors(group, fitted, held, act)


def errors(group: list[FFN], neurons: Neurons, held: Features, act: local.Activation) -> dict[str, float]:
    """||y' - y||_F / ||y||_F on the data for each FFN of the group, if ``neurons`` take its place."""
    rest = {ffn.name: 0.0 for ffn in group}
    whole = dict.fromkeys(rest, 0.0)
    for name, _, gap, output in _passes(group, neurons, held, act):
        rest[name] += gap.double().square().sum().item()
        whole[name] += output.double().square().sum().item()
    return {name: (rest[name] / max(whole[name], 1e-300)) ** 0.5 for name in rest}


def _passes(
    group: list[FFN], neurons: Neurons, held: Features, act: local.Activation
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, hidden (n, ff), what is missing in the output (n, d), the FFN's own output) slice by slice."""
    for ffn in group:
        inputs, outputs = held.get(ffn.name, "input"), held.get(ffn.name, "output")
        for x, y in zip(inputs.split(ROWS), outputs.split(ROWS), strict=True):
            x, y = x.to(neurons.up), y.to(neurons.up)
            hidden = local.hidden(neurons, x, act)
            yield ffn.name, hidden, y - torch.nn.functional.linear(hidden, neurons.down, neurons.down_bias), y


def _activation(ffn: FFN, held: Features) -> local.Activation:
    """The FFN's activation: the candidate that explains its outputs."""
    own = lifted(ffn.raw())
    x, y = (held.get(ffn.name, kind)[:64].to(own.up) for kind in ("input", "output"))
    if (found := local.activation_of(own, x, y, activations(ffn), local.forward)) is not None:
        return found
    do = "Set correct='none', which needs to know the weights only"
    raise FfnkitError(f"correcting {ffn.name}", "its activation is none that is known", do)
