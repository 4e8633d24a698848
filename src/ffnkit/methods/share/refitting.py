"""Refit the output layer that several FFNs are to share to what each of them gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ffnkit.calibration.features import Features
from ffnkit.calibration.reading import Metric
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import lifted
from ffnkit.model.ffn import FFN, activations
from ffnkit.ops import local
from ffnkit.ops.apart import MOST, held_out, lost, turns
from ffnkit.ops.matching import ROWS
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.refit import Deciding, Pairs


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
    group: list[FFN],
    orders: Tensor,
    held: Features,
    metrics: Mapping[str, Metric],
    ridge: float | None,
    start: Neurons | None = None,
) -> tuple[Neurons, dict[str, float]]:
    """The shared FFN with its output layer refitted to all members, and each member's relative output error then.

    Minimises sum over members i of w_i ||h(X_i) D^T + b - Y_i||_F^2 + lambda ||D - D_0||_F^2, with X_i and Y_i what the
    i-th FFN receives and gives on the data, h the shared hidden layer, D_0 its averaged output layer, w_i one over the
    variance of Y_i and lambda = ridge x the mean square of h, times the tokens. b only where the FFN has an output
    bias. Without a ridge fits under several are mixed, by tokens held out; other tokens tell the errors. Both, and the
    variances, in the metric of the norms that read the outputs.

    Args:
        group: the anchor first. orders: (len(group) - 1, ff), or empty: the anchor's weights are shared as they are.
        held: features "input" and "output" of all members. metrics: by name. start: shared weights in place of both.

    Raises:
        FfnkitError: an activation function that is not known.
    """
    anchor = group[0]
    mean = lifted(start) if start is not None else shared(group, orders)
    act, device = _activation(anchor, held), mean.up.device
    dimensions = torch.stack([metrics[ffn.name].dimensions for ffn in group]).mean(0).to(device)
    pairs = Pairs(mean.ff, mean.d, device)
    deciding: list[tuple[Tensor, Tensor, Tensor]] = []
    telling: dict[str, list[Tensor]] = {}
    for ffn in group:
        x, y = (held.get(ffn.name, kind) for kind in ("input", "output"))
        weight = 1 / max(float(y.var(0) @ dimensions.cpu()), 1e-30)
        out = held_out(len(x))
        apart, fitted = torch.nonzero(out).flatten(), torch.nonzero(~out).flatten()
        decide, tell = (apart[places[: MOST // len(group)]] for places in turns(len(apart)))
        for rows in _passed(mean, act, x, y, fitted, weight):
            pairs.see(*rows)
        deciding += _passed(mean, act, x, y, decide, weight)
        telling[ffn.name] = [value[tell if len(tell) else fitted].to(mean.up) for value in (x, y)]
    given = Deciding(*map(torch.cat, zip(*deciding, strict=True))) if deciding else None
    down, bias, _ = pairs.fit(mean.down, mean.down_bias, ridge, dimensions, given)
    made = dataclasses.replace(mean, down=down.to(mean.down.dtype), down_bias=bias)
    errors = {
        name: lost(local.forward(made, x, act) - y, y, dimensions=dimensions) ** 0.5 for name, (x, y) in telling.items()
    }
    return made.to(anchor.raw().up.dtype), errors


def _passed(
    neurons: Neurons, act: local.Activation, x: Tensor, y: Tensor, places: Tensor, weight: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the neurons make of some tokens' inputs (n, ff), their wanted outputs (n, d) and weights (n,), in slices."""
    for some in places.split(ROWS) if len(places) else ():
        hidden = local.hidden(neurons, x[some].to(neurons.up), act)
        yield hidden, y[some].to(neurons.up), hidden.new_full((len(some),), weight)


def _activation(ffn: FFN, held: Features) -> local.Activation:
    """The FFN's activation: the candidate that explains its outputs."""
    own = lifted(ffn.raw())
    x, y = (held.get(ffn.name, kind)[:64].to(own.up) for kind in ("input", "output"))
    if (found := local.activation_of(own, x, y, activations(ffn), local.forward)) is not None:
        return found
    do = "Set correct='none', which needs to know the weights only"
    raise FfnkitError(f"correcting {ffn.name}", "its activation is none that is known", do)
