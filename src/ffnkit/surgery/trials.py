"""A plan's edits on trial: the model has them inside a block and is exactly as before after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffnkit.edits.kinds import Drop, Edit, Factor, Heads, Mask, Swap, Tie
from ffnkit.model.attention import find
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.nn.narrowed import RECORD, Kept
from ffnkit.surgery import heads, masking
from ffnkit.surgery.depth import without_layers
from ffnkit.surgery.memory import carry_out, detach, merged, resize

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
        self.found = {ffn.name: ffn for ffn in ffns(model)}
        masks = masking.linear_masks(edits)
        named = [name for edit in edits for name in edit.touched]
        self.edited = tuple(dict.fromkeys([*named, *_owning(self.found, {mask.ffn for mask in masks})]))
        self._gone = [edit.layer for edit in edits if isinstance(edit, Drop)]
        self._undo: Callable[[], None] | None = None
        touched = [self.found[name] for name in self.edited]
        masked = _linear_places(model, masks)
        heads.check(model, [edit for edit in edits if isinstance(edit, Heads)])
        blocks_ = [find(model, edit.ffn) for edit in edits if isinstance(edit, Heads)]
        attending = [module for attention in blocks_ for module in attention.module.modules()]
        self._before = [_State.of(module) for module in dict.fromkeys([*_modules(touched), *masked, *attending])]
        resized = {edit.ffn for edit in edits if hasattr(edit, "width")}
        keeping = {name for edit in edits if isinstance(edit, KEEPING) for name in edit.touched} - resized
        try:
            with torch.no_grad():
                for name in sorted(keeping):
                    _copied(self.found[name])
                for mask in masks:
                    _copied_weight(model, mask.ffn)
                for edit in edits:
                    if isinstance(edit, Tie):
                        self._tie(edit)
                    elif isinstance(edit, Mask) and not edit.site:
                        masking.mask_linear(model, edit.ffn, edit.mask())
                    elif isinstance(edit, Heads):
                        heads.remove(model, find(model, edit.ffn), edit.index)
                    elif not isinstance(edit, Drop):
                        carry_out(self.found[edit.ffn], edit)
                for ffn in touched if fold else ():
                    detach(ffn)
                if fold and masks:
                    masking.unmask(model, {mask.ffn for mask in masks})
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
    numbers: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        held = (dict(module._parameters), dict(module._buffers), dict(module._modules))
        return cls(module, type(module), held, {k: v for k, v in vars(module).items() if type(v) in (int, tuple, Kept)})

    def restore(self) -> None:
        module = self.module
        if type(module) is not self.kind:  # experts that serve a factor
            module.__class__ = self.kind
        now: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
        for own, kept in zip(now, self.held, strict=True):
            own.clear()
            own.update(kept)
        vars(module).pop(RECORD, None)
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


def _owning(found: dict[str, FFN], linears: set[str]) -> Iterator[str]:
    """The FFNs that one of these linears belongs to."""
    for name, ffn in found.items():
        if not ffn.layout.experts and any(f"{o}.{ffn.path(s)}" in linears for o in ffn.owners for s in ffn.sites):
            yield name


def _linear_places(model: nn.Module, masks: list[Mask]) -> Iterator[nn.Module]:
    """The linears that get masks, and the modules that they stand in."""
    for mask in masks:
        weight = masking.stored_weight(model.get_submodule(mask.ffn))
        for linear, names in masking.linears_of(model, weight).items():
            yield linear
            yield from (model.get_submodule(name.rpartition(".")[0]) for name in names)


def _copied_weight(model: nn.Module, name: str) -> None:
    """Give a linear a weight of its own with the same values, and a mask, in every place where it stands."""
    weight = masking.stored_weight(model.get_submodule(name))
    fresh = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    for linear in masking.linears_of(model, weight):
        for key, parameter in linear._parameters.items():
            if parameter is weight:
                linear._parameters[key] = fresh
        if (mask := linear._buffers.get("mask")) is not None:
            linear._buffers["mask"] = mask.clone()


def _lend(ffn: FFN, member: FFN) -> None:
    """The member's linears compute with the FFN's very parameters."""
    for owner in member.owners.values():
        for site in ffn.sites:
            source, target = ffn.linear(site), member.linear(site, owner)
            target.weight, target.bias = source.weight, source.bias
