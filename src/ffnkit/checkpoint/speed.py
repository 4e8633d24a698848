"""Tokens a second of an exported model beside its original and one of equal size with equal widths, measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffnkit.calibration.latency import Latencies, Spread, latencies
from ffnkit.io.config_text import read
from ffnkit.model.config_keys import spread
from ffnkit.model.config_values import write
from ffnkit.model.ffn import FFN
from ffnkit.model.fresh import built
from ffnkit.surgery.description import Keys

TOKENS = 128
LARGEST = 500_000_000  # parameters of a model that is measured unasked: three or four of them are in memory then
REPEATS = 7
NEAR = 0.03  # within which two speeds are told as the same
EXPORTED, ORIGINAL, UNIFORM, COMPACT = "exported", "original", "uniform", "compact"
_SAID = {
    EXPORTED: "exported",
    ORIGINAL: "original widths",
    UNIFORM: "equal widths, equal size",
    COMPACT: "in ffnkit, unpadded",
}


@dataclass(frozen=True)
class Speed:
    """Tokens a second of a forward pass over one sequence of ``tokens``.

    Attributes:
        tokens_per_second: of "exported", "original" (the class with the widths that it had; what its weights are does
            not matter), "uniform" (equal widths, at most as many parameters as the model has unpadded) and "compact"
            (the model in memory, unpadded), as far as they differ from one another.
        ratios: speeds relative to the exported one, each taken within one round: median and quartiles.
        device, dtype, threads: what it was measured on.
    """

    tokens: int
    tokens_per_second: dict[str, float]
    ratios: dict[str, Spread]
    device: str
    dtype: str
    threads: int

    @classmethod
    def of(cls, taken: Latencies, tokens: int, model: PreTrainedModel) -> Speed:
        speeds = {name: tokens / spread.median for name, spread in taken.seconds.items()}
        # A ratio of seconds to the first name is how many times faster that one is.
        turned = {n: Spread(1 / r.median, 1 / r.upper, 1 / r.lower, r.n) for n, r in taken.ratios.items()}
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(tokens, speeds, turned, str(model.device), dtype, torch.get_num_threads())

    def lines(self) -> list[str]:
        """What was measured, and what follows from it."""
        parts = [f"{_SAID[name]} {value:,.0f}" for name, value in self.tokens_per_second.items()]
        how = f"{self.tokens} at a time, {self.dtype}, {self.device}"
        how += f", {self.threads} threads" if self.device == "cpu" else ""
        lines = [f"tokens a second, measured here ({how}): {'; '.join(parts)}"]
        if (ratio := self.ratios.get(ORIGINAL)) is not None:
            lines.append(_than_original(1 / ratio.median, 1 / ratio.upper, 1 / ratio.lower))
        if (ratio := self.ratios.get(UNIFORM)) is not None and ratio.lower > 1 + NEAR:
            told = f"a model of equal widths and the same size is {ratio.median:.2f} times as fast"
            lines.append(f"{told}: take equal widths where speed counts (compress --budget B --form standard)")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def _than_original(ratio: float, lower: float, upper: float) -> str:
    told = f"{ratio:.2f} times the original's speed (quartiles {lower:.2f} to {upper:.2f})"
    if lower <= 1 + NEAR and upper >= 1 - NEAR or abs(ratio - 1) <= NEAR:
        return f"as exported it is not measurably faster than the original: {told}"
    return f"as exported it runs {'faster' if ratio > 1 else 'slower'} than the original: {told}"


@torch.no_grad()
def measured(
    model: PreTrainedModel,
    exported: nn.Module,
    config: Any,
    found: list[FFN],
    keys: Keys,
    targets: Mapping[str, int],
    before: Mapping[str, int],
    tokens: int,
) -> Speed | None:
    """Speeds, or None for a model that does not read tokens.

    Args:
        model: as it is in memory. exported: as it opens. config: of the standard form, which the others are built from.
        found: its FFNs. keys: the config key of each one's width. targets: their widths as exported, by name.
        before: their widths once, where they are known.
    """
    if model.main_input_name != "input_ids" or getattr(model.config, "is_encoder_decoder", False):
        return None
    models: dict[str, nn.Module] = {EXPORTED: exported}
    known = [(ffn, before[ffn.name]) for ffn in found if ffn.name in before and keys[ffn.name] is not None]
    if any(targets[ffn.name] != width for ffn, width in known):
        models[ORIGINAL] = _built(model, config, spread([ffn for ffn, _ in known], keys, before))
    ragged = _ragged(found, keys)
    if ragged:
        models[UNIFORM] = _built(model, config, ragged)
        models[COMPACT] = model
    text = config.get_text_config()
    count = min(tokens, getattr(text, "max_position_embeddings", None) or tokens)
    ids = torch.randint(3, text.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids.to(model.device)}
    return Speed.of(latencies(models, batch, repeats=REPEATS, warmup=2), count, model)


def _ragged(found: list[FFN], keys: Keys) -> dict[Any, int]:
    """For each key whose FFNs differ in width, the width that all could have with as many parameters; {} for none."""
    by_key: dict[Any, list[FFN]] = {}
    for ffn in found:
        if keys[ffn.name] is not None:
            by_key.setdefault(keys[ffn.name], []).append(ffn)
    widths = {key: [ffn.width for ffn in group for _ in ffn.owners] for key, group in by_key.items()}
    if all(len(set(each)) == 1 for each in widths.values()):
        return {}
    return {key: max(1, sum(each) // len(each)) for key, each in widths.items()}


def _built(model: PreTrainedModel, config: Any, widths: Mapping[Any, int]) -> nn.Module:
    """A model of the same class with other widths and random weights, where and as the first one is."""
    other = read(type(config), config.to_json_string())
    write(other, widths)
    other._attn_implementation = model.config._attn_implementation
    made = built(type(model), other).to_empty(device=model.device).to(model.dtype)
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(std=0.02)
        else:
            tensor.zero_()
    fresh: nn.Module = made.eval()
    return fresh
