"""Edits of linears: a factor of inputs, a thin pair, or new numbers in any linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ffnkit.edits.base import Edit, Own, Quantities, Shape, Stage, Writer, notes
from ffnkit.edits.fields import Site, Weights, held
from ffnkit.edits.slicing import check_ffn_untied
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import check_editable, is_linear, is_transposed, stored_weight
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.nn.scaled import Scaled


@dataclass(frozen=True, eq=False)
class LinearEdit(Edit):
    """An edit of one linear of an FFN.

    Attributes:
        site: "up", "gate" or "down". layer: the class that takes the linear's place, made of it and of ``pieces``.
    """

    site: Site

    layer: ClassVar[type[ReparametrizedLinear] | None] = None

    @classmethod
    def blank(cls: type[Own], ffn: FFN, site: str, row: dict[str, Any]) -> Own:
        """The structure that a config describes by ``row``; a factor of ones, a bias and a difference of zeros."""
        raise NotImplementedError

    def pieces(self) -> tuple[Tensor, ...]:
        """The tensors that the layer holds beside the weight."""
        raise NotImplementedError

    def check(self, writer: Writer) -> None:
        ffn = writer.ffn(self.target)
        if self.site not in ffn.sites and not (self.site == "gate" and ffn.layout.fused):
            there = ", ".join(ffn.sites)
            raise FfnkitError(f"site '{self.site}' of {ffn.name}", f"it has {there}", "Make the plan for this model")
        check_ffn_untied(writer, ffn, self.asked)

    def shapes(self, weight: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
        """The shapes that :meth:`pieces` must have beside a weight of this one, (.., out, in); None: any will do."""
        return None

    def perform(self, writer: Writer) -> None:
        assert self.layer is not None
        ffn, pieces = writer.ffn(self.target), self.pieces()
        here = tuple(tuple(piece.shape) for piece in pieces)
        wanted = self.shapes(tuple(ffn.oriented(self.site).shape))
        if wanted not in (None, here):
            raise FfnkitError(self.asked, f"its tensors are {here} where {wanted} fit", "Make the plan for this model")
        writer.attach(ffn, self.site, self.layer, *pieces)


@dataclass(frozen=True, eq=False)
class ScaleInputs(LinearEdit):
    """A fixed factor stands in front of a linear, apart from its weight, until the model is folded.

    Attributes:
        scale: (in,), or (E, in) with experts: the fixed factor of the linear's inputs.
    """

    scale: Weights

    kind: ClassVar[str] = "ScaleInputs"
    formerly: ClassVar[tuple[str, ...]] = ("Swap",)
    layer: ClassVar[type[ReparametrizedLinear] | None] = Scaled
    stage: ClassVar[Stage] = Stage.SCALE
    precedence: ClassVar[int] = 8

    @classmethod
    def blank(cls, ffn: FFN, site: str, row: dict[str, Any]) -> ScaleInputs:
        weight = ffn.oriented(site)
        return cls(ffn.name, site, weight.new_ones(*weight.shape[:-2], weight.shape[-1]))

    @classmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> ScaleInputs:
        return super().build({k: v for k, v in settings.items() if k != "layer"}, tensors)  # "scaled", of old files

    def pieces(self) -> tuple[Tensor, ...]:
        return (self.scale,)

    def shapes(self, weight: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return ((*weight[:-2], weight[-1]),)


@dataclass(frozen=True, eq=False)
class FactorLinear(LinearEdit):
    """A linear becomes the product of two thin ones: first (r, in), second (out, r)."""

    first: Weights
    second: Weights

    kind: ClassVar[str] = "FactorLinear"
    formerly: ClassVar[tuple[str, ...]] = ("Factor",)
    layer: ClassVar[type[ReparametrizedLinear] | None] = LowRank
    stage: ClassVar[Stage] = Stage.LOW_RANK
    precedence: ClassVar[int] = 4

    @classmethod
    def of(cls, ffn: str, site: str, first: Tensor, second: Tensor) -> FactorLinear:
        """The edit that puts these two in the place of a linear."""
        return cls(ffn, site=site, **held(f"factors of {site} in {ffn}", first=first, second=second))

    @classmethod
    def blank(cls, ffn: FFN, site: str, row: dict[str, Any]) -> FactorLinear:
        weight = ffn.oriented(site)
        out, inner = weight.shape
        return cls(ffn.name, site, weight.new_empty(row["rank"], inner), weight.new_empty(out, row["rank"]))

    def saved(self, shape: Shape) -> int:
        out, rank, inner = len(self.second), len(self.first), self.first.shape[1]
        return out * inner - rank * (out + inner)

    @classmethod
    def becomes(cls: type[Own], edits: Sequence[Own], name: str) -> str:
        ranks = [len(edit.tensors()["first"]) for edit in edits]
        return f"rank {', '.join(map(str, dict.fromkeys(ranks)))}"

    def check_fields(self) -> str:
        if self.first.ndim != 2 or self.second.ndim != 2 or not len(self.first):
            return "its factors are no matrices"
        return ""

    def pieces(self) -> tuple[Tensor, ...]:
        return self.first, self.second

    def shapes(self, weight: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        *lead, out, inner = weight
        return (*lead, len(self.first), inner), (*lead, out, len(self.first))


@dataclass(frozen=True, eq=False)
class ReplaceLinear(Edit):
    """New numbers in a linear of the shape that it has once its rows and columns have gone.

    Attributes:
        target: the linear's path. weight: (out, in). bias: (out,), None where it has none.
    """

    weight: Weights
    bias: Weights | None = None

    kind: ClassVar[str] = "ReplaceLinear"
    stage: ClassVar[Stage] = Stage.SCALE
    reshapes: ClassVar[bool] = False

    @classmethod
    def of(cls, linear: str, weight: Tensor, bias: Tensor | None) -> ReplaceLinear:
        """The edit that gives a linear these numbers."""
        return cls(linear, **held(f"new numbers of {linear}", weight=weight, bias=bias))

    @classmethod
    def lines(cls: type[Own], edits: Sequence[Own], quantities: Quantities) -> list[str]:
        return [f"  {edit.target}  ->  new numbers{notes(quantities, edit.target)}" for edit in edits]

    def check_fields(self) -> str:
        fits = self.weight.ndim == 2 and (self.bias is None or tuple(self.bias.shape) == (len(self.weight),))
        return "" if fits else "its weight and bias are none of a linear"

    def check(self, writer: Writer) -> None:
        linear = writer.module(self.target)
        if not is_linear(linear):
            raise FfnkitError(self.asked, "it is no linear", "Make the plan for this model")
        check_editable(linear, self.target, self.asked)
        if (linear.bias is None) != (self.bias is None):
            what = "it has no bias, and one is given" if linear.bias is None else "it has a bias, and none is given"
            raise FfnkitError(self.asked, what, "Make the plan for this model")
        writer.check_untied(stored_weight(linear), writer.linears_of(stored_weight(linear)), self.asked)

    def perform(self, writer: Writer) -> None:
        linear = writer.module(self.target)
        weight = self.weight.T if is_transposed(linear) else self.weight
        held = stored_weight(linear)
        if tuple(held.shape) != tuple(weight.shape):
            here, given = tuple(held.shape), tuple(weight.shape)
            raise FfnkitError(
                self.asked, f"its weight is {here} where {given} is given", "Make the plan for this model"
            )
        writer.put(held, weight.clone(), [linear])  # a plan's tensors stay its own
        if self.bias is not None:
            writer.put(linear.bias, self.bias.clone(), [linear])
