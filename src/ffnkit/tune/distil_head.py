"""Heads in distillation of answers: a teacher's must be trained, and a student's new one takes the teacher's."""

from __future__ import annotations

import torch
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.io.loading import newly_initialized


def settle_heads(student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Give the freshly drawn head of ``student`` the teacher's weights; names of what was copied.

    Only models that ffnkit opened tell that their head was drawn (:func:`ffnkit.io.loading.drawn_head`). A head that is
    in the student's files, or that was trained since, stays.

    Raises:
        FfnkitError: the teacher's head is freshly drawn, or the student's is and the teacher has none of its shape.
    """
    drawn = newly_initialized(teacher)
    if drawn:
        found = f"the teacher's head is freshly drawn ({drawn[0]} was not in its files), so its answers mean nothing"
        do = "Tune the teacher first, or distil the hidden states (objective layers)"
        raise FfnkitError("distillation of logits", found, do)
    new = newly_initialized(student)
    theirs = dict(teacher.named_parameters())
    for name in new:
        ours = student.get_parameter(name)
        if name not in theirs or theirs[name].shape != ours.shape:
            found = f"the student's {name} is freshly drawn and the teacher has none of its shape"
            do = "Give both models a head of the same kind and labels"
            raise FfnkitError("distillation of logits", found, do)
        with torch.no_grad():
            ours.copy_(theirs[name])
    return new
