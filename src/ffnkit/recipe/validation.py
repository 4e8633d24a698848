"""Pydantic's errors said in one line that names the field by its path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from ffnkit.errors import FfnkitError
from ffnkit.recipe.settings import method_fields, tuner_fields
from ffnkit.settings.words import in_words

ROOM = 560  # characters for what is wrong beside the first; a part of a line has 600
_MISSING = {"missing"}
_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}


def fail(path: tuple[str | int, ...], message: str, value: Any) -> NoReturn:
    """Raise pydantic's error at ``path`` below the value that is being checked."""
    raise ValidationError.from_exception_data("recipe", [details(path, message, value)])


def details(path: tuple[str | int, ...], message: str, value: Any) -> InitErrorDetails:
    """One of pydantic's errors, in words of ours."""
    kind = PydanticCustomError("recipe", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=path, input=value)


def near(word: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest of ``known``, else the list of them."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(known)}" if known else "none is known here"


def explain(error: ValidationError, data: dict[str, Any], where: str) -> FfnkitError:
    """The errors as one line: the first in full, then the others, as many as fit."""
    lines: dict[str, tuple[str, str, str]] = {}  # one a field: unions report every branch
    # A misspelt field is also a missing one: the misspelling says more.
    for item in sorted(error.errors(include_url=False), key=lambda item: item["type"] in _MISSING):
        line = _line(item, data)
        lines.setdefault(line[0], line)
    (path, found, do), *others = lines.values()
    for number, (other, what, _) in enumerate(others):
        more = f". Also {other}: {what}"
        if len(do) + len(more) > ROOM:
            do += f". And {len(others) - number} more"
            break
        do += more
    return FfnkitError(f"{where}: {path}", found, do)


def _line(item: Any, data: dict[str, Any]) -> tuple[str, str, str]:
    path = _shown(item["loc"], data)
    name = ".".join(str(part) for part in path)
    value, kind = item["input"], item["type"]
    if kind in _UNKNOWN:
        return name, "unknown field", near(path[-1], _fields_at(path[:-1], data)).capitalize()
    if kind in _MISSING:
        return name, "is missing", "Add it"
    if kind == "recipe":
        found, _, do = item["msg"].partition("; ")
        return name, found, do.capitalize() or "Change this field"
    if kind == "literal_error":
        known = [word.strip("' ") for word in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return name, f"unknown value {value!r}", near(value, known).capitalize()
    return name, f"{_short(value)} {in_words(item['msg'])}", "Change this field"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _shown(loc: tuple[str | int, ...], data: dict[str, Any]) -> tuple[str | int, ...]:
    """The path as the file has it: parts that only the schema knows are left out."""
    shown: list[str | int] = []
    here: Any = data
    for place, part in enumerate(loc):
        last = place == len(loc) - 1
        if isinstance(here, dict) and (part in here or last):
            shown.append(part)
            here = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int):
            shown.append(part)
            here = here[part] if part < len(here) else None
    return tuple(shown) or tuple(loc[:1]) or ("recipe",)


def _fields_at(path: tuple[str | int, ...], data: dict[str, Any]) -> list[str]:
    from ffnkit.recipe.schema import (
        Arm,
        Calibration,
        DistilSettings,
        GenerationSettings,
        Limits,
        Measure,
        Recipe,
        TaskSpec,
        TrainSettings,
    )
    from ffnkit.tune.healing.settings import HealSettings

    if not path:
        return list(Recipe.model_fields)
    parts: dict[str, type[BaseModel]] = {
        "calibration": Calibration,
        "limits": Limits,
        "task": TaskSpec,
        "measure": Measure,
    }
    parts |= {"tune": TrainSettings, "heal": HealSettings, "distil": DistilSettings, "generation": GenerationSettings}
    if len(path) == 1 and path[0] in parts:
        return list(parts[str(path[0])].model_fields)
    here: Any = data
    for part in path:
        here = here.get(part, {}) if isinstance(here, dict) else {}
    if path[-1] == "tuner":
        return ["name", *tuner_fields(str(here.get("name", "full")))]
    if len(path) == 2 and path[0] == "arms":
        return [*(f for f in Arm.model_fields if f != "settings"), *method_fields(str(here.get("method", "none")))]
    return []
