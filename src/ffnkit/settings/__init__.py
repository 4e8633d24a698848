"""Settings, each declared once: its field's type, default, bounds and what it means. Light to import."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ffnkit.errors import FfnkitError, RenamedWarning
from ffnkit.settings.presets import filled

MISSING = dataclasses.MISSING
T = TypeVar("T")
# Layers by expression ("last:8", "4-11"), or a list of these and of numbers; ffnkit.model.targets.select reads it. A
# number alone is text too (see Setting._of_type): a union with int would take True.
WhichLayers = str | Sequence[int | str]
_WORDS: dict[Any, str] = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {type(None): "null", dict: "names with values", Mapping: "names with values", Callable: "a function"}


@dataclass(frozen=True)
class Doc:
    """What stands beside a field's type: ``restarts: Annotated[int, Doc("k-means starts", at_least=1)] = 10``.

    Attributes:
        text: what the setting means.
        at_least, above, at_most, below: bounds of a number, each included or not as it says.
        choices: of a list's members, where the type does not name them.
        example: a value to suggest where one is wrong; None takes the default.
    """

    text: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    example: Any = None

    @property
    def bounds(self) -> str:
        """The bounds in words; "" where there are none."""
        low, high = self.above if self.at_least is None else self.at_least, self.at_most or self.below
        if high is None:
            words = {(True, False): f"at least {low}", (False, True): f"above {low}", (False, False): ""}
            return words[self.at_least is not None, self.above is not None]
        if self.at_least is not None:
            return f"from {low} up to {high}" if self.below is None else f"from {low} up to below {high}"
        return f"above {low} and up to {high}" if self.below is None else f"between {low} and {high}"

    def holds(self, value: float) -> bool:
        """Whether a number lies within the bounds; NaN and infinity never do."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True)
class Setting:
    """One setting of a method, read from its field.

    Attributes:
        name: the field's. type: its annotation, without the doc. default: MISSING where it has to be given.
        doc: its meaning and bounds.
    """

    name: str
    type: Any
    default: Any
    doc: Doc

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that it may have, None left out."""
        parts = get_args(self.type) if get_origin(self.type) in (Union, types.UnionType) else (self.type,)
        return tuple(part for part in parts if part is not type(None))

    @property
    def optional(self) -> bool:
        """Whether None may be given."""
        return type(None) in get_args(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it, or each member of a list, is one of; () where any may be."""
        literal = len(self.kinds) == 1 and get_origin(self.kinds[0]) is Literal
        return get_args(self.kinds[0]) if literal else self.doc.choices

    def check(self, value: Any) -> None:
        """Raises FfnkitError where a value is not of the type, out of bounds, or none of the choices.

        What counts or is a share (int | float) is left to whoever resolves it, who knows of what.
        """
        asked, kinds = f"{self.name} {value!r}", self.kinds
        if value is None and self.optional or Any in kinds:
            return
        if {int, float} <= set(kinds):
            text = isinstance(value, str) and not self._of_type(value)
            if text or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
                raise FfnkitError(asked, "it is no number", f"Give a count, or a share such as {self.name}=0.5")
            return
        if self.doc.choices:
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if not listed or any(each not in self.choices for each in value):
                raise FfnkitError(asked, "not a list of parts", f"Choose one of {', '.join(self.choices)}")
        elif self.choices:
            if value not in self.choices:
                raise FfnkitError(asked, "no such choice", f"Choose one of {', '.join(self.choices)}")
        elif kinds == (int,):
            if isinstance(value, bool) or not isinstance(value, int) or not self.doc.holds(value):
                least = self.doc.at_least or 0
                raise FfnkitError(asked, f"not a whole number of at least {least}", f"Give {self.name}={least} or more")
        elif kinds == (float,):
            if isinstance(value, bool) or not isinstance(value, int | float) or not self.doc.holds(value):
                raise FfnkitError(asked, self._range, f"Give {self._kind} such as {self.name}={self._example}")
        elif not self._of_type(value):
            raise FfnkitError(asked, f"it is {_in_words(type(value))}", f"Give {self.name} as {_in_words(self.type)}")

    @property
    def _range(self) -> str:
        closed = self.doc.at_most is not None or self.doc.below is not None
        return f"not {self.doc.bounds}" if closed else f"not a number {self.doc.bounds}".replace(" at", " of at")

    @property
    def _kind(self) -> str:
        return "a share" if (self.doc.at_most or self.doc.below) == 1 else "one"

    @property
    def _example(self) -> Any:
        if self.doc.example is not None or isinstance(self.default, int | float):
            return self.default if self.doc.example is None else self.doc.example
        tried = (0.1, 1.0, self.doc.at_least, self.doc.at_most)
        return next(value for value in tried if value is not None and self.doc.holds(value))

    def _of_type(self, value: Any) -> bool:
        layers = str in self.kinds and any(_listed(get_origin(kind)) for kind in self.kinds)
        if layers and isinstance(value, int) and not isinstance(value, bool):
            return True  # layers=4 is read as "4"
        return any(_fits(value, kind) for kind in self.kinds)

    @property
    def type_name(self) -> str:
        """The type as a user would write it."""
        return type_name(self.type)


