"""Whole layers that go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from ffnkit.edits.base import Edit, Own, Shape, Stage, Writer
from ffnkit.edits.fields import Count, Name
from ffnkit.errors import FfnkitError


@dataclass(frozen=True, eq=False)
class DropLayer(Edit):
    """A whole layer goes, with its attention and norms; the layers behind it move up.

    Attributes:
        target: its FFN. layer: its path. parameters: those that go with it, other than of this FFN.
    """

    layer: Name
    parameters: Count

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

    def check(self, writer: Writer) -> None:
        layer = writer.module(self.layer)
        if layer is None or not f"{self.target}.".startswith(f"{self.layer}."):
            what = f"{type(writer.model).__name__} has no layer {self.layer} around it"
            raise FfnkitError(f"dropping the layer of {self.target}", what, "Make the plan for this model")

    def perform(self, writer: Writer) -> None:
        writer.drop_layer(self.layer)
