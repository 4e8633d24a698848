"""The loss between the answers of two models: softened probabilities, or squared error of a regression.

Source: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2:
T^2 KL(softmax(t/T) || softmax(s/T)) averaged over examples, mixed with the cross entropy of the true labels at T = 1.
Differs: KL where the paper has the cross entropy of the soft targets (a constant apart; zero at equality); each token
of a language model is an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffnkit.errors import FfnkitError
from ffnkit.tune.distil_outputs import labels_of, token_targets

CHUNK = 1 << 22  # numbers of float32 logits worked on at a time


def logits_loss(
    student: Tensor, teacher: Tensor, model: nn.Module, batch: Mapping[str, Any], temperature: float, hard_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1 - hard_weight) * soft + hard_weight * hard, and both parts by the names "logits" and "hard".

    soft: T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over examples, or over the tokens that count. Of a
    regression the squared error, in which T plays no part. hard: cross entropy (squared error) of the labels.

    Args:
        student, teacher: logits (batch, classes) or (batch, tokens, V); gradients reach the student's only.
        model: tells regressions, causal models and encoder-decoders apart.

    Raises:
        FfnkitError: logits of unlike shapes, a multi-label head, or labels that are wanted and not there.
    """
    teacher = teacher.to(student.device)
    if student.shape != teacher.shape:
        found = f"logits of shapes {tuple(student.shape)} and {tuple(teacher.shape)}"
        do = "Give both models the same labels and vocabulary, or distil the hidden states (objective layers)"
        raise FfnkitError("distillation of logits", found, do)
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if student.ndim == 2 and kind == "multi_label_classification":
        found = "a head with a probability of its own for each label"
        raise FfnkitError("distillation of logits", found, "Distil the hidden states (objective layers)")
    if student.ndim == 2 and (kind == "regression" or student.shape[1] == 1):
        return _regression(student, teacher, batch, hard_weight)
    if student.ndim == 2:
        keep, labels = torch.ones(len(student), dtype=torch.bool, device=student.device), labels_of(batch)
        labels = labels.to(student.device) if labels is not None else None
    else:
        keep, labels = token_targets(model, batch, student)
    if hard_weight and (labels is None or labels.is_floating_point()):
        raise _no_labels()
    flat = labels.reshape(-1) if hard_weight and labels is not None else None
    width = student.shape[-1]
    total, soft, hard = _Softened.apply(
        student.reshape(-1, width),
        teacher.reshape(-1, width),
        keep.reshape(-1),
        flat,
        temperature,
        hard_weight,
        student.requires_grad and torch.is_grad_enabled(),
    )
    return total, {"logits": soft, **({"hard": hard} if hard_weight else {})}


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row, (rows,)."""
    ours = F.log_softmax(student / temperature, dim=-1)
    theirs = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1)


def _regression(
    student: Tensor, teacher: Tensor, batch: Mapping[str, Any], hard_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    soft = (student.float() - teacher.float()).square().mean()
    if not hard_weight:
        return soft, {"logits": soft.detach()}
    labels = labels_of(batch)
    if labels is None:
        raise _no_labels()
    hard = (student.float() - labels.to(student.device).float().reshape(student.shape)).square().mean()
    return (1 - hard_weight) * soft + hard_weight * hard, {"logits": soft.detach(), "hard": hard.detach()}


class _Softened(torch.autograd.Function):
    """The mean over rows that count, in float32, some rows of the vocabulary at a time.

    Gradients are found in the forward pass, so that besides the two models' logits one tensor of their size is held
    (the gradient, in the student's type) and float32 copies of a chunk only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        keep: Tensor,
        labels: Tensor | None,
        temperature: float,
        hard_weight: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = keep.nonzero().squeeze(1)
        count = max(len(rows), 1)
        sums = torch.zeros(2, device=student.device)
        gradient = torch.zeros_like(student) if with_gradient else None
        for part in rows.split(max(1, CHUNK // student.shape[1])):
            ours, theirs = student[part].float(), teacher[part].float()
            with torch.set_grad_enabled(with_gradient):
                ours.requires_grad_(with_gradient)
                soft = softened_kl(ours, theirs, temperature).sum()
                hard = (
                    torch.zeros_like(soft) if labels is None else F.cross_entropy(ours, labels[part], reduction="sum")
                )
                total = ((1 - hard_weight) * soft + hard_weight * hard) / count
            if gradient is not None:
                gradient[part] = torch.autograd.grad(total, ours)[0].to(gradient)
            sums += torch.stack([soft.detach(), hard.detach()])
        ctx.save_for_backward(gradient)
        soft, hard = (sums / count).unbind()
        soft, hard = soft.clone(), hard.clone()
        ctx.mark_non_differentiable(soft, hard)
        return (1 - hard_weight) * soft + hard_weight * hard, soft, hard

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype), *(None for _ in range(6)))


def _no_labels() -> FfnkitError:
    found = "the data have no labels that fit the model's head"
    return FfnkitError("distillation with hard_weight", found, "Set hard_weight to 0, or give labelled data")
