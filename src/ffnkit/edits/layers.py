"""Whole layers that go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

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
    bears_masks: ClassVar[bool] = True

    @property
    def asked(self) -> str:
        return f"dropping {self.layer}"

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

    def silenced(self, writer: Writer) -> list[Any]:
        """The layer runs, and gives on what it got."""
        return [writer.module(self.layer).register_forward_hook(_passed_by, with_kwargs=True)]


def _passed_by(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    first = output if isinstance(output, Tensor) else output[0]
    given = (value for value in (kwargs.get("hidden_states"), *args, *kwargs.values()) if isinstance(value, Tensor))
    entered = next((value for value in given if value.shape == first.shape and value.dtype == first.dtype), None)
    if entered is None:
        raise ValueError("what enters a layer is of another shape than what leaves it")
    return entered if isinstance(output, Tensor) else type(output)((entered, *output[1:]))
