"""What happens around an optimizer's step: entries of SparseGrad are chosen from the whole gradient, then it steps."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SparseAdam
from torch.optim.optimizer import Optimizer

from ffnkit.errors import FfnkitError
from ffnkit.nn.adapter_layer import full_tensor as whole_of
from ffnkit.nn.adapter_layer import local_part, sharded_as
from ffnkit.nn.optimizer_hooks import leaves_out, watch

if TYPE_CHECKING:
    from ffnkit.nn.sparsegrad import SparseGradLinear

DECAY = 0.9  # of the running squares, a step
_ADAM = ("betas", "eps", "maximize")
EACH_STEP = ("step", "masked-gradient")  # selections of which the whole core trains


def watched(layer: SparseGradLinear) -> None:
    """See to the layer at every step of an optimizer that holds its values, where its selection changes."""
    if layer.selection != "fixed":
        watch(layer, before=_before, after=_after)


def _of(optimizer: Optimizer, living: list[SparseGradLinear]) -> list[SparseGradLinear]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return sorted((layer for layer in living if id(layer.values) in held), key=lambda layer: layer.order)


def _before(optimizer: Optimizer, living: list[SparseGradLinear]) -> None:
    reached = [layer for layer in _of(optimizer, living) if layer.values.grad is not None]
    if leaves_out(optimizer):
        for layer in reached:
            if layer.selection == "step":  # their moments are SparseAdam's, which its kernel does not read
                _hide(layer)
        return
    refreshed = [layer for layer in reached if layer.selection == "refresh"]
    if refreshed:
        _note(refreshed, getattr(optimizer, "grad_scale", None))
    groups: dict[tuple[str, str], list[SparseGradLinear]] = defaultdict(list)
    for layer in reached:
        if layer.selection in EACH_STEP:
            groups[layer.together, layer.selection].append(layer)
    chosen: list[tuple[SparseGradLinear, Tensor]] = []
    for (_, selection), layers in groups.items():
        grads = [whole_of(layer.values.grad) for layer in layers]  # type: ignore[arg-type]
        masks = largest(grads, sum(layer.count for layer in layers))
        pairs = [(layer, sharded_as(m, layer.values.grad)) for layer, m in zip(layers, masks, strict=True)]
        if selection == "step":
            chosen += pairs
        else:
            for layer, mask in pairs:
                layer.values.grad.mul_(mask)  # type: ignore[union-attr]
    if chosen:
        _step(optimizer, chosen)


@torch.no_grad()
def _step(optimizer: Optimizer, chosen: Iterable[tuple[SparseGradLinear, Tensor]]) -> None:
    """A step of torch's SparseAdam on the chosen entries; the optimizer's own finds no gradient of these layers.

    Rates, betas and eps are those of the optimizer's groups, and the moments lie in its state: schedules and saved
    states hold them. SparseAdam knows no weight decay.
    """
    groups: list[dict[str, Any]] = []
    states: list[tuple[dict[str, Any], Tensor, dict[str, Any]]] = []
    scale = getattr(optimizer, "grad_scale", None)
    for layer, mask in chosen:
        values, grad = layer.values, layer.values.grad
        assert grad is not None
        given = next(group for group in optimizer.param_groups if any(p is values for p in group["params"]))
        if given.get("lr") is None:
            asked = f'selection "step" under {type(optimizer).__name__}'
            raise FfnkitError(asked, "it has no learning rate of its own", "Give one, or another selection")
        state = optimizer.state[values]
        own = {key: state.setdefault(key, torch.zeros_like(values)) for key in ("exp_avg", "exp_avg_sq")}
        place, sparse = local_part(values).detach(), (local_part(grad) * local_part(mask)).to_sparse()
        place.grad = sparse if scale is None else sparse / scale.to(sparse.device)
        groups.append(
            {"params": [place], **{key: given[key] for key in _ADAM if key in given}, "lr": float(given["lr"])}
        )
        states.append((state, place, {"step": int(state.get("step", 0)), **{k: local_part(v) for k, v in own.items()}}))
        _hide(layer)
    inner = SparseAdam([{"params": group["params"]} for group in groups])
    for mine, group in zip(inner.param_groups, groups, strict=True):
        mine.update(group)  # not checked: a schedule may begin at a rate of 0
    for _, place, moments in states:
        inner.state[place] = moments
    inner.step()
    for state, place, _ in states:
        state["step"] = inner.state[place]["step"]


def _hide(layer: SparseGradLinear) -> None:
    """The gradient is put aside until the optimizer's own step is done."""
    layer.__dict__["_whole"], layer.values.grad = layer.values.grad, None


@torch.no_grad()
def _note(layers: list[SparseGradLinear], scale: Tensor | None) -> None:
    """Add the squares of whole gradients as the optimizer sees them: unscaled, clipped, reduced over the processes.

    The chosen entries are in both, and tell by which factor the optimizer's differ from what backward gave; where all
    of them are zero, those of all layers do.

    Args:
        scale: what a fused optimizer divides gradients by itself.
    """
    found = []
    for layer in layers:
        assert layer.index is not None
        whole = _reduced(layer)
        raw = whole.flatten()[layer.index.long()].double()
        seen = whole_of(layer.values.grad).double()  # type: ignore[arg-type]
        found.append((layer, whole, torch.stack([seen @ raw, raw @ raw])))
    total = sum(both.to(found[0][2].device) for _, _, both in found)
    for layer, whole, both in found:
        seen, raw = torch.where(both[1] > 0, both, torch.as_tensor(total, device=both.device))
        factor = (seen / raw if scale is None else seen / raw / scale.to(raw)).to(whole)
        assert layer.energy is not None
        layer.energy.mul_(DECAY).add_((whole * factor).square().nan_to_num_(0.0, 0.0, 0.0), alpha=1 - DECAY)


def _after(optimizer: Optimizer, living: list[SparseGradLinear]) -> None:
    for layer in _of(optimizer, living):
        if (grad := layer.__dict__.pop("_whole", None)) is not None:
            layer.values.grad = grad
        counts = layer.selection == "refresh" and not leaves_out(optimizer)
        if counts and _counted(layer) % (layer.every or sys.maxsize) == 0:
            _refresh(layer, optimizer)


def _counted(layer: SparseGradLinear) -> int:
    """The layer's steps with this one; the device is asked only where it was not this that counted last."""
    assert layer.steps is not None
    tensor, version, steps = layer.__dict__.get("_counted", (None, 0, 0))
    known = tensor is layer.steps and layer.steps._version == version
    layer.steps += 1
    steps = steps + 1 if known else int(layer.steps)
    layer.__dict__["_counted"] = layer.steps, layer.steps._version, steps
    return steps


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
    flat = torch.cat([tensor.abs().flatten().to(tensors[0].device) for tensor in tensors])
    mask = torch.zeros_like(flat)
    mask[torch.topk(flat, min(count, len(flat))).indices] = 1
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]


def _reduced(layer: SparseGradLinear) -> Tensor:
    """The layer's whole gradient (r, c), from now on the mean over the processes where there are several."""
    if layer._pending is None:  # no token of this process reached it
        layer._pending = torch.zeros(layer.core, device=layer.index.device, dtype=layer.values.dtype)  # type: ignore
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(layer._pending)
        layer._pending /= torch.distributed.get_world_size()
    return layer._pending


def _put(tensor: Tensor, whole: Tensor) -> None:
    tensor.copy_(sharded_as(whole.to(tensor.dtype), tensor))
