"""A linear over a weight that several places share, with something of its own: a factor, a bias, a thin difference."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented


class Differing(ReparametrizedLinear):
    """``y = (W + second first) (scale * x) + b`` with W shared with other places and all else of this place alone.

    Attributes:
        weight: (out, in), or (in, out) where it replaces a Conv1D.
        scale: (in,). bias: (out,) or None. first: (r, in), second: (out, r), or None where rank is 0. All train.

    Source: ours; a difference of low rank beside shared layers: Relaxed Recursive Transformers (arXiv 2410.20672).
    """

    kind: ClassVar[str] = "differing"
    own: ClassVar[bool] = True

    def __init__(self, linear: nn.Linear | Conv1D, scale: Tensor, *rest: Tensor) -> None:
        """Args: rest: the bias where the linear has one, then first and second where there is a difference."""
        super().__init__()
        self.weight: nn.Parameter = linear.weight  # type: ignore[assignment]
        self._stand_in(linear)
        trains = self.weight.requires_grad
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        scale, *rest_ = (value.detach().to(**like, copy=True) for value in (scale, *rest))
        self.scale = nn.Parameter(scale, trains)
        if self.bias is not None:
            self.bias = nn.Parameter(rest_.pop(0), self.bias.requires_grad)
        self.first: nn.Parameter | None = nn.Parameter(rest_[0], trains) if rest_ else None
        self.second: nn.Parameter | None = nn.Parameter(rest_[1], trains) if rest_ else None

    @property
    def rank(self) -> int:
        return 0 if self.first is None else len(self.first)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale.to(x.dtype)
        y = functional.linear(x, oriented(self.weight, self.transposed), self.bias)
        if self.first is None or self.second is None:
            return y
        return y + functional.linear(functional.linear(x, self.first), self.second)

    @property
    def flops(self) -> float:
        rows, columns = self.features
        return 2.0 * (rows * columns + self.rank * (rows + columns))

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @torch.no_grad()
    def folded(self) -> nn.Parameter:
        weight = self.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        whole = oriented(weight, self.transposed).to(exact)
        if self.first is not None and self.second is not None:
            whole = whole + self.second.to(exact) @ self.first.to(exact)
        product = oriented(whole * self.scale.to(exact), self.transposed)
        return nn.Parameter(product.to(weight.dtype).contiguous(), self.weight.requires_grad)

    def row(self) -> dict[str, Any]:
        return {"kind": self.kind} | ({"rank": self.rank} if self.rank else {})

    def extra_repr(self) -> str:
        return f"rank={self.rank}, {super().extra_repr()}"