def _fits(value: Any, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    if plain is Literal:
        return value in get_args(kind)
    return isinstance(value, plain) and not (plain is Sequence and isinstance(value, str))


def type_name(annotation: Any) -> str:
    """An annotation in short: ``int | None``, ``Sequence[str]``."""
    if annotation is type(None):
        return "None"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(arg) for arg in args)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if isinstance(annotation, list):
        return f"[{', '.join(type_name(arg) for arg in annotation)}]"
    name = getattr(origin or annotation, "__name__", str(annotation).replace("typing.", ""))
    return f"{name}[{', '.join(type_name(arg) for arg in args)}]" if args else name


def _in_words(kind: Any) -> str:
    """A type as somebody who knows no Python calls it."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    plain = [get_origin(part) or part for part in parts]
    words = (_WORDS.get(part) or ("a list" if _listed(part) else type_name(part)) for part in plain)
    return " or ".join(dict.fromkeys(words))


def _listed(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Sequence)


def settings_of(cls: Any) -> tuple[Setting, ...]:
    """The settings of a method's dataclass, in their order; a field without a :class:`Doc` has no text and bounds."""
    return _read(cls)


@cache
def _read(cls: Any) -> tuple[Setting, ...]:
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:  # of another package, whose types are there for type checkers alone
        hints = {}
    found = []
    for field in dataclasses.fields(cls):
        if field.init:
            hint = hints.get(field.name, Any)
            doc = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Doc)), Doc(""))
            default = field.default if field.default_factory is MISSING else field.default_factory()
            kind = get_args(hint)[0] if get_origin(hint) is typing.Annotated else hint
            found.append(Setting(field.name, kind, default, doc))
    return tuple(found)


def check(method: Any) -> None:
    """Raises FfnkitError, one line, where a setting of a method is not as its field declares it."""
    for each in settings_of(type(method)):
        each.check(getattr(method, each.name))


def told(method: Any) -> dict[str, Any]:
    """A method's settings as plain data: lists for sequences, text for paths; a preset where there is one."""
    found = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    if found.get("preset") is None:
        found.pop("preset", None)
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: settings go on working under the names that they had: ``@renamed(old="new")``."""

    def keep(cls: type[T]) -> type[T]:
        init = cls.__init__

        @wraps(init)
        def with_old_names(self: Any, *args: Any, **given: Any) -> None:
            init(self, *args, **today(cls, given))

        cls.old_names = names  # type: ignore[attr-defined]
        cls.__init__ = with_old_names  # type: ignore[method-assign]
        return cls

    return keep


def today(cls: Any, given: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """Settings of a method or tuner under the names of today, in the order in which they were given.

    Args:
        quiet: without a warning (:class:`RenamedWarning`) for each old name; for records that a user did not write.

    Raises:
        FfnkitError: one was given under both names.
    """
    old: Mapping[str, str] = getattr(cls, "old_names", {})
    found: dict[str, Any] = {}
    for key, value in given.items():
        new = old.get(key, key)
        if new in found or (new != key and new in given):
            raise FfnkitError(f"settings {key} and {new} of {cls.name}", "they are one setting", f"Give {new} alone")
        if new != key and not quiet:
            line = f"setting '{key}' of {cls.name} is called '{new}' now; the old name will go"
            warnings.warn(line, RenamedWarning, stacklevel=3)
        found[new] = value
    return found


def build(cls: type[T], given: Mapping[str, Any], name: str) -> T:
    """A method from its settings by name.

    Raises:
        FfnkitError: a setting that it does not have, or one that is missing.
    """
    known = {each.name: each for each in settings_of(cls)}
    given = filled(cls, today(cls, given))
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            do = f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}"
            raise FfnkitError(f"setting '{key}' of {name}", "there is no such setting", do)
    for key, setting in known.items():
        if setting.required and key not in given:
            raise FfnkitError(f"method {name}", f"no value for '{key}'", f"Give {key}=...")
    return cls(**given)
