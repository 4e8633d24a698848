"""What happens behind an optimizer's step: coefficients are drawn towards zero, in proportion to the learning rate.

The hook is torch's own for every optimizer, so that a plain loop needs no further call. It runs once a step, however
many micro-batches a step has, and not at all where mixed precision leaves a step out.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

if TYPE_CHECKING:
    from ffnkit.nn.adapted import Adapted

_layers: weakref.WeakSet[Adapted] = weakref.WeakSet()
_hooked: list[Any] = []


def shrinking(layer: Adapted) -> None:
    """See to the layer's coefficients at every step of an optimizer that holds them."""
    _layers.add(layer)
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_after))


def _after(optimizer: Optimizer, *_: Any) -> None:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_layers):
        value = layer.coefficients
        group = groups.get(id(value))
        if value is not None and group is not None and layer.l1 and value.grad is not None:
            shrink(value, float(group["lr"]) * layer.l1)


@torch.no_grad()
def shrink(values: Tensor, by: float) -> None:
    """The soft threshold, in place: every value moves towards zero by ``by``, and stays there once it is reached."""
    values.copy_(values.sign() * (values.abs() - by).clamp_min(0))
