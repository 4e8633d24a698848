"""What a plan is made of: decisions about single FFNs, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ffnkit.errors import FfnkitError


@dataclass(frozen=True, eq=False)
class Edit:
    """One decision about one FFN. Tensors are small decisions (labels); weights are computed when it is applied."""

    ffn: str

    @property
    def kind(self) -> str:
        return type(self).__name__

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)}

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not isinstance(v, Tensor)}


@dataclass(frozen=True, eq=False)
class Resize(Edit):
    """New neurons for one FFN: each the mean of a cluster of the old ones.

    Attributes:
        width: the new ff.
        labels: (ff,) int32 cluster of each neuron, or (E, ff) with experts; each cluster has a member.
        balance: whether gated neurons are brought to canonical scale and sign before the mean.
    """

    width: int
    labels: Tensor
    balance: bool = False


@dataclass(frozen=True, eq=False)
class Swap(Edit):
    """A linear becomes a special one that trains otherwise and folds back.

    Attributes:
        site: "up", "gate" or "down". layer: the special linear's name, "scaled".
        scale: (ff,) or (E, ff), the fixed factor of the scaled linear's inputs.
    """

    site: str
    layer: str
    scale: Tensor


EDITS: tuple[type[Edit], ...] = (Resize, Swap)


def build(kind: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    """An edit from its saved parts. Raises FfnkitError for a kind that this version does not know."""
    for cls in EDITS:
        if cls.__name__ == kind:
            names = {field.name for field in dataclasses.fields(cls)}
            if names == set(settings) | set(tensors):
                return cls(**{**settings, **tensors})
            raise FfnkitError(f"edit '{kind}'", f"fields {sorted(set(settings) | set(tensors))}", f"Expected {names}")
    known = ", ".join(cls.__name__ for cls in EDITS)
    raise FfnkitError(f"edit '{kind}'", f"this version knows {known}", "Update ffnkit or make the plan again")
