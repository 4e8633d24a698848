"""A plan's edits on trial: the model has them inside a block and is exactly as before after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffnkit import blocks
from ffnkit.blocks import FFN
from ffnkit.depth import without_layers
from ffnkit.edits import Drop, Edit, Factor, Mask, Swap, Tie
from ffnkit.surgery import carry_out, detach, merged, resize

KEEPING = (Swap, Factor, Mask)  # edits that hold on to the weights they find, and may write into them


class Trial:
    """Edits that are in the model while a ``with`` block runs, and out of it again afterwards.

    The new weights are made once; entering and leaving exchange references only. Outside the block the model has its
    own modules and parameters, the very same objects with the same bits. Its config is never changed, but for layers
    that are dropped. Memory beyond the model: the new weights.

    Args:
        fold: multiply factors into the weights, as ``fk.fold`` does.

    Attributes:
        model: what runs inside the block. found: its FFNs by name; they are views, true inside and outside.
        edited: the names of those that the edits change.
    """

    def __init__(self, model: nn.Module, edits: Iterable[Edit], *, fold: bool = False) -> None:
        edits = list(edits)
        self.model = model
        self.found = {ffn.name: ffn for ffn in blocks.ffns(model)}
        self.edited = tuple(dict.fromkeys(name for edit in edits for name in edit.touched))
        self._gone = [edit.layer for edit in edits if isinstance(edit, Drop)]
        self._undo: Callable[[], None] | None = None
        touched = [self.found[name] for name in self.edited]
        self._before = [_State.of(module) for module in _modules(touched)]
        resized = {edit.ffn for edit in edits if hasattr(edit, "width")}
        keeping = {edit.ffn for edit in edits if isinstance(edit, KEEPING)} - resized
        try:
            with torch.no_grad():
                for name in sorted(keeping):
                    _copied(self.found[name])
                for edit in edits:
                    if isinstance(edit, Tie):
                        self._tie(edit)
                    elif not isinstance(edit, Drop):
                        carry_out(self.found[edit.ffn], edit)
                for ffn in touched if fold else ():
                    detach(ffn)
            now = dict.fromkeys([*(state.module for state in self._before), *_modules(touched)])
            self._after = [_State.of(module) for module in now]
        finally:
            self._restore(self._before)

    def _tie(self, edit: Tie) -> None:
        first, *members = (self.found[name] for name in edit.touched)
        if edit.average:
            resize(first, merged([first, *members], edit.orders))
        for member in members:
            _lend(first, member)

    def __enter__(self) -> Trial:
        self._restore(self._after)
        if self._gone:
            self._undo = without_layers(self.model, self._gone)[1]  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: Any) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._restore(self._before)

    @staticmethod
    def _restore(states: list[_State]) -> None:
        for state in states:
            state.restore()


@contextmanager
def trying(model: nn.Module, edits: Iterable[Edit]) -> Iterator[nn.Module]:
    """The model with the edits, for as long as the block runs, without gradients."""
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(Trial(model, edits))
        yield model


@dataclass(frozen=True)
class _State:
    """What a module holds, by reference."""

    module: nn.Module
    kind: type
    held: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
    numbers: dict[str, int]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        held = (dict(module._parameters), dict(module._buffers), dict(module._modules))
        return cls(module, type(module), held, {k: v for k, v in vars(module).items() if type(v) is int})

    def restore(self) -> None:
        module = self.module
        if type(module) is not self.kind:  # experts that serve a factor
            module.__class__ = self.kind
        now: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
        for own, kept in zip(now, self.held, strict=True):
            own.clear()
            own.update(kept)
        vars(module).update(self.numbers)


def _modules(found: list[FFN]) -> Iterator[nn.Module]:
    """Every module of the FFNs' owners, each once."""
    yield from dict.fromkeys(m for ffn in found for owner in ffn.owners.values() for m in owner.modules())


def _copied(ffn: FFN) -> None:
    """Give an FFN parameters of its own with the same values, in all its owners."""
    fresh = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in ffn.parameters()}
    for module in _modules([ffn]):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in fresh:
                module._parameters[name] = fresh[id(parameter)]


def _lend(ffn: FFN, member: FFN) -> None:
    """The member's linears compute with the FFN's very parameters."""
    for owner in member.owners.values():
        for site in ffn.sites:
            source, target = ffn.linear(site), member.linear(site, owner)
            target.weight, target.bias = source.weight, source.bias
