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


def candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs of more and more forms, of which the first that runs will do: classes differ in what they take."""
    given = inputs(model)
    if given is None:
        return
    yield given
    yield {name: value[:1] for name, value in given.items()}  # classifiers without a padding token
    words = {name: value for name, value in given.items() if name != "pixel_values"}
    if words and words != given:
        yield words  # pictures want their own tokens among the words
    yield {name: value[:, None] for name, value in given.items()}  # choices, or one picture of several
    frames = getattr(model.config, "num_frames", None)
    if "pixel_values" in given and isinstance(frames, int):
        yield {"pixel_values": given["pixel_values"][:, None].repeat_interleave(frames, 1)}


@torch.no_grad()
def compare(first: nn.Module, second: nn.Module, limit: float) -> tuple[float | None, str]:
    """The largest relative difference of two models' float outputs on probe inputs.

    None, and why, where they could not be compared: no inputs are known that the first one takes, or it differs from
    itself by more than ``limit``. Infinity where the second one does not run, or gives outputs of other shapes.
    """
    parameter = next(first.parameters())
    why = "its inputs are not known"
    for tried, given in enumerate(candidates(first)):
        batch = {
            k: v.to(parameter.device, parameter.dtype if v.is_floating_point() else v.dtype) for k, v in given.items()
        }
        try:
            wanted = _outputs(first, batch)
        except Exception as error:  # whatever a class raises on inputs that are not its own
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = why if tried else f"it does not run on probe inputs: {lines[0][:200]}"
            continue
        if not wanted:
            return None, "it gives no numbers on probe inputs"
        try:
            gap = _gap(wanted, _outputs(second, batch))
        except Exception:  # the first one did run
            gap = float("inf")
        if not gap <= limit and not _gap(wanted, _outputs(first, batch)) <= limit:
            return None, "it gives other outputs each time"
        return gap, ""
    return None, why


def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Float outputs in evaluation mode; what is drawn all the same is drawn alike."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return list(_floats(model(**batch)))
    finally:
        model.train(training)


def _gap(wanted: list[Tensor], found: list[Tensor]) -> float:
    if [value.shape for value in wanted] != [value.shape for value in found]:
        return float("inf")
    pairs = zip(wanted, found, strict=True)
    return max(((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)).item() for a, b in pairs)


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
