"""Several FFNs become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from ffnkit.edits.base import Edit, Own, Shape, Stage, Writer
from ffnkit.edits.fields import Name, Places
from ffnkit.edits.slicing import check_ffn_untied
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons


@dataclass(frozen=True, eq=False)
class Tie(Edit):
    """Several FFNs become one, held once: the mean of their matched neurons, or this FFN as it is.

    Attributes:
        members: the other FFNs, by name.
        average: whether the mean of all is taken; else this FFN takes the others' place.
        orders: (members, ff) int32: neuron j of this FFN goes with neuron orders[i, j] of member i.
    """

    members: Annotated[list[Name], Field(min_length=1)]
    average: bool
    orders: Places

    kind: ClassVar[str] = "Tie"
    stage: ClassVar[Stage] = Stage.TIE
    precedence: ClassVar[int] = 1
    joins: ClassVar[bool] = True

    @classmethod
    def blank(cls, name: str, members: list[str]) -> Tie:
        """The structure alone: these use what stands at ``name``."""
        return cls(name, members=members, average=False, orders=torch.zeros(len(members), 0, device="cpu"))

    @property
    def asked(self) -> str:
        return f"sharing {self.target}"

    @property
    def touched(self) -> tuple[str, ...]:
        return (self.target, *self.members)

    def saved(self, shape: Shape) -> int:
        return shape.parameters if shape.name in self.members else 0

    @classmethod
    def becomes(cls: type[Own], edits: Sequence[Own], name: str) -> str:
        ties = cast(Sequence[Tie], edits)
        source = next((tie.target for tie in reversed(ties) if name in tie.members), None)
        if source is not None:
            return f"shares {source}"
        return f"{'the mean of' if ties[0].average else 'shared by'} {1 + len(ties[0].members)} FFNs"

    def check_fields(self) -> str:
        if len({self.target, *self.members}) != 1 + len(self.members):
            return "it names an FFN twice"
        if self.orders.ndim != 2 or len(self.orders) != len(self.members):
            return "it has no order for each of its members"
        whole = torch.arange(self.orders.shape[1]).expand(*self.orders.shape)
        if not torch.equal(self.orders.sort(-1).values.long(), whole):
            return "its orders leave neurons out"
        return ""

    def check(self, writer: Writer) -> None:
        for name in self.touched:
            check_ffn_untied(writer, writer.ffn(name), self.asked)

    def perform(self, writer: Writer) -> None:
        anchor, *members = (writer.ffn(name) for name in self.touched)
        for member in members:
            if any(getattr(member, name) != getattr(anchor, name) for name in ("width", "d", "gated", "experts")):
                what = f"{member.name} is of other shapes than {anchor.name}"
                raise FfnkitError(self.asked, what, "Make the plan for this model")
        if self.average:
            biased = [set(each.raw().tensors()) for each in (anchor, *members)]
            if any(each != biased[0] for each in biased):
                raise FfnkitError(self.asked, "one of them has no biases", "Make the plan for this model")
            if self.orders.shape[1] != anchor.width:
                what = f"its orders are of {self.orders.shape[1]} neurons, and there are {anchor.width}"
                raise FfnkitError(self.asked, what, "Make the plan for this model")
            old = anchor.raw()
            writer.resize(anchor, old if writer.empty else merged([anchor, *members], self.orders))
        for member in members:
            for name in member.owners:
                writer.share(anchor, anchor.name, name)


def merged(ffns: list[FFN], orders: Tensor) -> Neurons:
    """The mean of FFNs whose neurons are put in the order of the first one's, in its dtype; one FFN at a time.

    Args:
        orders: (len(ffns) - 1, ff): neuron j of the first goes with neuron orders[i, j] of the (i + 1)-th.

    Source: Verma et al. (arXiv 2501.06126), W_in* = mean of P_i W_in,i, W_out* = mean of W_out,i P_i^T.
    """
    first = ffns[0].raw()
    exact = torch.promote_types(first.up.dtype, torch.float32)
    sums = first.map(lambda value: value.detach().to(exact, copy=True))
    for ffn, order in zip(ffns[1:], orders, strict=True):
        fits = ffn.raw().take(order.to(first.up.device).long())
        for name, value in sums.tensors().items():
            value += getattr(fits, name).to(value)
    return sums.map(lambda value: value / len(ffns)).to(first.up.dtype)
