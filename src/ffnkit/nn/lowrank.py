"""A linear as the product of two thin ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented


class LowRank(ReparametrizedLinear):
    """``y = second (first x) + b``: r (in + out) weights in place of in x out.

    Attributes:
        first: (r, in). second: (out, r). bias: (out,) or None.

    Source: the SVD baseline of MLP Fusion (arXiv 2307.08941), each matrix apart.
    """

    kind: ClassVar[str] = "lowrank"

    def __init__(self, linear: nn.Linear | Conv1D, first: Tensor, second: Tensor) -> None:
        super().__init__()
        old = linear.weight
        rows, columns = old.shape
        self._stand_in(linear)
        self._features = (columns, rows) if self.transposed else (rows, columns)
        self.first = nn.Parameter(first.to(old.device, old.dtype).contiguous(), old.requires_grad)
        self.second = nn.Parameter(second.to(old.device, old.dtype).contiguous(), old.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.first), self.second, self.bias)

    @property
    def stored(self) -> nn.Parameter:
        return self.first

    @property
    def rank(self) -> int:
        return self.first.shape[0]

    @property
    def features(self) -> tuple[int, int]:
        return self._features

    @property
    def weight(self) -> Tensor:
        """The product, computed anew, as the replaced layer stored it: some models read its dtype."""
        return oriented(self.second @ self.first, self.transposed)

    def folded(self) -> nn.Parameter:
        exact = torch.promote_types(self.first.dtype, torch.float32)
        with torch.no_grad():
            product = oriented(self.second.to(exact) @ self.first.to(exact), self.transposed)
            return nn.Parameter(product.to(self.first.dtype).contiguous(), self.first.requires_grad)

    def row(self) -> dict[str, Any]:
        return {"kind": self.kind, "rank": self.rank}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, {super().extra_repr()}"
