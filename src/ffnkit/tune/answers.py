"""What a model says of a batch, row by row: words, classes, numbers, or its last hidden states where it has no head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.io.loading import newly_initialized
from ffnkit.tune.apart import is_masked
from ffnkit.tune.distil_outputs import model_inputs, run, stack_mask, token_targets
from ffnkit.tune.distil_text import writes

Kind = Literal["words", "classes", "numbers", "states"]


@dataclass(frozen=True)
class Answers:
    """What counts of a model's outputs.

    Attributes:
        kind: "words" (V logits a token), "classes" (logits a row), "numbers" (of a regression), "states" (the last
            hidden state of each token).
        values: (rows, width), as the model gives them.
        labels: (rows,) the words that stand there; None where none are known.
    """

    kind: Kind
    values: Tensor
    labels: Tensor | None = None


def answers(model: nn.Module, batch: Mapping[str, Any], kind: Kind | None = None) -> Answers:
    """One forward pass. Padding is left out.

    Args:
        kind: what is wanted; None: what :func:`kind_of` says.

    Raises:
        FfnkitError: the model gives neither logits nor hidden states.
    """
    kind = kind or kind_of(model, batch)
    inputs = model_inputs(model, batch)
    if kind == "states":
        states = run(model, inputs, states=True, logits=False).states
        stack = list(states)[-1]
        return Answers(kind, *_counted(states[stack][-1], stack_mask(stack, model, batch, states[stack][-1])))
    logits = run(model, inputs, states=False, logits=True).logits
    assert logits is not None
    if logits.ndim == 2:
        return Answers(kind, logits)
    keep, labels = token_targets(model, batch, logits)
    rows = logits[keep]
    return Answers(kind, rows, labels[keep] if kind == "words" and labels is not None else None)


@torch.no_grad()
def kind_of(model: nn.Module, batch: Mapping[str, Any]) -> Kind:
    """What is to be compared of a model: its answers, where its head is trained; else its hidden states."""
    if newly_initialized(model):
        return "states"
    try:
        logits = run(model, model_inputs(model, batch), states=False, logits=True).logits
    except FfnkitError:
        return "states"
    assert logits is not None
    ids, labels = batch.get("input_ids"), getattr(getattr(model, "config", None), "num_labels", None)
    if isinstance(ids, Tensor) and logits.shape == ids.shape and logits.shape[1] != labels:
        return "states"  # a number a token (the discriminator of ELECTRA), and no classes
    if logits.ndim > 2:
        return "words" if writes(model) or is_masked(model) else "classes"
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        return "states"
    return "numbers" if problem == "regression" or logits.shape[1] == 1 else "classes"


def _counted(states: Tensor, mask: Tensor | None) -> tuple[Tensor]:
    flat = states.reshape(-1, states.shape[-1])
    return (flat if mask is None else flat[mask.reshape(-1) > 0],)
