"""A frozen linear whose inputs have learnt coefficients, and nothing else that trains."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffnkit.nn.adapter_layer import AdapterLayer, adapter_layers
from ffnkit.nn.reparametrized import oriented


class Coefficients(AdapterLayer):
    """``y = W (c (.) x) + b`` with W frozen; each of c belongs to inputs that follow each other.

    On the linear behind an attention the inputs of one head (or group) have one coefficient, on the linear behind
    hidden neurons each input has its own. Layers with an update D of another kind carry coefficients beside it
    (``AdapterLayer.use_coefficients``); this one is for linears that have no other update.

    Source: DSEE v1 (arXiv 2111.00160v1), section 3.3: coefficients on heads and intermediate neurons, learnt with l1.
    """

    kind: ClassVar[str] = "coefficients"

    def update(self) -> Tensor:
        """Zeros: what is learnt multiplies the inputs, and is in ``weight``."""
        return torch.zeros(self.features, dtype=torch.promote_types(self.base.dtype, torch.float32)).to(
            self.base.device
        )

    def taken(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"trained": 0}, {}

    def cut(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        self.cut_frozen(rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.weighed(x), oriented(self.base, self.transposed), self.bias)

    def extra_repr(self) -> str:
        count = 0 if self.coefficients is None else len(self.coefficients)
        return f"coefficients={count:,}, l1={self.l1:g}, {super().extra_repr()}"


def carries_update(linear: nn.Module) -> bool:
    """Whether an update D stands beside a linear's weight; coefficients alone are none."""
    return isinstance(linear, AdapterLayer) and not isinstance(linear, Coefficients)


def set_l1(model: nn.Module, weight: float) -> int:
    """Draw all coefficients of a model towards zero by this weight from now on; 0: no more. How many layers have some.

    Args:
        weight: in each step of an optimizer coefficients move by the learning rate times this.
    """
    layers = [layer for layer in adapter_layers(model).values() if layer.coefficients is not None]
    for layer in layers:
        layer.l1 = float(weight)
    return len(layers)
