"""What scores are read from that only a tuning leaves on a model: updates, and coefficients of heads and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ffnkit.model.attention import Attention
from ffnkit.model.ffn import FFN

LEARNT = ("update", "coefficients")


@dataclass(frozen=True)
class Learnt:
    """One thing that has to be there when a method plans.

    Attributes:
        setting: the setting that asks for it, ``"by"`` say. kind: ``"update"`` or ``"coefficients"``.
        where: the place in words. linears: one of them at least has to carry it.
    """

    setting: str
    kind: Literal["update", "coefficients"]
    where: str
    linears: tuple[nn.Module, ...]


def of_heads(setting: str, by: str, found: Sequence[Attention]) -> list[Learnt]:
    """What scores of the heads of these attentions are read from; nothing where no tuning is needed."""
    if by == "update":
        return [
            Learnt(setting, "update", f"query and value of {a.name}", (a.linear("q"), a.linear("v"))) for a in found
        ]
    if by == "coefficients":
        return [Learnt(setting, "coefficients", f"the heads of {a.name}", (a.linear("o"),)) for a in found]
    return []


def of_neurons(setting: str, by: str, found: Sequence[FFN]) -> list[Learnt]:
    """The same of the neurons of these FFNs; experts in one 3-D parameter carry neither."""
    if by not in LEARNT:
        return []
    kind: Literal["update", "coefficients"] = "update" if by == "update" else "coefficients"
    needs = []
    for ffn in found:
        sites = () if ffn.layout.experts else ffn.sites if kind == "update" else ("down",)
        needs.append(Learnt(setting, kind, ffn.name, tuple(ffn.linear(site) for site in sites)))
    return needs
