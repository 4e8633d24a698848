"""Gradients of single weights on data, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, backward, check_finite
from ffnkit.model.linear import is_transposed

Receive = Callable[[str, Tensor], None]


def weight_gradients(
    model: nn.Module, batches: Iterable[Batch], linears: dict[str, nn.Module], receive: Receive
) -> int:
    """Hand the gradient of each linear's weight on each batch to ``receive``, as soon as it is whole, and forget it.

    The model is in eval mode (no dropout, so equal data give equal gradients) and unchanged afterwards. Memory beyond
    a training step without weight gradients: one weight's gradient. In several processes each sees its own batches and
    receives the mean over all of them.

    Args:
        batches: with labels, so that the model gives its loss. linears: by name.
        receive: called with the name and the gradient (out, in) in the weight's dtype.

    Returns:
        The number of batches.

    Raises:
        FfnkitError: no batches, no loss, or a gradient that is not finite.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    by_weight: dict[nn.Parameter, list[str]] = {}
    for name, linear in linears.items():
        by_weight.setdefault(linear.weight, []).append(name)  # type: ignore[arg-type]
    kept = {parameter: parameter.grad for parameter in by_weight}
    handles: list[Any] = []

    def note(parameter: Tensor) -> None:
        names = by_weight[parameter]  # type: ignore[index]
        grad = parameter.grad
        parameter.grad = None
        assert grad is not None
        check_finite(f"the gradient of {names[0]}", grad)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(grad)
            grad /= torch.distributed.get_world_size()
        for name in names:
            receive(name, grad.mT if is_transposed(linears[name]) else grad)

    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in by_weight)
        for parameter in by_weight:
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(note))
        return backward(model, batches, asked=f"gradients of {type(model).__name__}")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter, grad in kept.items():
            parameter.grad = grad
