"""A linear as the product of two thin ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.quantized import float_weight
from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented


class LowRank(ReparametrizedLinear):
    """``y = second (first x) + b``: r (in + out) weights in place of in x out.

    The two are linears of their own, so that whatever trains beside linears (updates, adapters) does so beside them,
    and the product stays one of rank r.

    Attributes:
        first: linear (r, in). second: linear (out, r). rank: r. bias: (out,) or None.

    Source: the SVD baseline of MLP Fusion (arXiv 2307.08941), each matrix apart.
    """

    kind: ClassVar[str] = "lowrank"

    def __init__(self, linear: nn.Linear | Conv1D, first: Tensor, second: Tensor) -> None:
        super().__init__()
        old = linear.weight
        rows, columns = old.shape
        self._stand_in(linear)
        self._features = (columns, rows) if self.transposed else (rows, columns)
        self.rank = len(first)
        self.first = _linear(first.to(old.device, old.dtype), old.requires_grad)
        self.second = _linear(second.to(old.device, old.dtype), old.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y if self.bias is None else y + self.bias

    @property
    def stored(self) -> nn.Parameter:
        first: Any = self.first
        return first.stored if isinstance(first, ReparametrizedLinear) else first.weight

    @property
    def thin(self) -> tuple[str, str]:
        """The names of the two linears below it."""
        return "first", "second"

    @property
    def features(self) -> tuple[int, int]:
        return self._features

    @property
    def weight(self) -> Tensor:
        """The product, computed anew, as the replaced layer stored it: some models read its dtype."""
        return oriented(float_weight(self.second) @ float_weight(self.first), self.transposed)

    def folded(self) -> nn.Parameter:
        first, second = float_weight(self.first), float_weight(self.second)
        exact = torch.promote_types(first.dtype, torch.float32)
        with torch.no_grad():
            product = oriented(second.to(exact) @ first.to(exact), self.transposed)
            return nn.Parameter(product.to(first.dtype).contiguous(), self.stored.requires_grad)

    def row(self) -> dict[str, Any]:
        return {"kind": self.kind, "rank": self.rank}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, {super().extra_repr()}"


def _linear(weight: Tensor, trains: bool) -> nn.Module:
    out, inner = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(inner, out, bias=False)
    linear.weight = nn.Parameter(weight.contiguous(), trains)
    return linear
