"""A linear some of whose weights are zero and stay zero."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented


class Masked(ReparametrizedLinear):
    """``y = (mask * W) x + b``; gradients outside of the mask are zero, so where W is zero there, it stays so.

    It saves no time and no memory: dense hardware multiplies zeros too.

    Attributes:
        weight: (out, in), or (in, out) where it replaces a Conv1D. mask: buffer of the same shape, bool.
    """

    kind: ClassVar[str] = "masked"

    def __init__(self, linear: nn.Linear | Conv1D, mask: Tensor) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.weight  # type: ignore[assignment]
        self._stand_in(linear)
        stored = oriented(mask, self.transposed)
        self.register_buffer("mask", stored.to(device=self.weight.device, dtype=torch.bool, copy=True).contiguous())
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, oriented(self.weight * self.mask, self.transposed), self.bias)

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def folded(self) -> nn.Parameter:
        """The weight with its zeros; further tuning would fill them."""
        with torch.no_grad():
            if self.weight.is_meta or not bool((self.weight * ~self.mask).any()):
                return self.weight
            return nn.Parameter(self.weight.masked_fill(~self.mask, 0.0), self.weight.requires_grad)
