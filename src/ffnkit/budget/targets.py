"""What a model may cost: parameters, FLOPs, bytes of its file, bytes of keys and values, seconds; and its count."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ffnkit.calibration.batches import Batch, evaluating, prepared
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.config_values import config_value
from ffnkit.model.inspect import inspect
from ffnkit.nn.adapter_layer import plain_state

Kind = Literal["params", "flops", "bytes", "kv", "latency"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNITS = {"params": "parameters", "flops": "FLOPs a token", "bytes": "bytes", "kv": "bytes of keys and values"}
_DO = "Give one target, such as params=0.8, and a share between 0 and 1 or a whole number"


@dataclass(frozen=True)
class Target:
    """What a model may cost at most.

    Attributes:
        kind: what is counted: "params", a shared one once; "flops" a token, as ``inspect`` counts them; "bytes" of the
            weights' file in compact form; "kv", bytes of keys and values of one sequence of ``context`` tokens;
            "latency", seconds of a batch on this machine, to the uncompressed model's.
        amount: a share of what the model has (float), or how much may be left (int); of latency a share.
    """

    kind: Kind
    amount: float | int
    context: int = 4096

    def __post_init__(self) -> None:
        asked = f"{self.kind}={self.amount!r}"
        if self.kind not in KINDS:
            raise FfnkitError(f"target {asked}", "no such target", f"Choose among {', '.join(KINDS)}")
        number = not isinstance(self.amount, bool) and isinstance(self.amount, int | float)
        share = number and isinstance(self.amount, float) and 0 < self.amount < 1
        whole = number and isinstance(self.amount, int) and self.amount >= 1 and self.kind != "latency"
        if not share and not whole:
            raise FfnkitError(f"target {asked}", "neither a share between 0 and 1 nor a whole number", _DO)

    @classmethod
    def of(cls, given: Mapping[str, Any], context: int = 4096) -> Target:
        """From the one value that is given by kind. Raises FfnkitError where none is, or several."""
        named = {kind: amount for kind, amount in given.items() if amount is not None}
        if len(named) != 1:
            raise FfnkitError("a target", f"{', '.join(named) or 'nothing'} is given", _DO)
        [(kind, amount)] = named.items()
        return cls(kind, amount, context)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}={self.amount}"

    def limit(self, whole: int) -> int:
        """How much may be left of what the model has. Raises FfnkitError where that is no less than all."""
        if isinstance(self.amount, float):
            return int(self.amount * whole * (1 + 1e-12))  # 0.29 * 100 is 28.999...
        if self.amount >= whole:
            raise FfnkitError(f"target {self}", f"the model has {whole:,} {UNITS[self.kind]}", "Give fewer")
        return self.amount

    def count(self, model: nn.Module) -> int:
        """What a model has of it, also one on the meta device. Seconds are not counted; what they hang on most is."""
        if self.kind == "params":
            return sum(p.numel() for p in model.parameters())
        if self.kind == "bytes":
            return file_bytes(model)
        if self.kind == "kv":
            return key_value_bytes(model, self.context, _read(model, self.context))
        return round(inspect(model).flops_per_token)


# --- the file -----------------------------------------------------------------------------------------------------

_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


def file_bytes(model: Any) -> int:
    """Bytes of the safetensors file that holds a model in compact form: its head, and each tensor once."""
    held: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    held += model.named_buffers(remove_duplicate=False)
    own = dict(held)
    first: dict[int, str] = {}
    stored = {}
    for name, value in plain_state(model).items():
        if first.setdefault(id(own.get(name, value)), name) == name:
            stored[name] = value.to("meta")
    stored = revert_weight_conversion(model, stored)  # as transformers names and splits what it writes
    ranks = {name: number for number, name in enumerate(_ORDER)}
    kinds = {name: _NAMES.get(value.dtype, "F8_E4M3") for name, value in stored.items()}
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(stored, key=lambda each: (-ranks[kinds[each]], each)):
        value = stored[name]
        start, end = end, end + value.numel() * value.element_size()
        head[name] = {"dtype": kinds[name], "shape": list(value.shape), "data_offsets": [start, end]}
    text = len(json.dumps(head, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + end


# --- keys and values ----------------------------------------------------------------------------------------------


def key_value_bytes(model: Any, tokens: int, read: int, *, spare: int = 0) -> int:
    """Bytes of the keys and values of one sequence of ``tokens`` tokens; of ``read`` tokens that an encoder reads.

    Args:
        spare: so many tokens fewer than its window an attention keeps.
    """
    size = 0
    for attention in _caching(model):
        seen = read if attention.cross else min(tokens, (window(model, attention) or tokens + spare) - spare)
        width = attention.linear("v").weight.element_size() * attention.head_dim
        size += 2 * attention.kv_heads * width * seen * (1 + len(attention.tied))
    return size


def check_key_values(model: Any, batch: Batch, asked: str) -> None:
    """Raises FfnkitError where a model keeps no keys and values, or others than its attentions are counted for.

    Args:
        batch: inputs, of which one row is run.
    """
    given = {k: v for k, v in prepared(model, batch).items() if not k.startswith("label")}
    row = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in given.items()}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in row:
        row["decoder_input_ids"] = row["input_ids"][:, :2]
        row.pop("decoder_attention_mask", None)
    do = "Take params, flops, bytes or latency"
    try:
        with torch.no_grad(), evaluating(model):
            found = model(**row, use_cache=True)
    except (TypeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FfnkitError(asked, f"{type(model).__name__} keeps no keys and values ({why})", do) from error
    cache = getattr(found, "past_key_values", None)
    if cache is None or not _caching(model):
        raise FfnkitError(asked, f"{type(model).__name__} keeps no keys and values where others do", do)
    held = sum(value.numel() * value.element_size() for value in _cached(cache))
    tokens = next((row[k].shape[1] for k in ("decoder_input_ids", "input_ids") if k in row), 0)
    # of a window transformers' cache keeps one token less from step to step: the next one joins them
    crossed = [value.shape[2] for value in _held(getattr(cache, "cross_attention_cache", None))]
    counted = key_value_bytes(model, tokens, crossed[0] if crossed else 0, spare=1)
    if held != counted:
        what = f"of {tokens} tokens it keeps {held:,} bytes, and its attentions are counted for {counted:,}"
        raise FfnkitError(asked, what, do)


def _cached(cache: Any) -> Iterator[Tensor]:
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        yield from _held(part)


def _held(part: Any) -> Iterator[Tensor]:
    for layer in getattr(part, "layers", ()):
        yield from (v for v in (getattr(layer, "keys", None), getattr(layer, "values", None)) if v is not None)


def _read(model: Any, context: int) -> int:
    """How much an encoder hands on: as many tokens as the decoder writes, of sound what it always makes of it."""
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        return context
    return int(getattr(model.config, "max_source_positions", None) or context)


def _caching(model: Any) -> list[Attention]:
    """The attentions whose keys and values are kept while a model writes."""
    found = attentions(model)
    if getattr(model.config, "is_encoder_decoder", False):
        return [each for each in found if each.stack == "decoder"]
    return found if getattr(model, "get_output_embeddings", lambda: None)() is not None else []


def window(model: Any, attention: Attention) -> int | None:
    """How many tokens an attention keeps at most, where it keeps not all."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[attention.layer] if kinds and attention.layer < len(kinds) else ""
    if kind and "sliding" not in kind and "chunked" not in kind:
        return None
    key = "attention_chunk_size" if "chunked" in kind else "sliding_window"
    return config_value(config, key, attention.layer) or None
