"""How far a model is from its original: as a whole by its answers, and layer by layer, each on its own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.model.finding import block_name, ffns
from ffnkit.tune.answers import Kind
from ffnkit.tune.distil_logits import logits_loss
from ffnkit.tune.distil_outputs import Outputs, model_inputs, run, stack_mask

TINY = 1e-6


def whole_loss(
    student: nn.Module, teacher: nn.Module, batch: Mapping[str, Any], kind: Kind, weight: float = 0.0
) -> Tensor:
    """The distance of two models' answers: KL of words and classes, squared error of numbers, mean over what counts.

    Without a head, and with ``weight`` beside the answers: the mean over layers of the relative squared error of the
    hidden states, each token's by its own size as the next norm reads it. Of models of unlike depth the last states
    count alone. Gradients reach the student.
    """
    states = kind == "states" or weight > 0
    inputs = model_inputs(student, batch)
    with torch.no_grad():
        wanted = run(teacher, inputs, states=states, logits=kind != "states")
    got = run(student, inputs, states=states, logits=kind != "states")
    total = _states(student, got, wanted, batch) * (1.0 if kind == "states" else weight) if states else None
    if got.logits is None or wanted.logits is None:
        assert total is not None
        return total
    found = logits_loss(got.logits, wanted.logits, student, batch, 1.0, 0.0)[0]
    return found if total is None else found + total


def _states(student: nn.Module, got: Outputs, wanted: Outputs, batch: Mapping[str, Any]) -> Tensor:
    losses = []
    for stack, states in got.states.items():
        theirs = wanted.states[stack]
        pairs = list(zip(states, theirs, strict=True)) if len(states) == len(theirs) else [(states[-1], theirs[-1])]
        mask = stack_mask(stack, student, batch, states[-1])
        losses += [relative(ours, each, mask) for ours, each in pairs]
        losses.append(relative(*pairs[-1], mask))  # what is read of the model counts twice
    return torch.stack(losses).mean()


def relative(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of ||ours - theirs||^2 / ||theirs - mean of theirs||^2, in float32."""
    theirs = theirs.to(ours.device).float()
    size = (theirs - theirs.mean(-1, keepdim=True)).square().sum(-1)
    each = (ours.float() - theirs).square().sum(-1) / (size + TINY)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp_min(1)


class Blocks:
    """The layers of a student, each to learn its own outputs from its own inputs in the teacher.

    Attributes:
        losses: of each layer on the last batch.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        """Layers that hold FFNs, have something that trains, and are at the same place in both models.

        Where layers went, their places say no more which is which: then there are none.
        """
        found = {block_name(ffn.name): ffn.stack for ffn in ffns(student)}
        same = {block_name(ffn.name) for ffn in ffns(teacher)} == set(found) and "" not in found
        modules = {name: student.get_submodule(name) for name in (found if same else ())}
        self.teacher, self.stacks = teacher, found
        self.modules = {
            name: module for name, module in modules.items() if any(p.requires_grad for p in module.parameters())
        }
        self.losses: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.modules)

    def learn(self, batch: Mapping[str, Any]) -> float:
        """Gradients of every layer's own loss, in one pass of the teacher; the mean of the losses comes back.

        While the teacher runs, each layer of the student runs on what the teacher's layer got, and goes back at once.
        Memory: one layer's activations.
        """
        self.losses.clear()
        handles = []
        try:
            for name in self.modules:
                hook = partial(self._learn, name, batch)
                handles.append(self.teacher.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
            with torch.no_grad():
                run(self.teacher, model_inputs(self.teacher, batch), states=False, logits=False)
        finally:
            for handle in handles:
                handle.remove()
        return sum(self.losses.values()) / max(len(self.losses), 1)

    def _learn(
        self, name: str, batch: Mapping[str, Any], _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        with torch.enable_grad():
            ours, theirs = _first(self.modules[name](*args, **kwargs)), _first(output)
            mask = stack_mask(self.stacks[name], self.teacher, batch, theirs)
            loss = relative(ours, theirs, mask)
            loss.backward()
        self.losses[name] = loss.item()


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found
