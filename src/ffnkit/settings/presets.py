"""Presets: values for the settings that are not given, such as those of a method's paper. Light to import."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """Values that a class of settings takes for what is not given.

    The class declares them by name, ``presets = {"paper": Preset("arXiv ..., released code", {"rank": 16})}``, beside
    the setting that chooses one, ``preset: Annotated[Literal["paper"] | None, Doc(...)] = None``. Dataclasses need
    the decorator :func:`with_presets`; classes of ``settings.checked.Checked`` do not.

    Attributes:
        source: where the values stand, in words.
        values: of settings of the class, by name; those that equal the defaults of today too.
    """

    source: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.source}: {_listed(self.values)}"


def presets_of(cls: Any) -> Mapping[str, Preset]:
    """The presets that a class of settings declares, by name."""
    found: Mapping[str, Preset] = getattr(cls, "presets", {})
    return found


def filled(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, with the values of the preset that it names in the place of what was not.

    Args:
        cls: chooses presets by its setting "preset", or the one that its attribute ``chooses_preset`` names.
        given: settings by their names of today. A preset that is not known fills nothing; whoever checks refuses it.
    """
    chosen = given.get(getattr(cls, "chooses_preset", "preset"))
    preset = presets_of(cls).get(chosen) if isinstance(chosen, str) else None
    return dict(given) if preset is None else {**given, **{k: v for k, v in preset.values.items() if k not in given}}


def unlike(cls: Any, given: Mapping[str, Any], name: str = "paper") -> str | None:
    """In words, how settings differ from those of a preset; None where they do not or there is no such preset.

    Args:
        given: as a user gave them; the others have their defaults, or what their own preset says.
    """
    preset = presets_of(cls).get(name)
    if preset is None:
        return None
    now = {**_defaults(cls), **filled(cls, given)}
    other = {k: now.get(k) for k, value in preset.values.items() if _plain(now.get(k)) != _plain(value)}
    if not other:
        return None
    theirs = {k: preset.values[k] for k in other}
    return f"not as in {preset.source}: {_listed(other)} where that has {_listed(theirs)}"


def with_presets(cls: type[T]) -> type[T]:
    """Class decorator of a dataclass: what its preset says stands for what is not given. Below ``renamed``."""
    init = cls.__init__
    names = [each.name for each in dataclasses.fields(cls) if each.init and not each.kw_only]  # type: ignore[arg-type]

    @wraps(init)
    def with_values(self: Any, *args: Any, **given: Any) -> None:
        placed = dict(zip(names, args, strict=False))
        init(self, *args, **{k: v for k, v in filled(cls, placed | given).items() if k in given or k not in placed})

    cls.__init__ = with_values  # type: ignore[method-assign]
    return cls


def _defaults(cls: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(cls):
        return {each.name: each.default for each in dataclasses.fields(cls)}
    return {name: info.get_default(call_default_factory=True) for name, info in cls.model_fields.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in values.items())


def _word(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_word, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
