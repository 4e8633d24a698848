"""Small inputs for any model, to compare two models by their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 12


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor] | None:
    """Random inputs that ``model(**inputs)`` takes, batch 2; None where the architecture's inputs are not known."""
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    config: Any = model.config
    batch: dict[str, Tensor] = {}
    if "pixel_values" in accepted:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        batch["pixel_values"] = torch.randn(2, channels, height, width, generator=generator)
    if "input_ids" in accepted:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = getattr(text, "vocab_size", None)
        if vocabulary is None:
            return None
        length = min(_LENGTH, getattr(text, "max_position_embeddings", None) or _LENGTH)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, length), generator=generator)
        eos = getattr(text, "eos_token_id", None)
        if isinstance(eos, int) and 0 <= eos < vocabulary:
            ids[:, -1] = eos  # CLIP pools there, BART's classifier wants it
        batch["input_ids"] = ids
        if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids.flip(0)
            if eos is not None:  # classifiers count the end tokens and build their own decoder inputs
                batch = batch if type(model).__name__.endswith(("Model", "Generation", "MTModel")) else _without(batch)
    elif "input_features" in accepted and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        batch["input_features"] = torch.randn(2, config.num_mel_bins, frames, generator=generator)
        batch["decoder_input_ids"] = torch.randint(0, config.vocab_size, (2, 4), generator=generator)
    elif "input_values" in accepted and "pixel_values" not in accepted:
        batch["input_values"] = torch.randn(2, 8000, generator=generator)
    return batch or None


def _without(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "decoder_input_ids"}


@torch.no_grad()
def compare(first: nn.Module, second: nn.Module) -> float | None:
    """The largest relative difference of two models' float outputs on probe inputs; None where none are known."""
    batch = inputs(first)
    if batch is None:
        return None
    parameter = next(first.parameters())
    batch = {k: v.to(parameter.device, parameter.dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}
    outputs = []
    for model in (first, second):
        training = model.training
        model.eval()
        try:
            outputs.append(list(_floats(model(**batch))))
        finally:
            model.train(training)
    differences = [
        ((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)).item()
        for a, b in zip(*outputs, strict=True)
    ]
    return max(differences) if differences else None


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict) or hasattr(output, "to_tuple"):
        for value in output.values() if hasattr(output, "values") else output.to_tuple():
            yield from _floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)
