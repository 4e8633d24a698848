"""Two models that are compared, though only one of them need exist: a plan put in place and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffnkit import blocks, surgery
from ffnkit.blocks import FFN
from ffnkit.edits import Factor, Keep, Mask, Resize, Rewrite, Swap
from ffnkit.errors import FfnkitError
from ffnkit.plans import Plan

SINGLE = (Resize, Keep, Rewrite, Swap, Factor, Mask)  # edits of one FFN


class Trial:
    """A plan's FFNs, in the model while a ``with`` block runs and out of it again afterwards.

    The compressed weights are made once; entering and leaving exchange references only. Outside the block the model
    has its own modules and parameters, the very same objects with the same bits. Its config is never changed.
    Memory beyond the model: the compressed FFNs.

    Args:
        fold: multiply factors into the weights, as ``fk.fold`` does.

    Attributes:
        model: what runs inside the block. found: its FFNs by name; they are views, true inside and outside.
        edited: the names of those that the plan changes.

    Raises:
        FfnkitError: the plan was made for another model, or joins FFNs or drops layers.
    """

    def __init__(self, model: nn.Module, plan: Plan, *, fold: bool = False) -> None:
        self.model = model
        self.found = {ffn.name: ffn for ffn in blocks.ffns(model)}
        surgery.check_fits(self.found, plan, type(model).__name__)
        odd = next((edit.kind for edit in plan.edits if not isinstance(edit, SINGLE)), None)
        if odd is not None:
            found = f"its edits of kind {odd} join or drop FFNs, so there are no two to compare"
            raise FfnkitError(f"analysing {plan.method}", found, "Leave this method out")
        self.edited = tuple(plan.shapes)
        touched = [self.found[name] for name in self.edited]
        self._before = [_State.of(module) for module in _modules(touched)]
        try:
            with torch.no_grad():
                resized = plan.widths()
                for ffn in touched:
                    if ffn.name not in resized:
                        _copied(ffn)  # masks and folding write into the weights
                for edit in plan.edits:
                    surgery.carry_out(self.found[edit.ffn], edit)
                for ffn in touched if fold else ():
                    surgery.detach(ffn)
            now = dict.fromkeys([*(state.module for state in self._before), *_modules(touched)])
            self._after = [_State.of(module) for module in now]
        finally:
            self._restore(self._before)

    def __enter__(self) -> Trial:
        self._restore(self._after)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore(self._before)

    @staticmethod
    def _restore(states: list[_State]) -> None:
        for state in states:
            state.restore()


class Second:
    """A second model in the place of a :class:`Trial`: a compressed checkpoint, tuned or not.

    Raises:
        FfnkitError: its FFNs have other names or another d than those of ``model``.
    """

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        own = {ffn.name: ffn.d for ffn in blocks.ffns(model)}
        self.model = other
        self.found = {ffn.name: ffn for ffn in blocks.ffns(other)}
        self.edited = tuple(self.found)
        theirs = {name: ffn.d for name, ffn in self.found.items()}
        if theirs != own:
            odd = next(iter(dict.fromkeys(name for name in [*own, *theirs] if own.get(name) != theirs.get(name))))
            found = f"{odd} is not the same block in both ({own.get(odd)} and {theirs.get(odd)} wide, None: not there)"
            do = "Compare a model with its own compressed checkpoint, opened as the same class"
            raise FfnkitError(f"comparing {type(model).__name__} with {type(other).__name__}", found, do)

    def __enter__(self) -> Second:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


Other = Trial | Second


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
