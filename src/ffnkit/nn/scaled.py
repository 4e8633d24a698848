"""A fixed, untrained factor for each input of a linear: MLP Fusion's cluster sizes, kept apart while tuning."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented


class Scaled(ReparametrizedLinear):
    """``y = W (scale * x) + b`` with trained W and b and a fixed ``scale``.

    Attributes:
        weight: (out, in), or (in, out) where it replaces a Conv1D.
        scale: buffer (in,), saved with the weights.

    Source: MLP Fusion (arXiv 2307.08941): P stands between the activation and W2.
    """

    kind: ClassVar[str] = "scaled"

    def __init__(self, linear: nn.Linear | Conv1D, scale: Tensor) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.weight  # type: ignore[assignment]
        self._stand_in(linear)
        self.register_buffer("scale", scale.to(device=self.weight.device, dtype=self.weight.dtype, copy=True))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x * self.scale.to(x.dtype), oriented(self.weight, self.transposed), self.bias)

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def folded(self) -> nn.Parameter:
        with torch.no_grad():
            scale = self.scale[:, None] if self.transposed else self.scale
            return nn.Parameter(self.weight * scale, self.weight.requires_grad)
