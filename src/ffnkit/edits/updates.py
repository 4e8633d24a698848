"""Small updates that train beside frozen weights, and what else trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffnkit.edits.base import Edit, Own, Quantities, Stage, Writer, notes
from ffnkit.edits.fields import Name, Sizes, Weights
from ffnkit.edits.parts import check_parts, unfit
from ffnkit.errors import FfnkitError
from ffnkit.model.linear import features, stored_weight
from ffnkit.model.trainable import PARTS
from ffnkit.nn.adapter_layer import AdapterLayer, fingerprint
from ffnkit.nn.coefficients import Coefficients
from ffnkit.nn.dsee import sparse_low_rank
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.nn.sparsegrad import SparseGradLinear

# What takes a linear's place, by the name that edits give.
LAYERS: dict[str, Callable[..., AdapterLayer]] = {
    "sparsegrad": SparseGradLinear,
    "dsee": sparse_low_rank,
    "coefficients": Coefficients,
}


Part = Annotated[str, Field(pattern=f"^({'|'.join(PARTS)})$")]


@dataclass(frozen=True, eq=False)
class UpdateLinear(Edit):
    """A small update of a linear trains beside its frozen weight; the linear may be any of the model.

    Attributes:
        target: path of the linear. layer: the name of the layer that takes its place.
        given: its settings. parts: its tensors by name, of whatever names the layer has.
        shape: (out, in) of the linear, or None where it is not told.
        fingerprint: of the weight (``nn.adapter_layer.fingerprint``), or None.
    """

    layer: Name
    given: dict[str, Any]
    parts: dict[str, Tensor]
    fingerprint: list[int] | None = None
    shape: Sizes | None = None

    kind: ClassVar[str] = "UpdateLinear"
    formerly: ClassVar[tuple[str, ...]] = ("Adapt",)
    version: ClassVar[int] = 2
    stage: ClassVar[Stage] = Stage.UPDATE
    reshapes: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    @property
    def asked(self) -> str:
        return f"{self.layer} on {self.target}"

    @property
    def trained(self) -> int:
        """How many parameters it trains."""
        return int(self.given["trained"])

    @property
    def _a_step(self) -> str:
        return f", {self.given['count']:,} in a step" if self.given.get("selection") == "step" else ""

    def with_coefficients(self, l1: float, values: Tensor) -> UpdateLinear:
        """The same update with coefficients of its inputs, drawn towards zero by ``l1``."""
        given = self.given | {"l1": l1, "trained": self.trained + len(values)}
        return dataclasses.replace(self, given=given, parts=self.parts | {"coefficients": values})

    @classmethod
    def lines(cls: type[Own], edits: Sequence[Own], quantities: Quantities) -> list[str]:
        found = cast(Sequence[UpdateLinear], edits)
        width = max((len(edit.target) for edit in found), default=0)
        return [
            f"  {edit.target:<{width}}  ->  {edit.layer}, {edit.trained:,} numbers train{edit._a_step}"
            f"{notes(quantities, edit.target)}"
            for edit in found
        ]

    @classmethod
    def settings_of_today(cls, settings: dict[str, Any], version: int) -> dict[str, Any]:
        given = settings.get("given")
        if version < 2 and isinstance(given, dict) and given.get("selection") == "step":
            return settings | {"given": given | {"selection": "masked-gradient"}}  # what "step" was then
        return settings

    # --- what it does

    def check(self, writer: Writer) -> None:
        asked = self.asked
        linear = writer.module(self.target)
        if linear is None:
            what = f"{type(writer.model).__name__} has no such module"
            raise FfnkitError(asked, what, "Make the plan for this model")
        if isinstance(linear, ReparametrizedLinear):
            raise FfnkitError(asked, f"it is edited already ({linear.kind})", "Fold the model first (ffnkit.fold)")
        if not isinstance(linear, nn.Linear | Conv1D):
            raise FfnkitError(asked, f"it is a {type(linear).__name__}", "Name linears")
        if self.layer not in LAYERS:
            raise FfnkitError(asked, f"there are {', '.join(LAYERS)}", "Update ffnkit or make the plan again")
        weight = stored_weight(linear)
        if self.fingerprint is not None and fingerprint(weight).tolist() != self.fingerprint:
            do = "Load the very base model that the update was made for"
            raise FfnkitError(asked, "the weight is another one than the update was made for", do)
        alike = [other for other in writer.linears_of(weight) if getattr(other, "bias", None) is linear.bias]
        writer.check_untied(weight, alike, asked)

    def perform(self, writer: Writer) -> None:
        writer.before_updates()
        linear: Any = writer.module(self.target)
        if isinstance(linear, ReparametrizedLinear):  # by another edit of the plan, over the same weight
            raise FfnkitError(
                self.asked, "the plan edits this linear twice", "Apply one plan, then fold and plan again"
            )
        if self.shape is not None and list(features(linear)) != list(self.shape):
            here, there = (" x ".join(map(str, sides)) for sides in (features(linear), self.shape))
            what = f"it is {here} where the plan was made for {there}"
            raise FfnkitError(self.asked, what, "Make the plan for this model")
        if odd := unfit(self.layer, self.given, self.parts, features(linear)):
            raise FfnkitError(self.asked, odd, "Make the plan again")
        everywhere = writer.linears_of(stored_weight(linear))
        given: dict[str, Any] = {key: value for key, value in self.given.items() if key != "trained"}
        parts = dict(self.parts)
        factors, l1 = parts.pop("coefficients", None), given.pop("l1", 0.0)
        if "left" in parts:
            given["bases"] = writer.bases(parts.pop("left"), parts.pop("right"), linear.weight)
        parts = {name: value.clone() for name, value in parts.items()}  # a plan's tensors stay its own
        layer = LAYERS[self.layer](linear, **given, **parts)
        if factors is not None:
            layer.use_coefficients(factors, l1)
        for each in everywhere:
            writer.replace(each, layer)

    # --- as data

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.parts)

    def settings(self) -> dict[str, Any]:
        own = {"target": self.target, "layer": self.layer, "given": self.given}
        told = {"fingerprint": self.fingerprint, "shape": self.shape}
        return own | {name: value for name, value in told.items() if value is not None}

    @classmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> UpdateLinear:
        return super().build({**settings, "parts": tensors}, {})

    def check_fields(self) -> str:
        return check_parts(self.layer, self.given, self.parts, self.asked)


@dataclass(frozen=True, eq=False)
class Train(Edit):
    """Beside updated linears only these modules of the model train, until it is folded.

    Attributes:
        target: empty: it is about the whole model. parts: names of ``settings.updates.PARTS``.
        values: what those parameters become, by name; of an adapter that was trained.
    """

    parts: list[Part]
    values: dict[str, Weights] = dataclasses.field(default_factory=dict)

    kind: ClassVar[str] = "Train"
    stage: ClassVar[Stage] = Stage.TRAIN
    trains: ClassVar[bool] = True

    @property
    def touched(self) -> tuple[str, ...]:
        return ()

    @classmethod
    def lines(cls: type[Own], edits: Sequence[Own], quantities: Quantities) -> list[str]:
        parts = [part for edit in cast(Sequence[Train], edits) for part in edit.parts]
        return [f"  beside them train: {', '.join(parts) or 'nothing'}"] if edits else []

    def perform(self, writer: Writer) -> None:
        writer.let_train(self.parts, self.values)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.values)

    def settings(self) -> dict[str, Any]:
        return {"target": self.target, "parts": list(self.parts)}

    @classmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Train:
        return super().build({**settings, "values": tensors}, {})
