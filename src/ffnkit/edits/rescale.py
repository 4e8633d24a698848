"""What a linear or a norm gives, multiplied and shifted within its own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ffnkit.edits.base import Edit, Quantities, Stage, Writer, notes
from ffnkit.edits.fields import Count, Weights, held
from ffnkit.errors import FfnkitError
from ffnkit.model.linear import check_editable, is_linear, is_transposed, stored_weight
from ffnkit.nn.differing import Differing
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.nn.scaled import Scaled

_KNOWN = (Differing.kind, Masked.kind, Scaled.kind)  # whose stored weight is a factor of all that they give


@dataclass(frozen=True, eq=False)
class Rescale(Edit):
    """The outputs y of a linear, a norm or an FFN's experts become ``factor * y + shift``, in their own weights.

    Several may stand in one plan for one place: each goes on from what those before it left.

    Attributes:
        target: the path of a linear, of a norm, or of an FFN whose experts lie in one 3-D parameter.
        factor: (1,), or (out,) for each dimension. shift: (out,), where there is a bias to hold it.
        offset: what a norm adds to its weight before it multiplies (Gemma: 1).
    """

    factor: Weights
    shift: Weights | None = None
    offset: Count = 0

    kind: ClassVar[str] = "Rescale"
    stage: ClassVar[Stage] = Stage.SCALE
    reshapes: ClassVar[bool] = False

    @classmethod
    def of(cls, target: str, factor: Tensor, shift: Tensor | None = None, offset: int = 0) -> Rescale:
        """The edit that multiplies and shifts what stands there."""
        shift = None if shift is None else shift.float()
        return cls(target, offset=offset, **held(f"scaling {target}", factor=factor.float(), shift=shift))

    @property
    def repeats(self) -> bool:
        return True

    @property
    def asked(self) -> str:
        return f"rescaling {self.target}"

    @classmethod
    def lines(cls, edits: Sequence[Any], quantities: Quantities) -> list[str]:
        return [f"  {edit.target}  ->  {edit.told}{notes(quantities, edit.target)}" for edit in edits]

    @property
    def told(self) -> str:
        """In words."""
        factor = f"times {float(self.factor):.4g}" if len(self.factor) == 1 else "a factor for each dimension"
        return f"{factor}{' and a shift' if self.shift is not None else ''}, in its weights"

    def check_fields(self) -> str:
        fits = self.factor.ndim == 1 and len(self.factor) > 0 and (self.shift is None or self.shift.ndim == 1)
        return "" if fits else "its factor and shift are no rows of numbers"

    def check(self, writer: Writer) -> None:
        place = writer.module(self.target)
        if is_linear(place):
            check_editable(place, self.target, self.asked)
            if isinstance(place, ReparametrizedLinear) and place.kind not in _KNOWN:
                raise FfnkitError(self.asked, f"it is edited already ({place.kind})", "Fold the model first")
            held, places = self._held(writer, place)
            writer.check_untied(held, places, self.asked)
            self._check_shift(place)
        elif _is_norm(place):
            writer.check_untied(place.weight, [place], self.asked)
            self._check_shift(place)
        elif self.shift is not None or len(self.factor) > 1 or not writer.ffn(self.target).layout.experts:
            raise FfnkitError(self.asked, "it is no linear and no norm", "Make the plan for this model")

    def _check_shift(self, place: Any) -> None:
        if self.shift is not None and getattr(place, "bias", None) is None:
            raise FfnkitError(self.asked, "it has no bias to hold a shift", "Make the plan for this model")

    def perform(self, writer: Writer) -> None:
        place = writer.module(self.target)
        if is_linear(place):
            self._linear(writer, place)
        elif _is_norm(place):
            weight = _exact(place.weight)
            writer.put(place.weight, (weight + self.offset) * self.factor.to(weight) - self.offset, [place])
            self._bias(writer, place, [place])
        else:
            ffn = writer.ffn(self.target)
            held: Any = ffn.module._parameters[ffn.path("down")]
            writer.put(held, _exact(held) * self.factor.to(held.device), [ffn.module])

    def _held(self, writer: Writer, place: Any) -> tuple[Any, list[Any]]:
        """What takes the factor, and where it stands: a lone one goes into a scale that the place has of its own, for
        the weight may be others' too."""
        if isinstance(place, Differing) and len(self.factor) == 1:
            return place.scale, [place]
        weight = stored_weight(place)
        return weight, writer.linears_of(weight)

    def _linear(self, writer: Writer, place: Any) -> None:
        held, places = self._held(writer, place)
        value = _exact(held)
        factor = self.factor.to(value)
        writer.put(held, value * (factor if held.ndim == 1 or is_transposed(place) else factor[:, None]), places)
        self._bias(writer, place, places)

    def _bias(self, writer: Writer, place: Any, places: list[Any]) -> None:
        bias = getattr(place, "bias", None)
        if bias is not None:
            value = _exact(bias)
            value = value * self.factor.to(value)
            writer.put(bias, value if self.shift is None else value + self.shift.to(value), places)


def _exact(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _is_norm(place: Any) -> bool:
    """Whether a module multiplies each dimension by a weight."""
    weight = getattr(place, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not place._modules
