"""Small inputs for any model, to compare two models by their outputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.model.running import difference, outputs

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
        if "input_features_mask" in accepted:
            batch["input_features_mask"] = torch.ones(2, frames, dtype=torch.long)
        if "decoder_input_ids" in accepted:
            batch["decoder_input_ids"] = torch.randint(0, config.vocab_size, (2, 4), generator=generator)
    elif "input_values" in accepted and "pixel_values" not in accepted:
        batch["input_values"] = torch.randn(2, 8000, generator=generator)
    return batch or None


def _without(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "decoder_input_ids"}


def candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs of more and more forms, of which the first that runs will do: classes differ in what they take."""
    given = None
    with contextlib.suppress(Exception):  # a config may lack whatever its class does without
        given = inputs(model)
    if given is None:
        return
    yield given
    yield {name: value[:1] for name, value in given.items()}  # classifiers without a padding token
    words = {name: value for name, value in given.items() if name != "pixel_values"}
    if words and words != given:
        with contextlib.suppress(Exception):  # whatever a family raises: it wants more than pixels
            yield given | _image_tokens(model, given)
        yield words
    yield {name: value[:, None] for name, value in given.items()}  # choices, or one picture of several
    frames = getattr(model.config, "num_frames", None)
    if "pixel_values" in given and isinstance(frames, int):
        yield {"pixel_values": given["pixel_values"][:, None].repeat_interleave(frames, 1)}


def runnable(model: nn.Module) -> dict[str, Tensor] | None:
    """Inputs that the model runs on; None where none are known."""
    for batch in candidates(model):
        with contextlib.suppress(Exception):  # whatever a class raises on inputs that are not its own
            outputs(model, batch)
            return batch
    return None


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
def compare(first: nn.Module, second: nn.Module, limit: float) -> tuple[float | None, str]:
    """The largest relative difference of two models' float outputs on probe inputs.

    None, and why, where they could not be compared: no inputs are known that the first one takes, or it differs from
    itself by more than ``limit``. Infinity where the second one does not run, or gives outputs of other shapes.
    """
    why = "its inputs are not known"
    for tried, given in enumerate(candidates(first)):
        try:
            wanted = outputs(first, given)
        except Exception as error:  # whatever a class raises on inputs that are not its own
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = why if tried else f"it does not run on probe inputs: {lines[0][:200]}"
            continue
        if not wanted:
            return None, "it gives no numbers on probe inputs"
        try:
            gap = difference(wanted, outputs(second, given))
        except Exception:  # the first one did run
            gap = float("inf")
        if not gap <= limit and not difference(wanted, outputs(first, given)) <= limit:
            return None, "it gives other outputs each time"
        return gap, ""
    return None, why
