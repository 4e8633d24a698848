"""Names, descriptions and settings of methods, tuners and tasks, read from the objects themselves."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.settings import settings_of, today, type_name
from ffnkit.settings.presets import filled, presets_of
from ffnkit.settings.words import in_words

WORDS = {None: "null", True: "true", False: "false"}  # as YAML has them


def summary(thing: Any) -> str:
    """What a thing says of itself in ``summary`` or ``description``, else the first sentence of its docstring."""
    for name in ("summary", "description"):
        if isinstance(getattr(thing, name, None), str):
            return str(getattr(thing, name))
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def fields(cls: Any) -> dict[str, dict[str, Any]]:
    """Settings of a method or a pydantic model: name -> type, default (absent when it must be given), help."""
    found: dict[str, dict[str, Any]] = {}
    if dataclasses.is_dataclass(cls):
        for each in settings_of(cls):
            found[each.name] = {"type": each.type_name}
            if not each.required:
                found[each.name]["default"] = each.default
            found[each.name]["help"] = each.doc.text
    elif hasattr(cls, "model_fields"):
        for name, info in cls.model_fields.items():
            found[name] = {"type": type_name(info.annotation)}
            if not info.is_required():
                found[name]["default"] = info.get_default(call_default_factory=True)
            if info.description:
                found[name]["help"] = info.description
    chooser = getattr(cls, "chooses_preset", "preset")
    if chooser in found and (presets := presets_of(cls)):
        said = "; ".join(f"{name}, of {preset}" for name, preset in presets.items())
        found[chooser]["help"] = f"{found[chooser]['help'].rstrip('.')}: {said}"
    return found


def settings_text(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """``width (required), layers=all, seed=0``."""
    return ", ".join(f"{name}={default(info)}" if "default" in info else name for name, info in settings.items())


def default(info: Mapping[str, Any]) -> str:
    """A setting's default as a user would type it."""
    if "default" not in info:
        return "required"
    value = info["default"]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return WORDS[value] if is_scalar(value) else str(value)


def is_scalar(value: Any) -> bool:
    """Whether ``value`` is None or a truth value."""
    return value is None or isinstance(value, bool)


def parse_settings(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """``["width=0.25", "layers=last:8"]`` as a dict; values are YAML scalars or lists. ``option`` gave them.

    Raises:
        FfnkitError: a pair without "=", a name given twice, or a value that is no YAML.
    """
    from ffnkit.io.yaml_text import read_yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise FfnkitError(f"{option} {pair}", "no name=value", f"Write it as {option} NAME=VALUE")
        if name in found:
            raise FfnkitError(f"{option} {pair}", f"{name} is set twice", "Give each setting once")
        found[name] = read_yaml(text, f"{option} {pair}")
    return found


def check_known(given: Iterable[str], known: Iterable[str], owner: str, option: str = "--set") -> None:
    """Raise FfnkitError, listing the known names, when ``given`` has one that is not in ``known``."""
    names = list(known)
    unknown = [name for name in given if name not in names]
    if unknown:
        found = f"{owner} has no such setting"
        near = difflib.get_close_matches(unknown[0], names, n=1)
        do = f"Did you mean {near[0]}?" if near else f"Choose among {', '.join(names) or 'no settings'}"
        raise FfnkitError(f"{option} {unknown[0]}=...", found, do)


def build(
    cls: Any, settings: Mapping[str, Any], owner: str, option: str = "--set", flags: Mapping[str, str] | None = None
) -> Any:
    """``cls(**settings)`` for a dataclass or pydantic model, with every complaint as one line.

    Args:
        owner: whose settings they are, in words.
        option: the option that gives them as NAME=VALUE.
        flags: the options of their own that gave some of them, by the setting's name.

    Raises:
        FfnkitError: unknown or missing settings, or a value of the wrong type or range.
    """
    known, settings = fields(cls), filled(cls, today(cls, settings))
    check_known(settings, known, owner, option)
    missing = [name for name, info in known.items() if "default" not in info and name not in settings]
    if missing:
        found = f"the setting {missing[0]} is not given"
        raise FfnkitError(owner, found, f"Add {option} {missing[0]}=VALUE")
    try:
        with typed(flags or {}):
            return cls(**settings)
    except FfnkitError:
        raise
    except (TypeError, ValueError) as error:
        raise _complaint(error, settings, known, owner, option, flags or {}) from error


def _complaint(
    error: Exception,
    settings: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]],
    owner: str,
    option: str,
    flags: Mapping[str, str],
) -> FfnkitError:
    """The line for the first setting that is wrong, as it was typed; the others after it."""
    errors = error.errors(include_url=False) if hasattr(error, "errors") else []
    named = [(str(item["loc"][0]), _found(item)) for item in errors if item["loc"]]
    if not named:
        found = in_words(errors[0]["msg"] if errors else " ".join(str(error).split())).rstrip(".")
        return FfnkitError(owner, _in_options(found, flags), "Change one of them")
    first = {each: next(what for other, what in named if other == each) for each, _ in named}
    asked = {each: f"{flags[each]} " if each in flags else f"{option} {each}=" for each in first}
    (name, found), *others = first.items()
    info = known.get(name, {})
    about = str(info.get("help") or "change it").rstrip(".")
    meaning = f"{about[:1].upper()}{about[1:]}; the default is {default(info)}"
    more = "".join(f". Also {asked[each]}{shown(settings.get(each))}: {what}" for each, what in others)
    return FfnkitError(f"{asked[name]}{shown(settings.get(name))}", found, meaning + more)


def _found(item: Mapping[str, Any]) -> str:
    """What is wrong with a setting, or with a part of it."""
    inner = [f"number {part + 1}" if isinstance(part, int) else str(part) for part in item["loc"][1:]]
    return " ".join(["of it", *inner, in_words(item["msg"])] if inner else [in_words(item["msg"])])


@contextmanager
def typed(flags: Mapping[str, str]) -> Iterator[None]:
    """Has errors call the settings by the options that gave them."""
    try:
        yield
    except FfnkitError as error:
        parts = [_in_options(part, flags) for part in (error.asked, error.found, error.do)]
        if parts == [error.asked, error.found, error.do]:
            raise
        raise FfnkitError(*parts) from error


def _in_options(text: str, flags: Mapping[str, str]) -> str:
    """With options for the names that they stand for: where these begin it, or can be no word of English."""
    for name, flag in flags.items():
        start = "(?<![\\w-])" if "_" in name else "^"
        text = re.sub(rf"{start}{re.escape(name)}(?![\w-])", flag, text)
    return text


def shown(value: Any) -> str:
    """A setting's value as a user would type it."""
    return default({"default": value})
