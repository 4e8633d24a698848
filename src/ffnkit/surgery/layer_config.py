"""The config of a model with fewer layers: depth, lists by layer, numbers of layers, and what follows in the modules.

Which entries speak of layers is read from the source of the model's classes (``model.layer_reads``). What plain
transformers builds from the config before and after is then compared, module by module: a layer that moved up may
differ from the one in its new place in its number alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.io.config_text import written
from ffnkit.model.config_keys import candidates
from ffnkit.model.config_values import config_tree, overrides
from ffnkit.model.families.keys import DEPTH_KEYS, HIDDEN_STATE_KEYS, SPECIAL_TOKEN
from ffnkit.model.fresh import built
from ffnkit.model.layer_reads import Reads, reads
from ffnkit.model.linear import walk

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Shorter:
    """A stack that loses layers.

    Attributes:
        holder: its path. before: how many layers it had. kept: the numbers of those that stay.
    """

    holder: str
    before: int
    kept: tuple[int, ...]

    @property
    def gone(self) -> list[int]:
        return [number for number in range(self.before) if number not in self.kept]

    def upto(self, number: int) -> int:
        """How many of the first ``number`` layers stay."""
        return sum(each < number for each in self.kept)

    def moved(self, path: str) -> str | None:
        """The new path of something, None where it goes with its layer."""
        head, number, rest = _split(path, self.holder)
        if number is None:
            return path
        return f"{head}{self.kept.index(number)}{rest}" if number in self.kept else None


def _split(path: str, holder: str) -> tuple[str, int | None, str]:
    """("model.layers.", 3, ".mlp") of a path inside a stack; number None outside."""
    head = f"{holder}." if holder else ""
    number, dot, rest = path.removeprefix(head).partition(".")
    inside = path.startswith(head) and number.isdigit()
    return (head, int(number), dot + rest) if inside else ("", None, "")


# --- the config ---------------------------------------------------------------------------------------------------


def shorten(model: PreTrainedModel, stacks: list[Shorter]) -> None:
    """Let the config, and what modules were told by it, speak of the layers that stay; the layers are still all there.

    Raises:
        FfnkitError: no key holds the depth, or no config builds these layers; what was changed is the caller's to
            undo.
    """
    asked = f"dropping {', '.join(f'{s.holder}.{n}'.strip('.') for s in stacks for n in s.gone)}"
    try:
        old = built(type(model), written(model.config))
    except Exception as error:  # whatever a class of others raises
        what = f"{type(model).__name__} cannot be built from its config ({_first_line(error)})"
        raise FfnkitError(asked, what, "Keep the layers of this model") from error
    homes: list[PreTrainedConfig] = []
    lists: list[tuple[PreTrainedConfig, str, Any]] = []
    for stack in stacks:
        places = _depth(model, stack.holder, stack.before)
        if not places:
            what = f"no key of the config says that {stack.holder} has {stack.before} layers"
            raise FfnkitError(asked, what, "Keep them all")
        for config, key in places:
            setattr(config, key, len(stack.kept))
        homes.append(places[0][0])
        lists += _by_layer(model, places[0][0], stack)
        _hidden_states(model, places[0][0], stack)
    found = _settled(model, old, list(zip(stacks, homes, strict=True)), lists)
    if found.new is None:
        raise FfnkitError(asked, f"no model is built from the shorter config ({found.odd[0]})", "Keep these layers")
    if found.odd:
        more = f" (and {len(found.odd) - 1} more)" if len(found.odd) > 1 else ""
        what = f"a model built from the shorter config is another one: {found.odd[0]}{more}"
        raise FfnkitError(asked, what, "Keep these layers, or drop others")
    _tell(model, old, found, stacks)


def _by_layer(
    model: PreTrainedModel, config: PreTrainedConfig, stack: Shorter
) -> list[tuple[PreTrainedConfig, str, Any]]:
    """Cut lists with an entry a layer, renumber lists of layers; gives what was there, to be put back one by one."""
    known = _read(model, config, stack.holder)
    offsets = dict(known.numbers)
    done: list[tuple[PreTrainedConfig, str, Any]] = []
    for key, value in list(vars(config).items()):
        new = value
        if isinstance(value, list | tuple) and not SPECIAL_TOKEN.search(key):
            if key in offsets and all(type(each) is int for each in value):
                moved = [n - offsets[key] for n in value]
                new = [stack.kept.index(n) + offsets[key] for n in moved if n in stack.kept]
            elif len(value) == stack.before and (key in known.entries or "layer" in key):
                new = [value[n] for n in stack.kept]
            new = type(value)(new)
        if new != value:
            done.append((config, key, value))
            setattr(config, key, new)
    _backbone(config, stack)
    if getattr(config, "is_heterogeneous", False):
        rows = overrides(config)
        config.per_layer_config = {new: rows[n] for new, n in enumerate(stack.kept) if n in rows}
    return done


def _backbone(config: Any, stack: Shorter) -> None:
    """Stages of a backbone are its layers, and stage n is what the first n of them give."""
    names = getattr(config, "stage_names", None)
    if not names or len(names) != stack.before + 1 or not hasattr(config, "set_output_features_output_indices"):
        return
    config.stage_names = names[: len(stack.kept) + 1]
    stages = [stack.upto(n % len(names)) for n in config.out_indices]
    if len(set(stages)) < len(stages):
        what = f"stages {', '.join(config.out_features)} would be the same"
        raise FfnkitError(f"dropping layers of {stack.holder}", what, "Keep a layer between stages that are given out")
    config.set_output_features_output_indices(out_features=None, out_indices=stages)


def _hidden_states(model: PreTrainedModel, config: PreTrainedConfig, stack: Shorter) -> None:
    """Numbers of hidden states, in the configs above that of the stack, say the same states: the input counts too."""
    part = next((path for path, each in config_tree(model.config) if each is config), "").split(".")[-1]
    for _, outer in config_tree(model.config):
        for key in HIDDEN_STATE_KEYS:
            value = vars(outer).get(key)
            if outer is config or value is None or key.partition("_")[0] != part.partition("_")[0]:
                continue
            new = [_state(n, stack) for n in (value if isinstance(value, list | tuple) else [value])]
            setattr(outer, key, new if isinstance(value, list | tuple) else new[0])


def _state(number: int, stack: Shorter) -> int:
    """A hidden state's new number; one that is counted from the end still is."""
    if number >= 0:
        return stack.upto(number)
    return stack.upto(number + stack.before + 1) - len(stack.kept) - 1


