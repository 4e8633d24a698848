"""A model run on a few tokens, to compare what it gives with what it gives otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

FEW = 64  # tokens of a row that tell whether two models compute the same
_STATES = ("past_key_values", "cache_params", "mems", "state", "hidden_states", "attentions")  # one entry a layer


def few_rows(batch: Mapping[str, Any], rows: int = 2, tokens: int | None = None) -> Mapping[str, Any]:
    """The first rows of a batch, where all of its tensors have the same number of rows; else the batch.

    Args:
        tokens: and the first of each row, where the batch is text alone, and each row has one there that counts.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if len({len(value) for value in tensors.values()}) != 1:
        return batch
    few = {name: value[:rows] for name, value in tensors.items()}
    shapes = {value.shape[1:] for value in few.values() if value.ndim > 1}
    if tokens is not None and "input_ids" in few and len(shapes) == 1 and len(*shapes) == 1:
        short = {name: value[:, :tokens] if value.ndim > 1 else value for name, value in few.items()}
        mask = short.get("attention_mask")
        few = short if mask is None or bool(mask.any(1).all()) else few
    return {**batch, **few}


def beginnings(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first ``FEW`` tokens of the first rows, where that cuts them, and these rows whole; to try in order.

    BART's and T5's classifiers look for the token that ends a row, Nystromformer takes rows of one length.
    """
    few, whole = few_rows(batch, tokens=FEW), few_rows(batch)
    cut = any(isinstance(value, Tensor) and value.shape != few[name].shape for name, value in whole.items())
    return [few, whole] if cut else [whole]


def few_tokens(batch: Mapping[str, Any], runs: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
    """The first of :func:`beginnings` that a model ``runs`` on; the last one is not tried."""
    *cut, whole = beginnings(batch)
    return next((each for each in cut if runs(each)), whole)


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The float outputs for a batch in evaluation mode, caches left out; what is drawn is drawn alike each time."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    device, dtype = parameter.device, parameter.dtype
    batch = {
        k: v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
        for k, v in batch.items()
    }
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return list(_floats(model(**batch)))
    finally:
        for module, mode in modes:
            module.training = mode


def rounding(dtype: torch.dtype) -> float:
    """The relative rounding of a forward pass in a dtype; in float64 that of float32, in which families rotate queries
    or normalise whatever the dtype of their weights is (Llama 4)."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest relative difference of two lists of outputs; 0 where there are none.

    Raises:
        ValueError: they are not of the same number and shapes.
    """
    pairs = [(a.double(), b.double().to(a.device)) for a, b in zip(first, second, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        raise ValueError("the outputs are of other shapes")
    found = [((a - b).norm() / a.norm().clamp_min(1e-30)).item() for a, b in pairs]
    return max(found, default=0.0)


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict) or hasattr(output, "to_tuple"):
        named = output.items() if hasattr(output, "items") else enumerate(output.to_tuple())
        for key, value in named:
            if key not in _STATES:
                yield from _floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)
