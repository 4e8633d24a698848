"""The loss of layer-wise distillation: how far the hidden states of two models are apart.

Source: Wei et al., MLP Fusion (arXiv 2307.08941): the mean over layers of the mean over tokens of
||h_l(student) - h_l(teacher)||^2, summed over the width.
Differs: padding is masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError


def layerwise_loss(student: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over layers of the mean over tokens of the squared distance between hidden states, summed over the width.

    Tokens are those that the masks keep; embeddings do not count. Of an encoder-decoder both stacks count. The last
    hidden state of models that end in a norm (LLaMA, GPT-2, T5) is taken after that norm, in both models. Differences
    are formed and summed in float32. Gradients reach the student only.

    Args:
        batch: inputs of both models; labels are left out unless a decoder takes its inputs from them.

    Raises:
        FfnkitError: models of unlike depth or width, or a mask of another length than the hidden states.
    """
    inputs = _inputs(student, batch)
    with torch.no_grad():
        wanted = _hidden_states(teacher, inputs)
    got = _hidden_states(student, inputs)
    depths = [(len(states) if states else 0) for states in wanted.values()]
    if [len(states) for states in got.values()] != depths or got.keys() != wanted.keys():
        raise FfnkitError("layer-wise distillation", "student and teacher differ in depth", "Keep every layer")
    losses = []
    for stack, states in got.items():
        mask = _mask(stack, student, inputs, states[0])
        losses += [_distance(s, t, mask) for s, t in zip(states, wanted[stack], strict=True)]
    return torch.stack(losses).mean()


def _distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    if student.shape != teacher.shape:
        found = f"hidden states of shapes {tuple(student.shape)} and {tuple(teacher.shape)}"
        raise FfnkitError("layer-wise distillation", found, "Use the model before compression as the teacher")
    squared = (student.float() - teacher.to(student.device).float()).square().sum(-1)
    if mask is None:
        return squared.mean()
    return (squared * mask).sum() / mask.sum().clamp(min=1)


def _hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Outputs of every layer of every stack, embeddings left out."""
    device = next(model.parameters()).device
    output = model(**{k: v.to(device) for k, v in inputs.items()}, output_hidden_states=True, return_dict=True)
    found = {name: output.get(f"{name}_hidden_states") for name in ("encoder", "decoder")}
    if not any(found.values()):
        found = {"": output.get("hidden_states")}
    states = {name: tuple(value[1:]) for name, value in found.items() if value}
    if not any(states.values()):
        do = "Distil a model that has output_hidden_states"
        raise FfnkitError(f"hidden states of {type(model).__name__}", "its output has none", do)
    return states


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    labels = inputs.pop("labels", inputs.pop("label", None))
    has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    given = any(name.startswith("decoder_input") for name in inputs)
    if has_decoder and not given and labels is not None and labels.ndim == 2:
        inputs["labels"] = labels  # the decoder's inputs are made from them
    return inputs


def _mask(stack: str, model: nn.Module, inputs: Mapping[str, Tensor], states: Tensor) -> Tensor | None:
    """Ones for the tokens that count, (batch, tokens); None where all do."""
    mask = _decoder_mask(inputs, states) if stack == "decoder" else inputs.get("attention_mask")
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(states.shape[:2]):
        found = f"a mask of shape {tuple(mask.shape)} for hidden states of shape {tuple(states.shape)}"
        raise FfnkitError(f"layer-wise distillation of {type(model).__name__}", found, "Leave the mask out of the data")
    return mask.to(device=states.device, dtype=torch.float32)


def _decoder_mask(inputs: Mapping[str, Tensor], states: Tensor) -> Tensor | None:
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"]
    if "labels" in inputs:
        return inputs["labels"].ne(-100)
    mask = inputs.get("attention_mask")
    given = any(name.startswith("decoder_input") for name in inputs)
    if given or mask is None or tuple(mask.shape) != tuple(states.shape[:2]):
        return None
    # Classifiers feed the inputs to the decoder shifted by one: a start token, then the tokens but the last.
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
