"""What a model is, by reference: so that whatever was done to its modules can be undone, exactly.

Nothing that edits a model writes into a tensor that is there; it makes new ones and exchanges references. So references
are all that an undo needs: the very same modules, parameters and bits are back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

_SHELL = "_shell"  # a plain layer that something stands in for; it is no submodule then


@dataclass(frozen=True)
class _Row:
    """What one module or config holds."""

    owner: Any
    kind: type
    values: dict[str, Any]
    held: dict[str, Any]  # copies of the containers among the values: parameters, children, hooks, lists of a config

    @classmethod
    def of(cls, owner: Any) -> _Row:
        values = dict(vars(owner))
        values.pop("training", None)  # whoever runs the model sets it
        held = {k: v.copy() for k, v in values.items() if isinstance(v, dict | list | set)}
        return cls(owner, type(owner), values, held)

    def restore(self) -> None:
        own = vars(self.owner)
        kept = {"training": own["training"]} if "training" in own else {}
        own.clear()
        own.update(self.values | kept)
        for key, content in self.held.items():
            own[key].clear()
            own[key].extend(content) if isinstance(content, list) else own[key].update(content)
        if type(self.owner) is not self.kind:
            self.owner.__class__ = self.kind

    def equals(self, other: _Row) -> bool:
        pairs = ((self.values, other.values), *((self.held[k], other.held.get(k)) for k in self.held))
        return self.kind is other.kind and all(_same(a, b) for a, b in pairs)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(value is second[key] for key, value in first.items())
    return bool(first == second)


@dataclass(frozen=True)
class State:
    """Modules, configs and parameters as they were at one moment.

    Attributes:
        rows: one for each module and config, by identity.
        parameters: the data of each and whether it trained.
    """

    rows: dict[int, _Row]
    parameters: dict[nn.Parameter, tuple[Tensor, bool]]

    @classmethod
    def of(cls, *modules: nn.Module) -> State:
        """The state of these modules and of all below them."""
        found = list(dict.fromkeys(inner for module in modules for inner in reachable(module)))
        configs = {id(c): c for module in found for c in _configs(vars(module).values())}
        held = {p: (p.data, p.requires_grad) for module in found for p in module._parameters.values() if p is not None}
        return cls({id(each): _Row.of(each) for each in (*found, *configs.values())}, held)

    def restore(self) -> None:
        """Let everything be as it was."""
        for row in self.rows.values():
            row.restore()
        for parameter, (data, flag) in self.parameters.items():
            if not _is(parameter.data, data):
                parameter.data = data
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)

    def changed(self, later: State) -> tuple[State, State]:
        """What differs between this moment and a later one: as it was, and as it became.

        Modules that one of the two does not have are part of its side alone.
        """
        differ = {
            key
            for key in self.rows.keys() | later.rows.keys()
            if key not in self.rows or key not in later.rows or not self.rows[key].equals(later.rows[key])
        }
        moved = {
            p
            for p in self.parameters.keys() | later.parameters.keys()
            if p not in self.parameters
            or p not in later.parameters
            or self.parameters[p][1] is not later.parameters[p][1]
            or not _is(self.parameters[p][0], later.parameters[p][0])
        }

        def part(state: State) -> State:
            rows = {key: row for key, row in state.rows.items() if key in differ}
            return State(rows, {p: held for p, held in state.parameters.items() if p in moved})

        return part(self), part(later)


def _is(first: Tensor, second: Tensor) -> bool:
    """Whether two are the same piece of memory."""
    alike = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    return alike and (first is second or first.is_meta or first.data_ptr() == second.data_ptr())


def reachable(module: nn.Module) -> Iterator[nn.Module]:
    """The module, all below it, and the plain layers that others stand in for; each once."""
    seen: dict[int, nn.Module] = {}
    todo = [module]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        shell = vars(each).get(_SHELL)
        todo += [child for child in (*each._modules.values(), shell) if isinstance(child, nn.Module)]
    yield from seen.values()


def _configs(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _configs(getattr(value, name, None) for name in getattr(value, "sub_configs", {}))


@contextmanager
def journal(model: nn.Module) -> Iterator[State]:
    """All or nothing: where the block fails, for whatever reason, the model is as it was before.

    Memory: references. What the block replaces is held until it ends.
    """
    before = State.of(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise
