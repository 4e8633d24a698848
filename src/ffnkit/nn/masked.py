"""A linear some of whose weights are zero and stay zero."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.special import Special, oriented


class Masked(Special):
    """``y = (mask * W) x + b`` with W zero outside of the mask: gradients there are zero, so zeros stay.

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
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.masked_fill_(~self.mask, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, oriented(self.weight * self.mask, self.transposed), self.bias)

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def fold(self) -> nn.Linear | Conv1D:
        """The plain layer with the zeros in its weight; further tuning would fill them."""
        with torch.no_grad():
            self.weight.masked_fill_(~self.mask, 0.0)
        return self._plain(self.weight)
