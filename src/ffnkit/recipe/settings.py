"""The names and settings that other parts define: methods, tasks, tuners."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from ffnkit.errors import FfnkitError
from ffnkit.settings import settings_of, today
from ffnkit.settings.presets import filled


def check_task(name: str) -> str | None:
    """What is wrong with a task's name, or None."""
    from ffnkit import tasks
    from ffnkit.recipe.validation import near
    from ffnkit.tasks.images.task import PREFIX
    from ffnkit.tasks.instructions import sets as dialogues

    if name.startswith(PREFIX) or dialogues.known(name):
        return None
    known = tasks.names()
    return None if name in known else f"unknown task {name!r}; {near(name, known)}"


def method_fields(name: str) -> list[str]:
    """The settings of a method; none where it is not known."""
    kind = _methods().get(name)
    return [each.name for each in settings_of(kind)] if kind else []


def check_method(name: str, settings: dict[str, Any]) -> tuple[str, str] | None:
    """The field that is wrong and why, or None.

    Raises:
        pydantic.ValidationError: a setting that is unknown or of a wrong type.
    """
    from ffnkit.recipe.validation import near

    if name == "none":
        if not settings:
            return None
        first = next(iter(settings))
        return (
            first,
            f"a setting of a method, but this arm has none; write `method: {next(iter(_methods()), 'fusion')}` in it",
        )
    if name not in _methods():
        return "method", f"unknown method {name!r}; {near(name, [*_methods(), 'none'])}"
    if getattr(_methods()[name], "trains", False):
        return "method", f"{name} changes nothing by itself, it has to be trained; write `tuner: {{name: {name}}}`"
    if complaint := _wrong_width(settings.get("width", 1)):
        return "width", complaint
    _schema(name).model_validate(filled(_methods()[name], settings))
    return _built(name, settings)


def method_today(name: Any, settings: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """A method's settings under the names of today; as they are where the method is not known."""
    return today(_methods().get(name), settings, quiet=quiet)


def tuner_today(name: Any, settings: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """A tuner's settings under the names of today; as they are where the tuner is not known."""
    return today(_tuners().get(name), settings, quiet=quiet)


def widened(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the whole width in them where a budget takes the width's place."""
    return {**settings, "width": 1.0} if own.get("budget") is not None else dict(settings)


def check_budget(name: str, settings: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong with an arm's budget beside its method and settings: the field and why, or None."""
    given = own.get("budget") is not None
    for field in ("multiple", "uniform"):
        if own.get(field) is not None and not given:
            return field, "belongs to a budget, and this arm has none; Write `budget: 0.5` in it"
    if not given:
        return None
    if "width" in settings:
        return "width", "is given beside a budget; Give one of the two"
    if name in _methods() and not {"width", "layers"} <= set(method_fields(name)):
        return "budget", f"{name} has no width; Choose a method that narrows FFNs"
    if name == "none":
        return "budget", "this arm has no method; Write `method: fusion` in it"
    return None


def fit_to(target: Mapping[str, Any]) -> Any:
    """The method of an arm with a target. Raises FfnkitError on a setting that it does not have, or a wrong target."""
    from ffnkit.budget.fitting import FitTo
    from ffnkit.settings import build

    made = build(FitTo, target, "target")
    _ = made.target
    return made


def check_target(name: str, own: Mapping[str, Any]) -> str | None:
    """What is wrong with an arm's target beside its method, or None."""
    if name != "none":
        return f"is given beside the method {name}, and all that can go competes for it; Leave one of the two out"
    if not isinstance(own["target"], Mapping):
        return "is no mapping; Write `target: {params: 0.8}`"
    try:
        fit_to(own["target"])
    except FfnkitError as error:
        return f"{error.asked}: {error.found}; {error.do}"
    return None


def _wrong_width(width: Any) -> str | None:
    """What is wrong with a width whatever the model; a model may be too narrow for it still."""
    if isinstance(width, bool) or not isinstance(width, int | float):
        return f"{width!r} is not a number; Give a count of neurons, or a share such as 0.5"
    if not width > 0:
        return f"{width} is not above 0; Give a count of neurons, or a share such as 0.5"
    if isinstance(width, float) and width > 1:
        return f"{width} is above 1.0, the whole width; Give a share up to 1.0, or a whole number of neurons"
    return None


def _built(name: str, settings: dict[str, Any]) -> tuple[str, str] | None:
    from ffnkit import methods

    try:
        methods.build(name, **settings)
    except FfnkitError as error:
        named = [field for field in settings if re.search(rf"\b{re.escape(field)}\b", error.asked)]
        return (named[0] if len(named) == 1 else "method"), f"{error.asked}: {error.found}; {error.do}"
    return None


def tuner_fields(name: str) -> list[str]:
    """The settings of a tuner; none where it is not known."""
    kind = _tuners().get(name)
    return list(kind.model_fields) if kind else []


def tuner_stays(name: str) -> bool:
    """Whether what a tuner adds stays on the model."""
    return bool(getattr(_tuners().get(name), "stays", False))


def check_tuner(name: str, settings: dict[str, Any]) -> str | None:
    """What is wrong with a tuner's name, or None.

    Raises:
        pydantic.ValidationError: a setting that is unknown or of a wrong type.
    """
    from ffnkit.recipe.validation import near

    if name not in _tuners():
        return f"unknown tuner {name!r}; {near(name, _tuners())}"
    _tuners()[name].model_validate(settings)
    return None


@cache
def _tuners() -> dict[str, type[BaseModel]]:
    from ffnkit.tune.tuners import TUNERS

    return {tuner.name: tuner for tuner in TUNERS}


def has_setting(method: str, setting: str) -> bool:
    """Whether a method knows a setting."""
    return setting in method_fields(method)


@cache
def _methods() -> dict[str, type]:
    from ffnkit import methods

    return {str(method.name): method for method in methods.known()}


@cache
def _schema(name: str) -> type[BaseModel]:
    """A pydantic model of a method's settings."""
    fields: dict[str, Any] = {s.name: (s.type, ... if s.required else None) for s in settings_of(_methods()[name])}
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return create_model(f"{name} settings", __config__=config, **fields)
