"""Settings that pydantic checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ffnkit.settings import today
from ffnkit.settings.presets import filled


class Checked(BaseModel):
    """Settings: none that is unknown, none that changes once made; a number is finite, and no truth value."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _named_and_filled(cls, given: Any) -> Any:
        return filled(cls, today(cls, given)) if isinstance(given, dict) else given

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = set(_leaves(cls.model_fields[str(info.field_name)].annotation))
        for each in _scalars(value):
            if isinstance(each, bool) and kinds & {int, float} and bool not in kinds:
                raise PydanticCustomError("number", "should be a number")
            if isinstance(each, float) and not math.isfinite(each):
                raise PydanticCustomError("number", "should be a finite number")
        return value


def _leaves(annotation: Any) -> Iterator[Any]:
    parts = get_args(annotation)
    yield from (leaf for part in parts for leaf in _leaves(part)) if parts else (annotation,)


def _scalars(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    yield from (value,) if parts is None else (each for part in parts for each in _scalars(part))
