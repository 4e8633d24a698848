"""How far an error in an FFN's output moves what the whole model gives: the Fisher information of the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, kept, prepared
from ffnkit.calibration.drift import given, whole_masks, writes
from ffnkit.calibration.padding import TokenMasks
from ffnkit.calibration.reading import some
from ffnkit.calibration.stored import PROBED, StatisticsFile
from ffnkit.io.files import spooled
from ffnkit.io.progress import counted
from ffnkit.model.ffn import FFN

TOGETHER = 512  # tokens that are gone back over at a time, where rows are not longer
DAMPING = 0.1  # of the mean diagonal, added to it: directions that few tokens tell of


def fisher(
    model: nn.Module, found: list[FFN], batches: Iterable[Batch] | StatisticsFile, *, seed: int = 0
) -> dict[str, Tensor]:
    """For each FFN (d, d), float32: the mean over tokens of g g^T, g the gradient at its output; mean diagonal 1.

    Of a model that writes it is the gradient of the log-probability of tokens drawn from the model's own distribution:
    an error e then moves that distribution by a Kullback-Leibler divergence of e^T (g g^T) e / 2 on average, to second
    order. Of any other it is that of what the body gives, with random signs. One pass forth and back; no gradient of a
    weight is formed, and the model is as it was afterwards.

    Memory beyond the model: what is needed to go back over ``TOGETHER`` tokens, and the matrices, in temporary files
    where they are large.

    Args:
        batches: as of :func:`~ffnkit.calibration.reading.output_metric`.

    Returns:
        By name; FFNs that no gradient reached, or none that is finite, are left out.

    Source: Fisher information for pruning (Theis et al., arXiv 1801.05787; Liu et al., arXiv 2108.00708), of outputs as
        in K-FAC (Martens and Grosse, arXiv 1503.05671).
    """
    draw = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = [
        module.register_forward_hook(_adding(sums, seen, ffn.name))
        for ffn in found
        for module in {id(m): m for owner in ffn.owners.values() for m in [_giving(ffn, owner)]}.values()
    ]
    masks = whole_masks(model)
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for batch in counted(_parts(kept(some(model, batches)), seen), "Fisher information"):
                _go_back(model, prepared(model, batch), masks, draw)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return {name: spooled(_damped(total)) for name, total in sums.items() if 0 < float(total.trace()) < float("inf")}


def _giving(ffn: FFN, owner: nn.Module) -> nn.Module:
    return owner if ffn.layout.experts else ffn.linear("down", owner)


def _adding(sums: dict[str, Tensor], seen: dict[str, int], name: str) -> Any:
    """A hook that adds up the gradients at what a module gives, and how many tokens they are of."""

    def add(gradient: Tensor) -> None:
        g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        sums[name] = sums.get(name, 0) + g.T @ g
        seen[name] = seen.get(name, 0) + len(g)

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        # no weight asks for gradients: the first FFN's output is where they begin
        output = output if output.requires_grad else output.detach().requires_grad_() * 1
        output.register_hook(add)
        return output

    return hook


def _go_back(model: nn.Module, batch: dict[str, Any], masks: TokenMasks, draw: torch.Generator) -> None:
    value, mask = given(model, batch, masks)
    if not value.requires_grad:
        return
    rows = value.reshape(-1, value.shape[-1])
    rows = (rows if mask is None else rows[mask > 0]).float()
    if writes(model):
        with torch.no_grad():  # an exponential race draws from the distribution, with a generator of the CPU's
            noise = torch.rand(rows.shape, generator=draw).clamp_min_(1e-30).log_().neg_().log_().neg_()
            drawn = (rows + noise.to(rows.device)).argmax(-1)
        nn.functional.cross_entropy(rows, drawn, reduction="sum").backward()
    else:
        signs = torch.randint(0, 2, rows.shape, generator=draw) * 2 - 1
        (rows * signs.to(rows)).sum().backward()


def _parts(batches: list[Batch], seen: dict[str, int]) -> Iterator[Batch]:
    """The batches, of few rows each: what going back takes grows with them.

    Rows that do not say how many tokens they are (images, sound, whatever text is beside them) are taken as what the
    FFNs have ``seen`` of those before, and no more of them than hold ``PROBED`` tokens.
    """
    done = 0
    for batch in batches:
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        count = len(tensors[0])
        whole = any(len(value) != count for value in tensors)
        told = not any(value.ndim > 1 and value.is_floating_point() for value in tensors)
        ids = next((value for value in tensors if value.ndim == 2), None) if told else None
        start = 0
        while start < count:
            if ids is None and min(seen.values(), default=0) >= PROBED:
                return
            size = -(-max(seen.values(), default=TOGETHER) // max(done, 1)) if ids is None else ids[0].numel()
            step = count if whole else max(1, TOGETHER // max(size, 1))
            rows = slice(start, start + step)
            yield {k: v[rows] if isinstance(v, Tensor) and v.ndim and step < count else v for k, v in batch.items()}
            start, done = start + step, done + min(step, count - start)


def _damped(total: Tensor) -> Tensor:
    found = total / total.diagonal().mean()
    found.diagonal().add_(DAMPING)
    return found / (1 + DAMPING)
