"""The rows of families that a module can fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from torch import nn


class _Rooted(Protocol):
    @property
    def roots(self) -> frozenset[str]: ...


Row = TypeVar("Row", bound=_Rooted)


class Rows(Generic[Row]):
    """Rows in the order in which they are tried, looked up by a module's children: a model has many modules of few
    forms, and of all rows nearly none fits one of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._of: dict[tuple[str, ...], list[Row]] = {}

    def of(self, module: nn.Module) -> list[Row]:
        """Those whose paths begin at children that the module has."""
        children = tuple(module._modules)
        if children not in self._of:
            self._of[children] = [row for row in self._rows if row.roots <= set(children)]
        return self._of[children]
