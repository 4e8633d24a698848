"""A model run on a few tokens, to compare what it gives with what it gives otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.model import probe

_STATES = ("past_key_values", "cache_params", "mems", "state", "hidden_states", "attentions")  # one entry a layer


def inputs(model: nn.Module) -> dict[str, Any] | None:
    """Made-up inputs that the model runs on, None where none are known: images where they go into a text, or text."""
    batch = probe.inputs(model)
    if batch is None or _runs(model, batch):
        return batch
    text = {name: value for name, value in batch.items() if name != "pixel_values"}
    if "pixel_values" in batch and "input_ids" in batch:
        try:
            with_images = batch | _image_tokens(model, batch)
        except Exception:  # whatever a family raises: it wants more than pixels
            with_images = {}
        for tried in (with_images, text):
            if tried and _runs(model, tried):
                return tried
    return None


def _runs(model: nn.Module, batch: dict[str, Any]) -> bool:
    try:
        outputs(model, batch)
    except Exception:  # whatever a family raises for inputs that it does not take
        return False
    return True


@torch.no_grad()
def _image_tokens(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Text that begins with as many image tokens as there are features of each image."""
    parameter = next(model.parameters())
    given = model.get_image_features(pixel_values=batch["pixel_values"].to(parameter.device, parameter.dtype))
    given = getattr(given, "pooler_output", given)
    features = torch.cat(tuple(each.flatten(0, -2) for each in given)) if isinstance(given, list | tuple) else given
    ids = batch["input_ids"]
    count = features.numel() // features.shape[-1] // len(ids)
    token = next(
        v for k in ("image_token_id", "image_token_index") if (v := getattr(model.config, k, None)) is not None
    )
    text = ids.masked_fill(ids == token, token - 1)
    return {"input_ids": torch.cat((torch.full((len(ids), count), token), text), 1)}


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


def difference(first: list[Tensor], second: list[Tensor]) -> float | None:
    """The largest relative difference of two lists of outputs; None where there are none.

    Raises:
        ValueError: they are not of the same number and shapes.
    """
    pairs = [(a.double(), b.double().to(a.device)) for a, b in zip(first, second, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        raise ValueError("the outputs are of other shapes")
    found = [((a - b).norm() / a.norm().clamp_min(1e-30)).item() for a, b in pairs]
    return max(found) if found else None


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
