"""Prefix tuning through peft: keys and values of virtual tokens that every attention sees; they stay on the model."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.model import probe, running
from ffnkit.model.linear import check_untouched
from ffnkit.model.trainable import train_as_before, train_only

if TYPE_CHECKING:
    from ffnkit.tune.kinds import Prefix
    from ffnkit.tune.lifecycle import Preparation

_STD = 0.02  # peft draws from N(0, 1), far from what keys and values of a model are


def put_on(model: nn.Module, tuner: Prefix, preparation: Preparation) -> nn.Module:
    """peft's model around this one. Nothing of the model itself changes.

    Raises:
        FfnkitError: peft and the family do not bear it: there is no cache that takes a prefix, or it changes nothing.
    """
    from peft import PeftModelForCausalLM, PrefixTuningConfig

    from ffnkit.nn.prefix import PrefixModel

    whole: Any = model
    check_untouched(model, f"a prefix on {type(model).__name__}")
    chosen = tuner.beside(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    writes = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    purpose = "CAUSAL_LM" if writes else "FEATURE_EXTRACTION"
    config = PrefixTuningConfig(num_virtual_tokens=tuner.tokens, task_type=purpose)
    kind = PeftModelForCausalLM if writes else PrefixModel  # the former generates
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned: Any = kind(whole, config)
    except Exception as error:  # whatever peft says of a config that it cannot read
        raise _refused(model, f"{type(error).__name__}: {error}") from error
    for parameter, flag in flags:  # peft froze them
        parameter.requires_grad_(flag)
    for parameter in tuned.prompt_encoder.parameters():
        nn.init.normal_(parameter, std=_STD)
    _try(tuned, model)
    train_only(model, lambda parameter: id(parameter) in chosen)
    return tuned


def _try(tuned: Any, model: nn.Module) -> None:
    """Raises FfnkitError where the family does not run with a prefix, or gives what it gives without."""
    batch = probe.runnable(model)
    if batch is None:
        raise _refused(model, "no inputs for it could be made up")
    if "input_ids" in batch:
        batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}  # as tasks give it
    try:
        plain, changed = running.outputs(model, batch), running.outputs(tuned, batch)
    except Exception as error:  # whatever a family raises for a cache that it does not expect
        raise _refused(model, f"{type(error).__name__}: {error}") from error
    if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(plain, changed, strict=True)):
        raise _refused(model, "its outputs do not depend on it")


def _refused(model: nn.Module, why: str) -> FfnkitError:
    first = why.splitlines()[0][:160]
    what = f"peft and this family do not bear it ({first})"
    return FfnkitError(f"a prefix on {type(model).__name__}", what, "Choose another tuner, such as bottleneck or lora")


def take_off(model: Any) -> Any:
    """peft's model with the prefix on; everything trains as before, the prefix too."""
    train_as_before(model.get_base_model())
    return model
