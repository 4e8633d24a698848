"""What a linear keeps of its own beside a weight that it shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ffnkit.edits.base import Own, Shape, Stage, Writer
from ffnkit.edits.fields import Weights, held
from ffnkit.edits.linears import LinearEdit
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.nn.differing import Differing
from ffnkit.nn.reparametrized import ReparametrizedLinear


@dataclass(frozen=True, eq=False)
class KeepOwn(LinearEdit):
    """A linear keeps something of its own beside a weight that it is to share: ``(W + second first) (scale * x) + b``.

    It goes before the :class:`~ffnkit.edits.ties.Tie` that shares the weight.

    Attributes:
        scale: (in,). bias: (out,), where the linear has one. first: (r, in), second: (out, r), for a difference.
    """

    scale: Weights
    bias: Weights | None = None
    first: Weights | None = None
    second: Weights | None = None

    kind: ClassVar[str] = "KeepOwn"
    layer: ClassVar[type[ReparametrizedLinear] | None] = Differing
    stage: ClassVar[Stage] = Stage.SCALE
    precedence: ClassVar[int] = 7

    @classmethod
    def of(cls, ffn: str, site: str, **tensors: Tensor) -> KeepOwn:
        """The edit that leaves a linear these tensors."""
        return cls(ffn, site=site, **held(f"what {ffn} keeps of its own", **tensors))

    @classmethod
    def blank(cls, ffn: FFN, site: str, row: dict[str, Any]) -> KeepOwn:
        weight, bias = ffn.oriented(site), ffn.linear(site).bias
        (out, inner), rank = weight.shape, row.get("rank", 0)
        first = weight.new_empty(rank, inner).normal_(std=inner**-0.5) if rank else None
        second = weight.new_zeros(out, rank) if rank else None
        own_bias = None if bias is None else weight.new_zeros(out)
        return cls(ffn.name, site, weight.new_ones(inner), own_bias, first, second)

    def saved(self, shape: Shape) -> int:
        added = (self.scale, self.first, self.second)  # a bias was there before
        return -sum(value.numel() for value in added if value is not None)

    @property
    def kept_apart(self) -> int:
        return sum(piece.numel() for piece in self.pieces())

    @classmethod
    def becomes(cls: type[Own], edits: Sequence[Own], name: str) -> str:
        return "with a scale of its own"

    def check_fields(self) -> str:
        if (self.first is None) != (self.second is None):
            return "one of the two factors of its difference is missing"
        return ""

    def pieces(self) -> tuple[Tensor, ...]:
        return tuple(v for v in (self.scale, self.bias, self.first, self.second) if v is not None)

    def shapes(self, weight: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        out, inner = weight[-2:]
        rank = None if self.first is None else len(self.first)
        pair = () if rank is None else ((rank, inner), (out, rank))
        return ((inner,), *(() if self.bias is None else ((out,),)), *pair)

    def check(self, writer: Writer) -> None:
        super().check(writer)
        ffn = writer.ffn(self.target)
        if (ffn.linear(self.site).bias is None) != (self.bias is None):
            what = f"the linear '{self.site}' of {ffn.name} has {'no' if self.bias is not None else 'a'} bias"
            raise FfnkitError(self.asked, what, "Make the plan for this model")
