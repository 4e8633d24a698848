"""The losses of distillation: how far hidden states, answers, or both of two models are apart.

Source: Wei et al., MLP Fusion (arXiv 2307.08941): the mean over layers of the mean over tokens of
||h_l(student) - h_l(teacher)||^2, summed over the width. The loss of the answers: see ``distil_logits``.
Differs: padding is masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.tune.distil_logits import logits_loss
from ffnkit.tune.distil_outputs import Outputs, model_inputs, run, stack_mask
from ffnkit.tune.settings import DistilSettings


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
    return distillation_loss(student, teacher, batch, DistilSettings())[0]


def distillation_loss(
    student: nn.Module, teacher: nn.Module, batch: Mapping[str, Any], settings: DistilSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of ``settings.objective``, and its parts, unweighted and detached.

    layers: :func:`layerwise_loss`. logits: :func:`ffnkit.tune.distil_logits.logits_loss`. both: layers_weight * layers
    + logits_weight * logits, in one forward pass of each model.

    Returns:
        the loss, and the parts "layers", "logits" and "hard" as far as they are in it.

    Raises:
        FfnkitError: as of the two losses.
    """
    wants = {"states": settings.objective != "logits", "logits": settings.objective != "layers"}
    inputs = model_inputs(student, batch)
    with torch.no_grad():
        wanted = run(teacher, inputs, **wants)
    got = run(student, inputs, **wants)
    terms, parts = [], {}
    if wants["states"]:
        layers = _layers(student, got, wanted, batch)
        terms.append(layers if settings.objective == "layers" else settings.layers_weight * layers)
        parts["layers"] = layers.detach()
    if got.logits is not None and wanted.logits is not None:
        answers, found = logits_loss(
            got.logits, wanted.logits, student, batch, settings.temperature, settings.hard_weight
        )
        terms.append(answers if settings.objective == "logits" else settings.logits_weight * answers)
        parts |= found
    return torch.stack(terms).sum(), parts


def _layers(student: nn.Module, got: Outputs, wanted: Outputs, batch: Mapping[str, Any]) -> Tensor:
    depths = [len(states) for states in wanted.states.values()]
    if [len(states) for states in got.states.values()] != depths or got.states.keys() != wanted.states.keys():
        raise FfnkitError("layer-wise distillation", "student and teacher differ in depth", "Keep every layer")
    losses = []
    for stack, states in got.states.items():
        mask = stack_mask(stack, student, batch, states[0])
        losses += [_distance(s, t, mask) for s, t in zip(states, wanted.states[stack], strict=True)]
    return torch.stack(losses).mean()


def _distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    if student.shape != teacher.shape:
        found = f"hidden states of shapes {tuple(student.shape)} and {tuple(teacher.shape)}"
        raise FfnkitError("layer-wise distillation", found, "Use the model before compression as the teacher")
    squared = (student.float() - teacher.to(student.device).float()).square().sum(-1)
    if mask is None:
        return squared.mean()
    return (squared * mask).sum() / mask.sum().clamp(min=1)
