"""Small inputs for any model, to compare two models by their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 12
_STATES = ("past_key_values", "cache_params", "mems", "state", "hidden_states", "attentions")  # one entry a layer


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


def running(model: nn.Module) -> dict[str, Any] | None:
    """Made-up inputs that the model runs on, None where none are known: images where they go into a text, or text."""
    batch = inputs(model)
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


def _without(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "decoder_input_ids"}


@torch.no_grad()
def compare(first: nn.Module, second: nn.Module) -> float | None:
    """The largest relative difference of two models' float outputs on probe inputs; None where none are known."""
    batch = running(first)
    return None if batch is None else difference(outputs(first, batch), outputs(second, batch))


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
