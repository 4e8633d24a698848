"""Whole layers that go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from ffnkit.edits.base import Edit, Own, Shape, Stage, Writer


@dataclass(frozen=True, eq=False)
class DropLayer(Edit):
    """A whole layer goes, with its attention and norms; the layers behind it move up.

    Attributes:
        target: its FFN. layer: its path. parameters: those that go with it, other than of this FFN.
    """

    layer: str
    parameters: int

    kind: ClassVar[str] = "DropLayer"
    formerly: ClassVar[tuple[str, ...]] = ("Drop",)
    stage: ClassVar[Stage] = Stage.LAYERS
    precedence: ClassVar[int] = 2
    renumbers: ClassVar[bool] = True
    joins: ClassVar[bool] = True

    def saved(self, shape: Shape) -> int:
        return shape.parameters + self.parameters

    @classmethod
    def becomes(cls: type[Own], edits: Sequence[Own], name: str) -> str:
        return f"gone with {cast(DropLayer, edits[-1]).layer}"

    def perform(self, writer: Writer) -> None:
        writer.drop_layer(self.layer)