def _read(model: nn.Module, config: PreTrainedConfig, holder: str) -> Reads:
    """What the layers of a stack, what holds them, and their config read by layer."""
    parts = holder.split(".")
    above = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    kinds = [type(each) for each in (*above, *model.get_submodule(holder).modules(), config)]
    return reads(kinds)


def _depth(model: PreTrainedModel, holder: str, layers: int) -> list[tuple[PreTrainedConfig, str]]:
    """Every (config, key) that says how many layers the stack has: that of the nearest config, and its copies."""
    word = next((part for part in ("encoder", "decoder") if part in holder.split(".")), None)
    other = {"encoder": "decoder", "decoder": "encoder"}.get(word or "")
    two = other is not None and any(other in name.split(".") for name, _ in model.named_modules())
    tree = list(config_tree(model.config))
    modules = dict(walk(model))
    for _, config in candidates(tree, modules, holder):
        keys = [key for key in DEPTH_KEYS if vars(config).get(key) == layers]
        if two:
            own = [key for key in keys if word in key.split("_")]
            plain = [key for key in keys if not {"encoder", "decoder"} & set(key.split("_"))]
            # T5 and BART keep the encoder's depth in the plain key
            keys = own + (plain if word == "encoder" or not own else [])
        else:
            keys = [key for key in keys if word is None or other not in key.split("_")] or keys
        if keys:
            return [(config, key) for key in keys]
    return []


