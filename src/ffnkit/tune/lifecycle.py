"""What a tuner does to a model, undone whatever happens: where it fails, where it is abandoned, where a run stops."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ffnkit.surgery.journal import State, journal

_NOTE = "_ffnkit_tuned"  # on a model: what undoes the tuner that was prepared on it
_ABSENT = ...  # in the place of a value: there is none
# what running sets on modules; accelerate prepares no model twice, in mixed precision neither
_RUN = ("forward", "gradient_checkpointing", "_gradient_checkpointing_func", "_is_accelerate_prepared")
Place = tuple[str, Any]  # the name of a dict or set among an object's attributes, "" for these themselves; a key in it
Undo = Callable[[nn.Module], Any]


# --- what a tuner changed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """One attribute, or one entry of a dict or set among the attributes, before and after.

    Tensors are held weakly, and so are the modules that came: the model holds them, and whoever takes them out lets
    them go.
    """

    owner: Any
    place: Place
    was: Any
    became: Any

    @classmethod
    def of(cls, owner: Any, place: Place, was: Any, became: Any) -> _Change:
        kept = weakref.ref(became) if isinstance(became, nn.Module) else _weakly(became)
        return cls(owner, place, _weakly(was), kept)

    def undo(self) -> None:
        """As it was, unless someone else has changed it since."""
        was, became = _strongly(self.was), _strongly(self.became)
        if was is not None and became is not None and _at(self.owner, self.place) is became:
            _put(self.owner, self.place, was)

    def copied(self, memo: dict[int, Any]) -> _Change:
        parts = (copy.deepcopy(_strongly(value), memo) for value in (self.was, self.became))
        return _Change.of(copy.deepcopy(self.owner, memo), self.place, *parts)


class _Nothing:
    """None as a value; a weak reference gives None where what it held is gone."""

    def __deepcopy__(self, memo: Any) -> _Nothing:
        return self


_NONE = _Nothing()


def _weakly(value: Any) -> Any:
    return TensorWeakRef(value) if isinstance(value, Tensor) else _NONE if value is None else value


def _strongly(held: Any) -> Any:
    return held() if isinstance(held, TensorWeakRef | weakref.ref) else held


def _at(owner: Any, place: Place) -> Any:
    within, key = place
    if key == "__class__":
        return type(owner)
    held = vars(owner).get(within, {}) if within else vars(owner)
    value = (True if key in held else _ABSENT) if isinstance(held, set) else held.get(key, _ABSENT)
    return _NONE if value is None else value


def _put(owner: Any, place: Place, value: Any) -> None:
    within, key = place
    held: Any = vars(owner).get(within, {}) if within else vars(owner)
    if key == "__class__":
        owner.__class__ = value
    elif isinstance(held, set):
        held.discard(key) if value is _ABSENT else held.add(key)
    elif value is _ABSENT:
        held.pop(key, None)
    else:
        held[key] = None if value is _NONE else value


def _values(owner: Any) -> dict[Place, Any]:
    """All attributes of a module or config, and what lies in a module's dicts and sets."""
    found: dict[Place, Any] = {("", "__class__"): type(owner)}
    for name, value in vars(owner).items():
        if name not in ("training", _NOTE):  # whoever runs the model sets the mode
            found["", name] = value
            if isinstance(owner, nn.Module) and isinstance(value, dict | set):
                found |= {(name, key): value[key] if isinstance(value, dict) else True for key in value}
    return found


