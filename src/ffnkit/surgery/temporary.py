"""A plan applied for as long as a block runs: the model has its edits inside and is exactly as before after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffnkit.edits import Edit
from ffnkit.model import trainable
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.reparametrized import is_reparametrized
from ffnkit.nn.scaled import Scaled
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery import description
from ffnkit.surgery.apply import fold_layers, take_updates
from ffnkit.surgery.journal import State
from ffnkit.surgery.writer import ModelWriter, resize


class TemporaryPlan:
    """Edits that are in the model while a ``with`` block runs, and out of it again afterwards.

    The new weights are made once; entering and leaving exchange references only. Outside the block the model has its
    own modules and parameters, the very same objects with the same bits. Memory beyond the model: the new weights.

    Args:
        fold: multiply factors into the weights, as ``fk.fold`` does.

    Attributes:
        model: what runs inside the block. found: its FFNs by name; they are views, true inside and outside.
        edited: the names of those that the edits change.
    """

    def __init__(self, model: nn.Module, edits: Iterable[Edit], *, fold: bool = False) -> None:
        edits = tuple(edits)
        self.model = model
        self.found = {ffn.name: ffn for ffn in ffns(model)}
        named = [name for edit in edits for name in (edit.touched or _owning(self.found, edit.target))]
        self.edited = tuple(dict.fromkeys(named))
        before = State.of(model)
        special = {id(module) for module in model.modules() if is_reparametrized(module)}
        try:
            writer = ModelWriter(model)
            writer.check(edits)
            writer.carry_out(edits)
            if fold:
                with torch.no_grad():
                    fold_layers(model, *(m for m in model.modules() if is_reparametrized(m) and id(m) not in special))
            self._before, self._after = before.changed(State.of(model))
        finally:
            before.restore()

    def __enter__(self) -> TemporaryPlan:
        self._after.restore()
        return self

    def __exit__(self, *_: Any) -> None:
        self._before.restore()


@contextmanager
def temporarily(model: nn.Module, edits: Iterable[Edit]) -> Iterator[nn.Module]:
    """The model with the edits, for as long as the block runs, without gradients."""
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(TemporaryPlan(model, edits))
        yield model


@contextmanager
def with_neurons(ffn: FFN, neurons: Neurons) -> Iterator[None]:
    """An FFN with other neurons, of any width, while the block runs; whatever happens, its own are back after it."""
    before = State.of(*ffn.owners.values())
    try:
        resize(ffn, neurons)
        yield
    finally:
        before.restore()


@contextmanager
def without_updates(model: PreTrainedModel) -> Iterator[None]:
    """The model without its updates while the block runs: plain weights below them, masks elsewhere as zeros.

    What trained beside the updates is as it was before them, unless all the rest of the model trained.
    """
    before = State.of(model)
    trainable.lend_flags(model)
    try:
        with torch.no_grad():
            found = ffns(model)
            keys, original = description.width_keys(model, found), description.original_widths(model, found)
            fold_layers(model, model, keep=(LowRank.kind, Scaled.kind))
            take_updates(model)
            description.update_config(model, keys, original)
        yield
    finally:
        before.restore()


def _owning(found: dict[str, FFN], linear: str) -> Iterator[str]:
    """The FFNs that a linear belongs to."""
    for name, ffn in found.items():
        if not ffn.layout.experts and any(f"{o}.{ffn.path(s)}" == linear for o in ffn.owners for s in ffn.sites):
            yield name
