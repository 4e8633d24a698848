"""What happens around an optimizer's step: entries of SparseGrad are chosen from the whole gradient, then it steps."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ffnkit.nn.adapter_layer import full_tensor as whole_of
from ffnkit.nn.optimizer_hooks import watch

if TYPE_CHECKING:
    from ffnkit.nn.sparsegrad import SparseGradLinear

DECAY = 0.9  # of the running squares, a step


def watched(layer: SparseGradLinear) -> None:
    """See to the layer at every step of an optimizer that holds its values, where its selection changes."""
    if layer.selection != "fixed":
        watch(layer, before=_before, after=_after)


def _of(optimizer: Optimizer, living: list[SparseGradLinear]) -> list[SparseGradLinear]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return sorted((layer for layer in living if id(layer.values) in held), key=lambda layer: layer.order)


def _before(optimizer: Optimizer, living: list[SparseGradLinear]) -> None:
    groups: dict[str, list[SparseGradLinear]] = defaultdict(list)
    for layer in _of(optimizer, living):
        if layer.selection == "step" and layer.values.grad is not None:
            groups[layer.together].append(layer)
        elif layer.selection == "refresh" and layer._pending is not None:
            gathered = _reduced(layer._pending)
            assert layer.energy is not None
            layer.energy.mul_(DECAY).add_(gathered.square().nan_to_num_(0.0, 0.0, 0.0), alpha=1 - DECAY)
            layer._pending = None
    for layers in groups.values():
        grads = [whole_of(layer.values.grad) for layer in layers]  # type: ignore[arg-type]
        for layer, mask in zip(layers, largest(grads, sum(layer.count for layer in layers)), strict=True):
            layer.values.grad.mul_(_like(mask, layer.values.grad))  # type: ignore[union-attr]


def _after(optimizer: Optimizer, living: list[SparseGradLinear]) -> None:
    for layer in _of(optimizer, living):
        if layer.selection == "refresh":
            assert layer.steps is not None
            layer.steps += 1
            if layer.every and int(layer.steps) % layer.every == 0:
                _refresh(layer, optimizer)


@torch.no_grad()
def _refresh(layer: SparseGradLinear, optimizer: Optimizer) -> None:
    """Choose the entries of most energy; those that leave keep their values, the optimizer's state goes along."""
    assert layer.index is not None and layer.settled is not None and layer.energy is not None
    old = layer.index.long()
    settled = layer.settled.view(-1)
    settled[old] = whole_of(layer.values)
    fresh = torch.topk(layer.energy.flatten(), len(old)).indices.sort().values
    _put(layer.values, settled[fresh])
    layer.index.copy_(fresh)
    for value in optimizer.state.get(layer.values, {}).values():
        if isinstance(value, Tensor) and value.shape == old.shape:
            places = settled.new_zeros(len(settled), dtype=value.dtype)
            places[old] = whole_of(value)
            _put(value, places[fresh])


def largest(tensors: list[Tensor], count: int) -> list[Tensor]:
    """Masks, float, of the ``count`` entries of largest size among all tensors; ties go to the first ones."""
    flat = torch.cat([tensor.abs().flatten() for tensor in tensors])
    mask = torch.zeros_like(flat)
    mask[torch.topk(flat, min(count, len(flat))).indices] = 1
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _reduced(tensor: Tensor) -> Tensor:
    """The mean over the processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def _like(whole: Tensor, tensor: Any) -> Tensor:
    """A whole, in shards where the tensor lies so."""
    if not hasattr(tensor, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, tensor.device_mesh, tensor.placements)


def _put(tensor: Tensor, whole: Tensor) -> None:
    tensor.copy_(_like(whole.to(tensor.dtype), tensor))
