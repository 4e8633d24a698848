"""How far an error in an FFN's output goes on: what the norm that reads it next makes of each dimension and token.

An output passes, with the residual that it is added to, through a norm before anything else computes with it. A norm
divides by the size of the token, gives each dimension a weight of its own and takes out what points along the token
itself. A dimension that is large and hardly used then counts little, though it may hold nearly all of the variance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch
from ffnkit.calibration.hooks import Activations, watch
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.model.ffn import FFN
from ffnkit.ops.apart import held_out


@dataclass(frozen=True)
class Metric:
    """Weights of the squared error of one FFN's outputs; their means are 1.

    An error e (n, d) counts ``mean over t, j of tokens[t] * dimensions[j] * e[t, j] ** 2``.

    Attributes:
        dimensions: (d,), float32. tokens: (n,), float32, of the tokens that count, in the order of the data.
        apart: those of the tokens that are held out of fits (:meth:`~ffnkit.calibration.hooks.Activations.apart`);
            None of routed experts, whose tokens weigh by their routing.
    """

    dimensions: Tensor
    tokens: Tensor
    apart: Tensor | None = None

    def centre(self, outputs: Tensor) -> Tensor:
        """The mean output (d,) of outputs (n, d), tokens weighted."""
        return (outputs * self.tokens[:, None]).sum(0) / self.tokens.sum()


def output_metric(
    model: nn.Module, found: list[FFN], batches: Iterable[Batch] | StatisticsFile, *, seed: int = 0
) -> dict[str, Metric]:
    """What an error in each FFN's output does to the output of the next norm, to first order; one pass.

    With J_t the derivative of the norm at token t the error counts ||J_t e_t||^2. J_t^T J_t is taken as a product of
    a weight of the token and one of each dimension, from (J_t^T z)^2 with random signs z, which has its diagonal as
    its mean: so no kind of norm needs code of its own.

    Args:
        found: FFNs that run once in a pass. batches: as for ``model(**batch)``; padding is left out. Or statistics,
            whose first batches are read.

    Returns:
        By the FFN's name. All weights are 1 where no norm reads the output. Of routed experts, dimensions alone weigh:
        those of the norm behind all of them.
    """
    draw = torch.Generator().manual_seed(seed)
    sums = {ffn.name: torch.zeros(ffn.d, dtype=torch.float64) for ffn in found}
    sizes: dict[str, list[Tensor]] = defaultdict(list)
    held: dict[str, list[Tensor]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    waiting: dict[str, Activations] = {}

    def gave(ffn: FFN, acts: Activations) -> None:
        seen[ffn.name] += len(acts.kept().output)
        waiting[ffn.name] = acts

    def reads(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None or not waiting:
            return
        rows = given.detach().reshape(-1, given.shape[-1])
        fits = [
            name
            for name, acts in waiting.items()
            if acts.output.shape == rows.shape or (acts.expert is not None and acts.output.shape[-1] == rows.shape[-1])
        ]
        squares = _pulled_back(norm, rows, draw) if fits else rows
        for name in fits:
            acts = waiting.pop(name)
            if acts.expert is not None:
                sums[name] += squares.sum(0, dtype=torch.float64).cpu()
                continue
            counting = squares if acts.weights is None else squares[acts.weights.to(squares.device) > 0]
            sums[name] += counting.sum(0, dtype=torch.float64).cpu()
            sizes[name].append(counting.mean(1).cpu())
            held[name].append(held_out(len(counting)))

    norms = [module for module in model.modules() if is_norm(module)]
    handles = [norm.register_forward_pre_hook(reads, with_kwargs=True) for norm in norms]
    try:
        watch(model, some(model, batches), found, gave)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for ffn in found:
        count, read = seen[ffn.name], sum(map(len, sizes[ffn.name]))
        told = count == read > 0  # every call was followed by a norm
        tokens = _of_mean_1(torch.cat(sizes[ffn.name])) if told else torch.ones(count)
        dimensions = sums[ffn.name] if told or ffn.experts else torch.ones(ffn.d)
        apart = tokens[torch.cat(held[ffn.name])] if told else None
        result[ffn.name] = Metric(_of_mean_1(dimensions), tokens, apart)
    return result


def some(model: nn.Module, batches: Iterable[Batch] | StatisticsFile) -> Iterable[Batch]:
    """What a pass can run on: the batches, or those that lie beside statistics of this model."""
    if not isinstance(batches, StatisticsFile):
        return batches
    batches.check(model)
    return batches.probe


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of the last dimension: called so, and with no weight that is a matrix."""
    plain = not module._modules and all(p is None or p.ndim < 2 for p in module._parameters.values())
    return plain and "norm" in type(module).__name__.lower()


def _pulled_back(norm: nn.Module, rows: Tensor, draw: torch.Generator) -> Tensor:
    """(J_t^T z_t)^2 for each token, (n, d), float32, z of random signs."""
    with torch.enable_grad():
        x = rows.clone().requires_grad_()
        y = norm.forward(x)  # no hooks: nobody else is to see it
        signs = torch.randint(0, 2, y.shape, generator=draw).to(y) * 2 - 1
        (pulled,) = torch.autograd.grad(y, x, signs)
    return pulled.float().square()


def _of_mean_1(values: Tensor) -> Tensor:
    mean = values.mean()
    return (values / mean).float() if bool(mean > 0) else torch.ones_like(values, dtype=torch.float32)