# --- what it builds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """How the models built before and after differ.

    Attributes:
        odd: what a layer, or anything else that stays, would be otherwise.
        told: (path in the old model, attribute, its value before, after): numbers, and what modules hold of the config.
        new: the model that was built, None where none can be.
    """

    odd: list[str]
    told: list[tuple[str, str, Any, Any]]
    new: Any = None

    def __lt__(self, other: _Found) -> bool:
        return (self.new is None, len(self.odd)) < (other.new is None, len(other.odd))


def _settled(
    model: PreTrainedModel,
    old: nn.Module,
    homes: list[tuple[Shorter, PreTrainedConfig]],
    lists: list[tuple[PreTrainedConfig, str, Any]],
) -> _Found:
    """The config under which least differs: a list may belong to another stack, a number count the layers of a kind."""
    stacks = [stack for stack, _ in homes]
    trials = list(lists)
    for stack, config in homes:
        for key, value in vars(config).items():
            if type(value) is int and 0 < value <= stack.before:  # so many at the beginning, or at the end
                counts = stack.upto(value), len(stack.kept) - stack.upto(stack.before - value)
                trials += [(config, key, count) for count in dict.fromkeys(counts) if count != value]
    best = _compare(model, old, stacks)
    for config, key, value in trials:
        if not best.odd:
            break
        before = vars(config)[key]
        setattr(config, key, value)
        found = _compare(model, old, stacks)
        if found < best:
            best = found
        else:
            setattr(config, key, before)
    return best


def _compare(model: PreTrainedModel, old: Any, stacks: list[Shorter]) -> _Found:
    try:
        new = built(type(model), written(model.config))
    except Exception as error:  # whatever the classes raise: this is no config of theirs
        return _Found([_first_line(error)], [])
    odd: list[str] = []
    told: list[tuple[str, str, Any, Any]] = []
    there = dict(walk(new))
    values = _values(old.config), _values(new.config)
    for name, module in walk(old):
        place: str | None = name
        stack = None
        for each in stacks:
            if place is not None and _split(name, each.holder)[1] is not None:
                place, stack = each.moved(name), each
        if place is None:
            continue
        other = there.pop(place, None)
        if other is None or type(other).__qualname__ != type(module).__qualname__:  # some are made at run time
            odd.append(f"{name} would be {'gone' if other is None else f'a {type(other).__name__}'}")
            continue
        shapes = [{n: tuple(t.shape) for n, t in _tensors(each)} for each in (module, other)]
        odd += [f"{name}.{n} would be {shapes[1].get(n)}" for n in shapes[0] if shapes[0][n] != shapes[1].get(n)]
        odd += [f"{name}.{n} would be there" for n in shapes[1] if n not in shapes[0]]
        for key, before in vars(module).items():
            after = vars(other).get(key)
            if key.startswith("_") or key == "training" or not _plain(before) or _same(before, after):
                continue
            # what is dropped while training hangs on the depth in many families: it is no part of the function
            if stack is None or "drop" in key or _follows(before, after, stack, _split(name, stack.holder)[1], values):
                told.append((name, key, before, after))
            else:
                odd.append(f"{name}.{key} would be {after!r}, not {before!r}")
    odd += [f"{name} would be there" for name in there]
    return _Found(odd, told, new)


def _follows(before: Any, after: Any, stack: Shorter, number: int | None, values: tuple[Any, Any]) -> bool:
    """Whether a value in a layer follows from which layers stay: a layer's number, how many there are, a whole list."""
    if type(before) is int and type(after) is int:
        renumbered = before in stack.kept and stack.kept.index(before) == after
        return renumbered or (before, after) == (stack.before, len(stack.kept))
    if isinstance(before, list | tuple | dict):
        return any(_same(before, a) and _same(after, values[1].get(key)) for key, a in values[0].items())
    return False


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """The lists of a tree of configs, by path."""
    tree = config_tree(config)
    return {f"{p}.{k}": v for p, c in tree for k, v in vars(c).items() if isinstance(v, list | tuple | dict)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_plain(each) for each in value)
    if isinstance(value, dict):
        return all(_plain(each) for each in value.values())
    return isinstance(value, _PLAIN)


def _same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)


def _tell(model: PreTrainedModel, old: nn.Module, found: _Found, stacks: list[Shorter]) -> None:
    """Modules hold what those of the new model hold; what somebody else set there stays."""
    modules = dict(walk(model))
    for name, key, before, after in found.told:
        _renew(modules.get(name), key, before, after)
    inside = {id(config) for _, config in config_tree(model.config)}
    there = dict(walk(found.new))
    for name, module in walk(old):  # copies of the config, such as those of T5's stacks
        config = getattr(modules.get(name), "config", None)
        place: str | None = name
        for stack in stacks:
            place = stack.moved(place) if place is not None else None
        new = getattr(there.get(place or name), "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in inside and place is not None and new is not None:
            for key, before in vars(module.config).items():
                after = vars(new).get(key)
                if _plain(before) and not _same(before, after):
                    _renew(config, key, before, after)


def _renew(owner: Any, key: str, before: Any, after: Any) -> None:
    if owner is not None and key in vars(owner) and _same(vars(owner)[key], before):
        setattr(owner, key, copy.copy(after))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