class _Note:
    """What a tuner changed in a model, as it was and as it became. References only; no weight is held by it."""

    def __init__(self, changes: Iterable[_Change], flags: WeakTensorKeyDictionary, last: Iterable[Undo]) -> None:
        self.changes, self.flags, self.last = list(changes), flags, list(last)

    def undo(self, model: nn.Module) -> None:
        for change in self.changes:
            change.undo()
        for parameter, (was, became) in self.flags.items():
            if parameter.requires_grad is became:
                parameter.requires_grad_(was)
        for undo in self.last:
            undo(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Note:
        flags = WeakTensorKeyDictionary()
        for parameter, both in self.flags.items():
            flags[copy.deepcopy(parameter, memo)] = both
        kept = [c.copied(memo) for c in self.changes if None not in (_strongly(c.was), _strongly(c.became))]
        return _Note(kept, flags, copy.deepcopy(self.last, memo))

    def __reduce__(self) -> Any:  # a model from a file has forgotten
        return _Note, ((), WeakTensorKeyDictionary(), ())


class Preparation:
    """What a tuner is given while it prepares a model.

    Attributes:
        data: batches with labels, or None. keep: a file for the tuner's plan, or None.
        progress: whether long work tells on stderr where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Mapping[str, Any]] | None = None,
        keep: Path | None = None,
        progress: bool = False,
    ):
        self.model, self.data, self.keep, self.progress = model, data, keep, progress
        self._last: list[Undo] = []
        self.from_here()

    def afterwards(self, undo: Undo) -> None:
        """Have this done to the model at the end, where the tuner is undone; what was asked for last comes first."""
        self._last.insert(0, undo)

    def from_here(self) -> None:
        """What was done so far stays when the tuner is undone: other forms of weights, of which one is enough."""
        state = State.of(self.model)
        self._owners = {id(row.owner): row.owner for row in state.rows.values()}
        self._before = {key: _values(owner) for key, owner in self._owners.items()}
        self._flags = [(p, p.requires_grad) for p in state.parameters]

    def note(self) -> _Note:
        """What undoes all that happened since."""
        changes = []
        for key, owner in self._owners.items():
            before, after = self._before[key], _values(owner)
            for place in before.keys() | after.keys():
                was, became = before.get(place, _ABSENT), after.get(place, _ABSENT)
                if was is not became:
                    changes.append(_Change.of(owner, place, was, became))
        flags = WeakTensorKeyDictionary()
        for parameter, was in self._flags:
            if parameter.requires_grad is not was:
                flags[parameter] = (was, parameter.requires_grad)
        return _Note(changes, flags, self._last)


# --- prepare, finish, undo ------------------------------------------------------------------------------------------


@contextmanager
def preparing(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]] | None = None,
    keep: Path | None = None,
    progress: bool = False,
) -> Iterator[Preparation]:
    """A tuner prepares the model inside the block: where it fails the model is as before, else it can be undone."""
    with journal(model):
        preparation = Preparation(model, data, keep, progress)
        yield preparation
        model.__dict__[_NOTE] = preparation.note()


@contextmanager
def finishing(model: nn.Module) -> Iterator[None]:
    """A tuner is taken off inside the block: where that fails it is on the model still, else it is forgotten."""
    base = _base(model)
    with journal(model):
        yield
        forget(base)


def forget(model: nn.Module) -> None:
    """What a tuner did stays: it cannot be undone from now on."""
    _base(model).__dict__.pop(_NOTE, None)


def undone(model: nn.Module) -> nn.Module:
    """The model without a tuner that was prepared on it and never finished; other models come back as they are.

    Its layers, adapters and cuts go, what trained before it trains again. Parameters of the model that trained in
    place have the values that they came to; what a tuner trained beside them (updates, adapters, the copies of heads
    that peft trains) is gone with it.

    Args:
        model: the model that was prepared, or what preparing it gave.
    """
    base = _base(model)
    note: _Note | None = base.__dict__.get(_NOTE)
    if note is None:
        return model
    with journal(base):
        note.undo(base)
        forget(base)
    return base


def _base(model: nn.Module) -> nn.Module:
    """The model below a peft model, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return cast(nn.Module, base()) if base is not None and hasattr(model, "peft_config") else model


# --- runs -----------------------------------------------------------------------------------------------------------


@contextmanager
def training_run(model: nn.Module, *, undo: bool = True) -> Iterator[None]:
    """Where the block stops, for whatever reason, what running a model leaves on it is taken away.

    That is: the mode of each module, hooks, a ``forward`` of its own, gradient checkpointing, ``use_cache``; and with
    ``undo`` the tuner (:func:`undone`). Weights stay as trained so far.
    """
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    seen = [(module, module.training, _of_run(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        if undo:
            undone(model)
        if use_cache is not None:
            cast(Any, config).use_cache = use_cache
        for module, mode, values in seen:
            module.training = mode
            for place in values.keys() | _of_run(module).keys():
                _put(module, place, values.get(place, _ABSENT))
        raise


def _of_run(module: nn.Module) -> dict[Place, Any]:
    return {
        (within, key): value
        for (within, key), value in _values(module).items()
        if "_hooks" in within or (not within and (key in _RUN or key.startswith("_require_grads_hook")))
    }
