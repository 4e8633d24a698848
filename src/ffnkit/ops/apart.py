"""Tokens that no fit sees: half of them decide between fits, the others tell the error of what was decided."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 16  # neighbouring tokens that are held out together: neighbours are alike
MOST = 2048  # tokens that are held for it, at most
FEWEST = 64  # tokens that decide: fewer tell nothing


def held_out(tokens: int) -> Tensor:
    """(tokens,) bool: the tenth of the tokens of a call that is held out, in runs; single ones where it is short."""
    places = torch.arange(tokens)
    return places // (RUN if tokens >= 10 * RUN else 1) % 10 == 9


def turns(tokens: int) -> tuple[Tensor, Tensor]:
    """The places of tokens held out that decide, and of those that tell the error.

    Runs take turns, so that both are of all kinds of text. None decide where they would be fewer than ``FEWEST``;
    all but those of the decision tell, so that the error is of the same tokens either way.
    """
    odd = torch.arange(tokens) // RUN % 2 == 1
    decide, tell = (torch.nonzero(each).flatten() for each in (odd, ~odd))
    return (decide if len(decide) >= FEWEST else decide[:0]), tell


def lost(gap: Tensor, wanted: Tensor, weights: Tensor | None = None, dimensions: Tensor | None = None) -> float:
    """The squared error ``gap`` (n, d) of what was wanted (n, d), relative to its spread around its mean.

    Args:
        weights: (n,) how much tokens count. dimensions: (d,) how much dimensions do.
    """
    gap, wanted = gap.double(), wanted.double()
    weights = wanted.new_ones(len(wanted)) if weights is None else weights.to(wanted)
    dimensions = wanted.new_ones(wanted.shape[1]) if dimensions is None else dimensions.to(wanted)
    centred = wanted - (weights @ wanted) / weights.sum().clamp_min(1e-300)
    rest, total = (float(weights @ (each.square() @ dimensions)) for each in (gap, centred))
    return rest / total if total > 0 else 0.0
