"""LLaMA-shaped models whose FFNs differ in width in NVIDIA's form (Nemotron-NAS), which engines read layer by layer.

Read in their sources (November 2026): vLLM builds each layer of ``DeciLMForCausalLM`` from ``block_configs`` and takes
``ffn.intermediate_size`` as it is where there is no ``ffn_mult``. SGLang and llama.cpp's converter know ``ffn_mult``
alone, which they round up to a multiple of 256. llama.cpp loses the attention of a layer that has no FFN, so that zeros
stand in its place where widths are such multiples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ffnkit.checkpoint.decilm import configuration_decilm, modeling_decilm
from ffnkit.checkpoint.decilm.configuration_decilm import DeciLMConfig, width_of
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
UNIT = 256  # of the widths that follow from ffn_mult
_SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id"),
    *("eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias"),
    *("head_dim", "dtype"),
)


def check_shape(model: PreTrainedModel) -> None:
    """Raises FfnkitError where a model is not of LLaMA's shape."""
    config: Any = model.config
    asked, do = f"exporting {type(model).__name__} for nemotron-nas", "Export the standard form"
    if type(model).__name__ not in CLASSES:
        raise FfnkitError(asked, "it is not of LLaMA's shape", f"{do}, or a model of {', '.join(CLASSES)}")
    if config.hidden_act != "silu":
        raise FfnkitError(asked, f"its activation is {config.hidden_act}, and that form has silu", do)
    if getattr(config, "sliding_window", None) is not None:
        raise FfnkitError(asked, f"its attention slides ({config.sliding_window} tokens)", do)


def silent(found: list[FFN]) -> set[str]:
    """The places of FFNs that give zeros whatever comes in."""
    read = {ffn.name: ffn.read() for ffn in found}
    none = [
        ffn
        for ffn in found
        if not read[ffn.name].down.any() and ((bias := read[ffn.name].down_bias) is None or not bias.any())
    ]
    return {owner for ffn in none for owner in ffn.owners}


def nemotron_config(model: PreTrainedModel, found: list[FFN], targets: dict[str, int], left_out: set[str]) -> Any:
    """The config that says each layer's width.

    Args:
        targets: neurons of each FFN in the file, by its name. left_out: places whose FFN is not written.
    """
    config: Any = model.config
    widths = {owner: targets[ffn.name] for ffn in found for owner in ffn.owners}
    by_layer = [(name, width) for name, width in sorted(widths.items(), key=lambda item: _layer(item[0]))]
    rounded = all(width % UNIT == 0 for _, width in by_layer) and not left_out
    heads = config.num_attention_heads // config.num_key_value_heads
    attention = {"n_heads_in_group": heads, "no_op": False, "replace_with_linear": False}
    rows = []
    for name, width in by_layer:
        ffn: dict[str, Any] = {"no_op": name in left_out, "replace_with_linear": False}
        if name not in left_out:
            ffn["intermediate_size"] = width
        if rounded:
            ffn["ffn_mult"] = 3 * width / (2 * config.hidden_size)
            assert width_of({"ffn_mult": ffn["ffn_mult"]}, config.hidden_size) == width
        rows.append({"attention": dict(attention), "ffn": ffn})
    shared = {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}
    shared["intermediate_size"] = max(width for _, width in by_layer)
    shared["dtype"] = model.dtype
    biased = type(model).__name__ == "Qwen2ForCausalLM"
    return DeciLMConfig(**shared, block_configs=rows, qkv_bias=biased, architectures=["DeciLMForCausalLM"])


def nemotron_state(state: dict[str, Tensor], left_out: set[str]) -> dict[str, Tensor]:
    """The plain state dict without FFNs that are left out, and without the norms in front of them."""
    gone = tuple(start for name in left_out for start in (f"{name}.", f"{_block(name)}.post_attention_layernorm."))
    return {name: value for name, value in state.items() if not name.startswith(gone)} if gone else state


def add_code(folder: Path) -> None:
    """Put the code beside a written checkpoint, and the names under which older engines look for rotations."""
    for module in (configuration_decilm, modeling_decilm):
        source = Path(str(module.__file__))
        shutil.copyfile(source, folder / source.name)
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["auto_map"] = {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    }
    rope = dict(data.get("rope_parameters") or {})
    if "rope_theta" in rope:
        data["rope_theta"] = rope.pop("rope_theta")
        data["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def engines(config: Any, tokenizer: Any) -> Iterator[str]:
    """What opens it, in words."""
    rows = [row["ffn"] for row in config.block_configs]
    rounded = all("ffn_mult" in row for row in rows)
    yield "transformers with trust_remote_code=True: reopened here"
    yield "vLLM with --trust-remote-code: each layer's width as it is (read in its source, not run here)"
    if not rounded:
        yield f"not SGLang and llama.cpp, which round widths up to {UNIT}: --multiple {UNIT}"
        return
    yield "SGLang with --trust-remote-code: these multiples of 256 (read in its source, not run here)"
    if config.vocab_size == 128256 or getattr(tokenizer, "vocab_file", None) or _sentencepiece(tokenizer):
        yield "llama.cpp's convert_hf_to_gguf.py"
    else:
        yield "not llama.cpp: its converter takes Llama 3's and SentencePiece vocabularies here; the standard form does"


def _sentencepiece(tokenizer: Any) -> bool:
    """Whether llama.cpp's converter reads a tokenizer as SentencePiece's: BPE with bytes to fall back on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    model = json.loads(backend.to_str())["model"]
    return bool(model.get("type") == "BPE" and model.get("byte_fallback"))


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def _layer(name: str) -> int:
    return int(_block(name).rpartition(".")[2])
