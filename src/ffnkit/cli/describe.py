"""Names, descriptions and settings of methods, tuners and tasks, read from the objects themselves."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.settings import settings_of, today, type_name

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


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``["width=0.25", "layers=last:8"]`` as a dict; values are YAML scalars or lists.

    Raises:
        FfnkitError: a pair without "=", a name given twice, or a value that is no YAML.
    """
    from ffnkit.io.yaml_text import read_yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise FfnkitError(f"--set {pair}", "no name=value", "Write it as --set width=0.25")
        if name in found:
            raise FfnkitError(f"--set {pair}", f"{name} is set twice", "Give each setting once")
        value = read_yaml(text, f"--set {pair}")
        # YAML 1.1 reads 2e-4 as text, for want of a dot.
        found[name] = number(value) if isinstance(value, str) else value
    return found


def number(text: str) -> Any:
    """``text`` as a float when it is one in Python's notation, else unchanged; names like "nan" stay text."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def check_known(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise FfnkitError, listing the known names, when ``given`` has one that is not in ``known``."""
    names = list(known)
    unknown = [name for name in given if name not in names]
    if unknown:
        found = f"{owner} has no such setting"
        raise FfnkitError(f"--set {unknown[0]}=...", found, f"Choose among {', '.join(names) or 'no settings'}")


def build(cls: Any, settings: Mapping[str, Any], owner: str) -> Any:
    """``cls(**settings)`` for a dataclass or pydantic model, with every complaint as one line.

    Raises:
        FfnkitError: unknown or missing settings, or a value of the wrong type or range.
    """
    known, settings = fields(cls), today(cls, settings)
    check_known(settings, known, owner)
    missing = [name for name, info in known.items() if "default" not in info and name not in settings]
    if missing:
        found = f"the setting {missing[0]} is not given"
        raise FfnkitError(owner, found, f"Add --set {missing[0]}=VALUE")
    try:
        return cls(**settings)
    except FfnkitError:
        raise
    except (TypeError, ValueError) as error:
        raise FfnkitError(owner, one_line(error), f"Its settings: {settings_text(known)}") from error


def one_line(error: Exception) -> str:
    """A pydantic error as ``field: message; ...``; any other as its own text on one line."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return " ".join(str(error).split()).rstrip(".")
    parts = []
    for item in errors():
        where = ".".join(str(part) for part in item["loc"])
        value = item.get("input")
        got = f" (got {value!r})" if isinstance(value, (str, int, float, bool)) else ""
        parts.append(f"{where}: {item['msg'][:1].lower()}{item['msg'][1:]}{got}" if where else item["msg"])
    return "; ".join(parts)
