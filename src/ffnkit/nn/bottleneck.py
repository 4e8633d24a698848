"""Bottleneck adapters: a narrow network with a residual connection behind the output of a linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class Bottleneck(nn.Module):
    """``h + up(f(down(h)))`` with ``h = linear(x)``, (.., out): what stands in the place of a linear and holds it.

    No weight of the linear can hold what it does, so it stays where it is, and is saved apart.

    Source: Houlsby et al. (arXiv 1902.00751), section 2.1: two layers with a nonlinearity and a skip connection.
    Differs: ``up`` starts at zero, where they draw it close to zero: training starts from the very model.

    Attributes:
        base_layer: the linear. down: (size, out). up: (out, size). Both in float32 at least.
        activation: the name of f, as transformers knows it.
    """

    def __init__(self, linear: nn.Module, out: int, size: int, activation: str) -> None:
        super().__init__()
        weight = next(p for p in linear.parameters() if p.is_floating_point())
        kind: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.base_layer = linear
        self.down, self.up = nn.Linear(out, size, **kind), nn.Linear(size, out, **kind)
        self.activation = activation
        nn.init.normal_(self.down.weight, std=0.02)
        for value in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(value)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The linear's: families look at its dtype."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The linear's."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base_layer(x)
        inner = ACT2FN[self.activation](self.down(h.to(self.down.weight.dtype)))
        return h + self.up(inner.to(self.up.weight.dtype)).to(h.dtype)

    def extra_repr(self) -> str:
        return f"size={self.down.out_features}, activation={self.activation}"


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """The adapters of this kind by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def places(model: nn.Module, modules: dict[int, Any]) -> dict[str, Any]:
    """Every path at which a module of these stands, with what is to stand there.

    Args:
        modules: by identity of what stands there now.
    """
    every = model.named_modules(remove_duplicate=False)
    return {name: modules[id(module)] for name, module in every if id(module) in modules}
