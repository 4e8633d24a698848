"""How large the standard form of a model is, and whether the compact form holds anything that it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from ffnkit.checkpoint.standard import padded_widths, standard_config
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.fresh import built
from ffnkit.model.linear import added_to
from ffnkit.nn.masked import Masked
from ffnkit.nn.quantized import is_quantized_linear
from ffnkit.surgery.description import description, width_keys

FIXED = "no config of {} names the width of its FFNs"
"""Of families that compute it from the hidden size (BLOOM, MPT): their standard form is always as wide."""


LITTLE = 0.005  # share of a model's parameters that is not worth a form which other tools do not open


def standard_parameters(model: PreTrainedModel) -> int:
    """Parameters of the standard form; the model may be one without weights, as a rehearsal leaves it."""
    found = ffns(model)
    keys = width_keys(model, found)
    config = standard_config(model, found, keys, padded_widths(model, found, keys))
    return sum(parameter.numel() for parameter in built(type(model), config).parameters())


def best_form(model: Any) -> Literal["standard", "compact"]:
    """The form that a model is saved in unless one is asked for: the one rule.

    The standard one, which opens everywhere, unless the compact one is smaller (by more than zeros for a few neurons
    take), or keeps what is pruned at zero while the model trains on.
    """
    return "standard" if not next(_held(model), "") else "compact"


def why_compact(model: Any) -> str:
    """In words, what the compact form of a model holds that its standard form does not; "" where it is nothing."""
    return next(_held(model), "")


def _held(model: Any) -> Iterator[str]:
    if added_to(model) or not isinstance(model, PreTrainedModel):
        yield "adapters that no weight holds"
    elif description(model) is not None and has_ffns(model):
        if any(isinstance(module, Masked) for module in model.modules()):
            yield "masks, by which pruned weights stay zero through tuning"
        if any(is_quantized_linear(module) for module in model.modules()):
            yield "quantized weights"
        now, then = sum(p.numel() for p in model.parameters()), standard_parameters(model)
        if then > now * (1 + LITTLE):
            yield f"{now:,} parameters in place of {then:,}"


def saves_nothing(source: nn.Module, edited: PreTrainedModel) -> str:
    """In words, that the standard form of an edited model is as large as that of its source; "" where it is not.

    Args:
        source: the model before its edits. edited: after them; without weights will do.
    """
    before = standard_parameters(source) if isinstance(source, PreTrainedModel) else 0
    then, now = standard_parameters(edited), sum(parameter.numel() for parameter in edited.parameters())
    if then < before or now >= before:
        return ""
    return (
        f"saves nothing as a standard checkpoint: {then:,} parameters, as many as before, {now:,} in ffnkit's compact "
        f"form. {_what_saves(edited)}"
    )


def _what_saves(edited: PreTrainedModel) -> str:
    if not has_ffns(edited) or any(key is not None for key in width_keys(edited, ffns(edited)).values()):
        return "Equal widths in all layers save in every form"
    return f"{FIXED.format(type(edited).__name__)}: no width saves there"
