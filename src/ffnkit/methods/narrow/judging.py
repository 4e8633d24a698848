"""Tokens of an FFN that no fit saw: half of them decide between fits, the others tell the error of what was decided."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ffnkit.calibration.reading import Metric
from ffnkit.calibration.statistics import HeldInputs
from ffnkit.methods.narrow.observed import Part
from ffnkit.model.ffn import FFN
from ffnkit.ops import local
from ffnkit.ops.apart import lost, turns
from ffnkit.ops.moments import Moments
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.refit import RIDGES, Deciding, Refit

logger = logging.getLogger(__name__)

ROWS = 1024  # tokens that pass through an FFN at a time


class Judged:
    """What is known of one FFN, or one expert, from tokens held apart.

    Args:
        old: its neurons as they were. seen: what it did on the data.
        activations: functions one of which is its activation. products: the dtype that it multiplies in.

    Attributes:
        activation: the function, None where none of them is it: nothing can be judged then.
        decides, tells: tokens with what the FFN is to give for them, in runs that take turns
            (:func:`~ffnkit.ops.apart.turns`); ``decides`` None where they are too few.
    """

    def __init__(self, old: Neurons, seen: Part, activations: list[local.Activation], products: torch.dtype) -> None:
        x, hidden = seen.held.probe
        self.activation = local.activation_of(old, x, hidden, activations)
        self.products = products
        self.decides: local.Sample | None = None
        self.tells: local.Sample | None = None
        if self.activation is not None and seen.apart.inputs:
            apart = self.sample(old, seen.apart)
            decide, self._places = turns(len(apart.inputs))
            self.tells = apart.take(self._places)
            self.decides = apart.take(decide) if len(decide) else None

    def sample(self, old: Neurons, held: HeldInputs) -> local.Sample:
        """The inputs held, and what the FFN is to give for them: what it gave, and what is missing beyond it."""
        inputs = torch.cat(held.inputs)
        wanted = self.gives(old, inputs)
        if held.missing:
            wanted += torch.cat(held.missing)
        return local.Sample(inputs, wanted, torch.cat(held.weights) if held.weights else None)

    def hidden(self, neurons: Neurons, x: Tensor) -> Tensor:
        """What its neurons give (n, ff) for inputs x (n, d)."""
        assert self.activation is not None
        with torch.no_grad(), local.multiplying(x.device, self.products):
            return local.hidden(neurons, x, self.activation)

    def gives(self, neurons: Neurons, x: Tensor) -> Tensor:
        """The outputs (n, d), float32, for inputs x (n, d), some rows at a time."""
        assert self.activation is not None
        with torch.no_grad(), local.multiplying(x.device, self.products):
            return torch.cat([local.forward(neurons, rows, self.activation).float() for rows in x.split(ROWS)])

    def refitted(
        self,
        neurons: Neurons,
        problem: Refit,
        ridges: Sequence[float] = RIDGES,
        dimensions: Tensor | None = None,
        beside: Sequence[Tensor] = (),
    ) -> tuple[Neurons, Tensor]:
        """The neurons with an output layer refitted, and that layer (d, width) in float64.

        Of several ridges the fits are mixed, by the tokens that decide (:meth:`~ffnkit.ops.refit.Refit.mixed`).

        Args:
            dimensions: what errors count by there (:func:`~ffnkit.ops.mixing.mixed`). beside: output layers to mix in.
        """
        decide = None
        if self.decides is not None:
            rows = self.hidden(neurons, self.decides.inputs)
            decide = Deciding(rows, self.decides.wanted, self.decides.weights)
        down = problem.mixed(ridges, decide, dimensions, beside)
        return with_output(neurons, problem, down), down

    def refitted_again(
        self,
        neurons: Neurons,
        sample: local.Sample,
        start: Tensor,
        ridges: Sequence[float] = RIDGES,
        dimensions: Tensor | None = None,
    ) -> Neurons:
        """Neurons that a regression moved, with the output layer refitted to what they give now.

        The fits are mixed with the layer that the regression left; where no tokens decide, that one stays.

        Args:
            sample: the tokens that they were fitted to. start: (d, width) that the ridges pull towards, as before.
        """
        if self.decides is None:
            return neurons
        ff = neurons.ff
        moments = Moments(ff + neurons.d, sample.inputs.device)
        for places in torch.arange(len(sample.inputs)).split(ROWS):
            rows = sample.take(places)
            given = self.hidden(neurons, rows.inputs).float()
            moments.add(torch.cat((given, rows.wanted), 1), rows.weights)
        mean, biased = moments.mean(), neurons.down_bias is not None
        gram = moments.centred(last=True) if biased else moments.second(last=True)
        centre = (mean[:ff], mean[ff:]) if biased else None
        problem = Refit(gram[:ff, :ff], gram[ff:, :ff], start, centre)
        return self.refitted(neurons, problem, ridges, dimensions, [neurons.down])[0]

    def error(self, new: Neurons, metric: Metric | None = None) -> float | None:
        """The squared error of the new outputs on the tokens that tell, relative to the wanted ones' spread.

        Args:
            metric: how much tokens and dimensions count; of the first tokens alone, where it tells of no more.
        """
        if self.tells is None or not len(self.tells.inputs):
            return None
        wanted, weights = self.tells.wanted, self.tells.weights
        gap = self.gives(new, self.tells.inputs).double() - wanted.double()
        if metric is not None and metric.apart is not None:
            known = self._places[self._places < len(metric.apart)]
            few, tokens = len(known), metric.apart[known.to(metric.apart.device)].double()
            gap, wanted = gap[:few], wanted[:few]
            weights = tokens if weights is None else weights[:few].double() * tokens.to(weights.device)
        return lost(gap, wanted, weights, None if metric is None else metric.dimensions)


def warn_unknown(ffn: FFN, *, refined: bool = False) -> None:
    """Say once of an FFN what is left out where its activation is not known: ``refined`` were it otherwise."""
    left = "it is not refined, one ridge alone is taken" if refined else "one ridge alone is taken"
    logger.warning("%s: its activation is not known; %s, and its error is of fitted tokens", ffn.name, left)


def problem_of(old: Neurons, seen: Part, gram: Tensor, kept: Tensor) -> Refit:
    """The refit of the neurons ``kept`` (width,) to what the FFN is to give; ``gram`` (ff, ff) centred with a bias."""
    mean, centre = seen.moments.mean(), None
    if old.down_bias is not None:
        centre = mean[kept], old.down_bias.double() + old.down.double() @ mean + seen.beyond.mean()
    missing = seen.missing(centred=centre is not None)
    if missing is not None:
        missing[:, gram.diagonal() == 0] = 0.0  # what does not vary has nothing in common with what is missing
    return Refit.of(gram, old.down, kept, missing, centre)


def with_output(neurons: Neurons, problem: Refit, down: Tensor) -> Neurons:
    """The neurons with this output layer, and the output bias that goes with it."""
    bias, dtype = problem.bias(down), neurons.down.dtype
    return dataclasses.replace(neurons, down=down.to(dtype), down_bias=None if bias is None else bias.to(dtype))
