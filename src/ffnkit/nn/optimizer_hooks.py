"""Layers that have something to do around an optimizer's step, whichever optimizer holds their numbers.

The hooks are torch's own for every optimizer, so that a plain loop needs no further call: registered at the first layer
that needs them, removed when no such layer is left. Layers are held weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Around = Callable[[Optimizer, list[Any]], None]

_watched: dict[tuple[Around, int], weakref.ref[nn.Module]] = {}
_before: set[Around] = set()  # of those, what comes before the step; the rest comes behind it
_handles: list[Any] = []
_running: list[Optimizer] = []  # torch walks over its hooks then, and none may be removed


def watch(layer: nn.Module, *, before: Around | None = None, after: Around | None = None) -> None:
    """Call functions around every optimizer's step while the layer lives, each once for all of its layers.

    Args:
        before, after: are given the optimizer and the living layers; which of them it holds is theirs to tell. At the
            time gradients have been accumulated, reduced over the processes, unscaled and clipped.
    """
    for function in filter(None, (before, after)):
        key = function, id(layer)
        _watched[key] = weakref.ref(layer, lambda _, key=key: _gone(key))  # type: ignore[misc]
    if before is not None:
        _before.add(before)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_first))
        _handles.append(register_optimizer_step_post_hook(lambda optimizer, *_: _around(optimizer, False)))


def is_registered() -> bool:
    """Whether torch calls back."""
    return bool(_handles)


def _first(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the step, or behind the closure where that is what gives the gradients (as Lightning has it)."""
    own, *others = args  # an optimizer hands itself on as well
    closure = others[0] if others else kwargs.get("closure")
    if closure is None:
        _around(optimizer, True)
        return None

    def behind() -> Any:
        loss = closure()
        _around(optimizer, True)
        return loss

    return ((own, behind, *others[1:]), kwargs) if others else (args, {**kwargs, "closure": behind})


def leaves_out(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer leaves this step out by itself: mixed precision found a gradient that is not finite."""
    return bool(getattr(optimizer, "found_inf", None))


def _around(optimizer: Optimizer, first: bool) -> None:
    _running.append(optimizer)
    try:
        layers: dict[Around, list[Any]] = {}
        for (function, _), ref in list(_watched.items()):
            layer = ref()
            if layer is not None and (function in _before) is first:
                layers.setdefault(function, []).append(layer)
        for function, living in layers.items():
            function(optimizer, living)
    finally:
        _running.pop()


def _gone(key: tuple[Around, int]) -> None:
    ref = _watched.get(key)
    if ref is not None and ref() is None:  # else the place in memory is another layer's by now
        del _watched[key]
    if not _watched and not _running:
        while _handles:
            _handles.pop().remove()
