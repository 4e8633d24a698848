"""What the fields of edits may hold, checked when an edit is read from a file.

A field says it in its annotation: plain data by their type and pydantic's bounds, tensors by :data:`Places`,
:data:`Weights` or :data:`Bits`. What holds between fields says ``Edit.check_fields``, what hangs on a model
``Edit.check``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from ffnkit.errors import FfnkitError
from ffnkit.io.files import spooled

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def _places(value: Tensor) -> Tensor:
    if value.dtype not in _INTEGERS:
        raise ValueError(f"whole numbers are wanted, not {value.dtype}")
    if value.numel() and int(value.min()) < 0:
        raise ValueError(f"it holds {int(value.min())}, and places begin at 0")
    return value


def _weights(value: Tensor) -> Tensor:
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        raise ValueError(f"floats of two bytes or more are wanted, not {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError("it holds NaN or infinity")
    return value


def _bits(value: Tensor) -> Tensor:
    if value.dtype != torch.uint8 or value.ndim != 1:
        raise ValueError(f"a row of bytes is wanted, not {value.dtype} of {value.ndim} axes")
    return value


Places = Annotated[Tensor, AfterValidator(_places)]
Weights = Annotated[Tensor, AfterValidator(_weights)]
Bits = Annotated[Tensor, AfterValidator(_bits)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Sizes = Annotated[list[Size], Field(min_length=1)]
Site = Annotated[str, Field(pattern="^(up|gate|down)$")]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


def read(cls: type[Any], values: Mapping[str, Any], asked: str) -> Any:
    """An object of a dataclass from data that a file holds, each field of the type and within the bounds that it has.

    Raises:
        FfnkitError: fields are missing, unknown, or of other values.
    """
    kind: Any = cls
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    wanted = {name for name, field in fields.items() if (field.default, field.default_factory) == unset}
    if odd := [*(set(values) - set(fields)), *(wanted - set(values))]:
        raise FfnkitError(asked, f"its fields are {_listed(values)}", f"There are {_listed(fields)} ({odd[0]})")
    found = {name: checked(_adapter(kind, name), value, f"{asked}, field {name}") for name, value in values.items()}
    return cls(**found)


def held(asked: str, **tensors: Tensor | None) -> dict[str, Any]:
    """New weights as an edit holds them, large ones memory-mapped. Raises FfnkitError where they are not finite."""
    for name, value in tensors.items():
        # a sum is finite only if all terms are, and costs no further memory
        if value is not None and not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            found = f"{name} would hold NaN or infinity in {str(value.dtype).removeprefix('torch.')}"
            raise FfnkitError(asked, found, "Give other data, or load the model with dtype float32 or bfloat16")
    return {name: None if value is None else spooled(value.detach()) for name, value in tensors.items()}


def checked(adapter: TypeAdapter[Any], value: Any, asked: str) -> Any:
    """A value from a file; FfnkitError where it is not what ``adapter`` wants."""
    try:
        if _holds_tensors(value):
            return adapter.validate_python(value)
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        told = str(first.get("ctx", {}).get("error", first["msg"]))
        raise FfnkitError(asked, f"{where}: {told}" if where else told, "Make the file again") from error
    except (TypeError, ValueError, RecursionError) as error:  # no JSON: of a caller's own making
        raise FfnkitError(asked, f"it is no plain data ({error})", "Give numbers, texts, lists and mappings") from error


def adapter(kind: Any) -> TypeAdapter[Any]:
    """Strict checks of a type; a class of pydantic brings its own settings."""
    own = isinstance(kind, type) and hasattr(kind, "model_config")
    return TypeAdapter(kind) if own else TypeAdapter(kind, config=_STRICT)


@cache
def _adapter(cls: Any, name: str) -> TypeAdapter[Any]:
    try:
        return adapter(get_type_hints(cls, include_extras=True)[name])
    except NameError:  # of another package, imported for types alone
        return adapter(Any)


def _holds_tensors(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else ()
    return isinstance(value, Tensor) or any(isinstance(each, Tensor) for each in inner)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, names)))[:200]
