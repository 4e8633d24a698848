"""What updates are made of, by layer: their settings and tensors, checked when they come from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ffnkit.edits.fields import Count, Places, Size, Weights, adapter, checked

Side = tuple[int, int]


class Given(BaseModel):
    """Settings of an update: how many numbers train, and the weight of the l1 term of its coefficients."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    trained: Count
    l1: Annotated[float, Field(ge=0)] = 0.0

    def odd(self, features: Side, parts: Mapping[str, Tensor]) -> str:
        """What of the tensors does not fit a linear (out, in), in words; "" where all do."""
        factors = parts.get("coefficients")
        if factors is not None and (factors.ndim != 1 or not len(factors) or features[1] % len(factors)):
            return f"coefficients {tuple(factors.shape)} do not go with {features[1]} inputs"
        return ""


class LowRankGiven(Given):
    """Of ``nn.dsee.SparseLowRank``."""

    rank: Count = 0
    alpha: float = 32.0
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0

    def odd(self, features: Side, parts: Mapping[str, Tensor]) -> str:
        (out, inner), rank = features, self.rank
        if rank > max(features):
            return f"rank {rank} is above both sides of {out} x {inner}"
        rows = parts.get("rows")
        shapes: dict[str, tuple[int, ...]] = {"up": (out if rows is None else len(rows), rank), "down": (rank, inner)}
        index = parts.get("index")
        shapes["values"] = () if index is None else (len(index),)
        told = _wrong_shape(parts, shapes if rank else {**shapes, "up": (), "down": ()})
        told = told or _not_places("rows", rows, out) or _not_places("index", index, out * inner)
        return told or super().odd(features, parts)


class SelectedGiven(Given):
    """Of ``nn.sparsegrad.SparseGradLinear``."""

    selection: Literal["fixed", "refresh", "step", "masked-gradient"] = "fixed"
    order: Count = 0
    together: Annotated[str, Field(max_length=1000)] = ""
    every: Count = 0
    count: Count = 0
    core: Annotated[list[Size], Field(min_length=2, max_length=2)] | None = None

    def odd(self, features: Side, parts: Mapping[str, Tensor]) -> str:
        left, right, index = parts.get("left"), parts.get("right"), parts.get("index")
        if (left is None) != (right is None):
            return "it has one basis of two"
        whole = features
        if left is not None and right is not None:
            if left.ndim != 2 or right.ndim != 2 or (left.shape[1], right.shape[1]) != features:
                return f"bases {tuple(left.shape)} and {tuple(right.shape)} are none of {features}"
            whole = (len(left), len(right))
        core = whole if self.core is None else (self.core[0], self.core[1])
        if core[0] > whole[0] or core[1] > whole[1] or (left is None and core != whole):
            return f"a core of {core} does not go into {whole}"
        if self.count > math.prod(core):
            return f"{self.count} entries are more than there are"
        told = _wrong_shape(parts, {"values": core if index is None else (len(index),), "settled": core})
        return told or _not_places("index", index, math.prod(core)) or super().odd(features, parts)


GIVEN: dict[str, tuple[type[Given], frozenset[str]]] = {
    "sparsegrad": (SelectedGiven, frozenset({"index", "values", "left", "right", "settled", "coefficients"})),
    "dsee": (LowRankGiven, frozenset({"up", "down", "values", "index", "rows", "coefficients"})),
    "coefficients": (Given, frozenset({"coefficients"})),
}
_PLACES, _WEIGHTS = adapter(Places), adapter(Weights)


def check_parts(layer: str, given: dict[str, Any], parts: Mapping[str, Tensor], asked: str) -> str:
    """What of an update's settings and tensors is none of its layer, in words.

    Raises:
        FfnkitError: one of them is of another kind than it may be.
    """
    if layer not in GIVEN:
        return f"there is no layer {layer[:100]!r}"
    kind, names = GIVEN[layer]
    checked(adapter(kind), given, asked)
    for name, value in parts.items():
        if name not in names:
            return f"{layer} has no tensor {name[:100]!r}"
        checked(_PLACES if name in ("index", "rows") else _WEIGHTS, value, f"{asked}, {name}")
    return ""


def unfit(layer: str, given: dict[str, Any], parts: Mapping[str, Tensor], features: Side) -> str:
    """What of an update does not fit a linear (out, in), in words; "" where all does."""
    if layer not in GIVEN:
        return ""
    return GIVEN[layer][0].model_validate(given).odd(features, parts)


def _wrong_shape(parts: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> str:
    for name, shape in wanted.items():
        if name in parts and tuple(parts[name].shape) != shape:
            return f"its {name} is {tuple(parts[name].shape)} where {shape or 'none'} fits"
    return ""


def _not_places(name: str, value: Tensor | None, end: int) -> str:
    if value is None:
        return ""
    if value.ndim != 1 or bool((value.diff() <= 0).any()) or (len(value) and int(value[-1]) >= end):
        return f"its {name} holds no ascending places below {end}"
    return ""
