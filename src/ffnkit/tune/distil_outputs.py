"""What two models say of a batch: the inputs that both get, hidden states, logits, and which tokens count."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration import batches, padding
from ffnkit.errors import FfnkitError
from ffnkit.tasks.running import IGNORED, is_seq2seq


@dataclass(frozen=True)
class Outputs:
    """Outputs of every layer by stack ("encoder", "decoder", or "" for the only one), and logits where asked for."""

    states: dict[str, tuple[Tensor, ...]]
    logits: Tensor | None


def run(model: nn.Module, inputs: Mapping[str, Tensor], *, states: bool, logits: bool) -> Outputs:
    """One forward pass on the model's device; what is not asked for is not kept.

    Raises:
        FfnkitError: the model's output has no hidden states, or no logits.
    """
    known = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if not logits:
        more |= batches.few_logits(model)
    more |= {"output_hidden_states": states, "return_dict": True}
    output = batches.called(model, {**batches.prepared(model, inputs), **more})
    answers = output.get("logits")
    answers = answers[0] if isinstance(answers, tuple | list) else answers  # further ones stand beside the first
    if logits and answers is None:
        do = "Distil the hidden states (objective layers), or a model with one head that gives logits"
        raise FfnkitError(f"logits of {type(model).__name__}", "its output has none", do)
    return Outputs(_hidden_states(model, output) if states else {}, answers if logits else None)


def _hidden_states(model: nn.Module, output: Any) -> dict[str, tuple[Tensor, ...]]:
    """Outputs of every layer of every stack, embeddings left out."""
    found = {name: output.get(f"{name}_hidden_states") for name in ("encoder", "decoder")}
    if not any(found.values()):
        found = {"": output.get("hidden_states")}
    states = {name: tuple(value[1:]) for name, value in found.items() if value}
    if not any(states.values()):
        do = "Distil a model that has output_hidden_states"
        raise FfnkitError(f"hidden states of {type(model).__name__}", "its output has none", do)
    return states


def labels_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The labels of a batch; None where it has none."""
    labels = batch.get("labels", batch.get("label"))
    return labels if isinstance(labels, Tensor) else None


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch without labels; of an encoder-decoder the decoder's inputs are made from them."""
    inputs = batches.model_inputs(model, {name: value for name, value in batch.items() if isinstance(value, Tensor)})
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if "labels" not in inputs or shift is None:
        return inputs
    return {**inputs, "decoder_input_ids": shift(labels=inputs.pop("labels"))}


def stack_mask(stack: str, model: nn.Module, batch: Mapping[str, Any], states: Tensor) -> Tensor | None:
    """Ones for the tokens of a stack whose hidden states count, float32 (batch, tokens); None where all do.

    Raises:
        FfnkitError: a mask of another length than the hidden states.
    """
    try:
        mask = padding.token_mask(model, batch, "", stack, tuple(states.shape[:2]))
    except FfnkitError as error:
        asked = f"layer-wise distillation of {type(model).__name__}"
        raise FfnkitError(asked, error.found, "Leave the mask out of the data") from error
    return None if mask is None else mask.to(device=states.device, dtype=torch.float32)


def token_targets(model: nn.Module, batch: Mapping[str, Any], logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which positions of ``logits`` (batch, tokens, V) count, bool (batch, tokens), and the label of each, or None.

    A causal model's logits at a token are about the next one: they count where the next one does. A label of -100,
    padding before or after the step, and the last token's forecast do not count.
    """
    shape, device = logits.shape[:2], logits.device
    labels = labels_of(batch)
    labels = labels.to(device) if labels is not None and tuple(labels.shape) == tuple(shape) else None
    if is_seq2seq(model):
        mask = labels.ne(IGNORED) if labels is not None else batch.get("decoder_attention_mask")
        return _ones(shape, device) if mask is None else mask.to(device).bool(), labels
    mask = batch.get("attention_mask")
    keep = mask.to(device).bool() if mask is not None and tuple(mask.shape) == tuple(shape) else _ones(shape, device)
    if not is_causal(model):
        return (keep if labels is None else keep & labels.ne(IGNORED)), labels
    if labels is not None:
        labels = torch.cat([labels[:, 1:], labels.new_full((shape[0], 1), IGNORED)], dim=1)
    following = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], dim=1)
    return keep & following & (labels.ne(IGNORED) if labels is not None else True), labels


def is_causal(model: nn.Module) -> bool:
    """Whether the model is a decoder alone whose logits are about the next token."""
    generates = getattr(model, "can_generate", lambda: False)
    return bool(generates()) and not is_seq2seq(model)


def _ones(shape: Any, device: torch.device) -> Tensor:
    return torch.ones(tuple(shape), dtype=torch.bool, device=device)
