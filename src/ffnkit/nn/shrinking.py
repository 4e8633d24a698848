"""What happens behind an optimizer's step: coefficients are drawn towards zero, in proportion to the learning rate.

Once a step, however many micro-batches a step has, and not at all where mixed precision leaves a step out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ffnkit.nn.optimizer_hooks import leaves_out, watch

if TYPE_CHECKING:
    from ffnkit.nn.adapter_layer import AdapterLayer


def shrinking(layer: AdapterLayer) -> None:
    """See to the layer's coefficients at every step of an optimizer that holds them."""
    watch(layer, after=_after)


def _after(optimizer: Optimizer, living: list[AdapterLayer]) -> None:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    living = [] if leaves_out(optimizer) else living
    for layer in living:
        value = layer.coefficients
        group = groups.get(id(value))
        if value is not None and group is not None and layer.l1 and value.grad is not None:
            shrink(value, float(group["lr"]) * layer.l1)


@torch.no_grad()
def shrink(values: Tensor, by: float) -> None:
    """The soft threshold, in place: every value moves towards zero by ``by``, and stays there once it is reached."""
    values.copy_(values.sign() * (values.abs() - by).clamp_min(0))
