"""Gradients of single weights on data, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    a training step without weight gradients: one weight's gradient. In several processes each sees its own batches, as
    many as the others, and receives the mean over all of them; there all gradients of a batch are held, since a weight
    that one process reaches (an expert) may be left out by another. A weight that no batch reaches is not received.

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

    several = torch.distributed.is_available() and torch.distributed.is_initialized()

    def note(parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        names = by_weight[parameter]  # type: ignore[index]
        check_finite(f"the gradient of {names[0]}", grad)
        for name in names:
            receive(name, grad.mT if is_transposed(linears[name]) else grad)

    def reduced() -> Iterator[Batch]:
        """The batches; behind each, the gradients in one order for all processes."""
        for batch in batches:
            yield batch
            for parameter in by_weight if several else ():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()
                note(parameter)

    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in by_weight)
        for parameter in by_weight:
            parameter.grad = None
            if not several:
                handles.append(parameter.register_post_accumulate_grad_hook(note))
        return backward(model, reduced() if several else batches, asked=f"gradients of {type(model).__name__}")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter, grad in kept.items():
            parameter.grad = grad
