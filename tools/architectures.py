"""As many architectures of transformers as can be built tiny: each is edited, opened anew and compared.

    architectures.py [NAME ...] [--quick]

Without names: every model type of CONFIG_MAPPING whose model can be built small and runs on made-up inputs
(``ffnkit.model.running``). For each of them

    width   half of all neurons go; saved, opened by ffnkit, and exported, opened by plain transformers
    stack   the same in one stack alone, where there are several
    heads   half of the heads go
    drop    one layer goes: the second, and the last, of every stack

and outputs are compared: of the model with hooks that silence what goes, of the edited model, and of the one that is
opened anew in each form. A row says "equal", "refused" (by a plan, in one line), "not compared" with the reason, or
"WRONG". Any of these ends the script with 1. --quick: widths and the drop of the second layer only.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.layers import LayerDrop
from ffnkit.methods.narrow.selection import Magnitude
from ffnkit.model import probe, running
from ffnkit.model.attention import attentions
from ffnkit.model.finding import block_name, ffns

# Config keys by what they are, and small values for them.
SMALL = (
    (r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|emb_dim|width|model_dim|attention_dim|true_hidden_size"
     r"|encoder_dim|decoder_dim|dim_model|(en|de)coder_hidden_size|embedding_size|word_embed_proj_dim|out_hidden_size"
     r"|projection_dim|hidden_channels|decoder_hidden_dim", 32),
    (r"(moe_|shared_expert_|encoder_|decoder_|)(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|dim_ff"
     r"|dim_feedforward|intermediate_dim)(_mlp)?", 48),
    (r"num_hidden_layers|num_layers|n_layers?|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_blocks", 4),
    (r"num_(en|de)coder_attention_heads|num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads"
     r"|attention_heads|heads", 4),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|num_global_key_value_heads", 2),
    (r"((en|de)coder_|text_|)vocab_size(_per_layer_input)?", 128),
    (r"head_dim|d_kv|global_head_dim|attention_head_dim|attention_head_size|qk_nope_head_dim|v_head_dim", 8),
    (r"qk_rope_head_dim", 4),
    (r"q_lora_rank|kv_lora_rank", 16),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"n_group|topk_group", 1),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|max_(en|de)coder_position_embeddings", 128),
    (r"num_mel_bins|n_mels|feature_size|input_feat_per_channel", 16),
    (r"hidden_size_per_layer_input", 4),
    (r"sliding_window|attention_window|local_attention", 8),
    (r"num_conv_pos_embeddings", 8),
)  # fmt: skip
IDS = {
    "unk_token_id": 0, "pad_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2, "cls_token_id": 2,
    "eos_token_id": 3, "sep_token_id": 3, "mask_token_id": 4, "image_token_id": 90, "image_token_index": 90,
    "video_token_id": 91, "audio_token_id": 92, "vision_start_token_id": 93, "vision_end_token_id": 94,
    "boi_token_id": 93, "eoi_token_id": 94,
}  # fmt: skip
_TYPES = ["sliding_attention", "full_attention"]
_SPEECH = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
# What cannot be had by one value for all.
OWN: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_hidden_layers": 6, "layer_types": _TYPES * 3, "num_kv_shared_layers": 2,
                     "activation_sparsity_pattern": [0.0] * 6, "intermediate_size": [48] * 6},
    "gemma4_text": {"num_hidden_layers": 6, "layer_types": _TYPES * 3, "num_kv_shared_layers": 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "use_shared_mlp_adapter": True,
               "mamba_headdim": 8, "n_mamba_heads": 8, "adapter_rank": 4, "kv_channels": 8},
    "wav2vec2": _SPEECH, "hubert": _SPEECH, "wavlm": _SPEECH, "unispeech": _SPEECH, "unispeech-sat": _SPEECH,
    "data2vec-audio": _SPEECH,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {"num_key_value_heads": 2, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
}  # fmt: skip
CLASSES = (
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
)  # fmt: skip
LARGEST = 5_000_000  # parameters
EQUAL = 1e-4  # relative


@dataclass(frozen=True)
class Row:
    """What came of one edit of one architecture."""

    name: str
    edit: str
    outcome: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name:<28} {self.edit:<44} {self.outcome:<12} {self.why}".rstrip()


# --- tiny models ------------------------------------------------------------------------------------------------------


def small(kind: Any) -> dict[str, Any]:
    """Arguments for a small config of a class, its parts included."""
    try:
        default = kind()
    except Exception:
        default = None
    names = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    names |= set(vars(default)) if default is not None else set()
    values: dict[str, Any] = {}
    for name in names:
        held = getattr(default, name, None) if default is not None else None
        found = next((value for pattern, value in SMALL if re.fullmatch(pattern, name)), None)
        if name in IDS:
            values[name] = IDS[name]
        elif found is not None and not isinstance(held, list | tuple | dict) and (name != "head_dim" or held):
            values[name] = found
    for name, part in getattr(kind, "sub_configs", {}).items():
        held = getattr(default, name, None) if default is not None else None
        part = type(held) if isinstance(held, transformers.PreTrainedConfig) else part
        if isinstance(part, type) and part.__name__ != "AutoConfig":
            values[name] = small(part) | ({"model_type": part.model_type} if part.model_type else {})
    return values


def build(name: str) -> Any:
    """A small model of a model type, its weights such that every block matters. Raises whatever keeps it from that."""
    found = next((names[name] for names in CLASSES if name in names), None)
    if found is None:
        raise LookupError("no model class")
    model_class = getattr(transformers, found if isinstance(found, str) else found[0])
    kind = CONFIG_MAPPING[name]
    config = kind(**{**small(kind), **copy.deepcopy(OWN.get(name, {}))})
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.1f} million parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    redraw(model)
    return model


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Weights of unit gain: the library's are so small that a broken block would hardly be seen."""
    draw = torch.Generator().manual_seed(1)
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # Marian's positions: no file holds them
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 0 or not parameter.is_floating_point() or f"{place}.{name}" in computed:
                continue
            if parameter.ndim == 1:
                parameter.add_((0.2 if "Norm" in type(module).__name__ else 0.1) * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
                if module.padding_idx is not None:  # some families make it zeros again when they are opened
                    parameter[module.padding_idx] = 0
            else:
                fan = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
                parameter.copy_(noise / fan**0.5)


# --- edits, and the hooks that do the same ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """An edit to be tried: its name, the method, and what silences in the model as it is what goes by a plan."""

    name: str
    method: Any
    silence: Callable[[Any, fk.Plan], list[Any] | None]


def trials(model: nn.Module, quick: bool) -> Iterator[Trial]:
    """The edits of one model."""
    found = ffns(model)
    yield Trial("width", Magnitude(width=0.5), without_neurons)
    stacks = list(dict.fromkeys(ffn.stack for ffn in found))
    if len(stacks) > 1 and not quick:
        yield Trial(f"stack {stacks[-1]}", Magnitude(width=0.5, layers=f"{stacks[-1]}:all"), without_neurons)
    if attentions(model) and not quick:
        yield Trial("heads", fk.RemoveHeads(remove=0.5), without_heads)
    lists: dict[str, dict[str, Any]] = {}
    for ffn in found:
        block = block_name(ffn.name)
        if block:
            lists.setdefault(block.rpartition(".")[0], {}).setdefault(block, ffn)
    for blocks in lists.values():
        if len(blocks) < 2:
            continue
        for block in [list(blocks)[1]] if quick else dict.fromkeys((list(blocks)[1], list(blocks)[-1])):
            ffn = blocks[block]
            layers = f"{ffn.stack}:{ffn.layer}" if ffn.stack else str(ffn.layer)
            yield Trial(f"drop {block}", LayerDrop(layers=layers), without_layers)


def without_neurons(model: nn.Module, plan: fk.Plan) -> list[Any] | None:
    found = {ffn.name: ffn for ffn in ffns(model)}
    if any(found[edit.target].layout.experts for edit in plan.edits):
        return None
    handles = []
    for edit in plan.edits:
        ffn: Any = found[edit.target]
        mask = torch.zeros(ffn.width).index_fill_(0, edit.tensors()["index"].long(), 1.0)
        handles += [linear.register_forward_pre_hook(_masking(mask)) for linear in ffn.linears("down")]
    return handles


def without_heads(model: nn.Module, plan: fk.Plan) -> list[Any]:
    found = {attention.name: attention for attention in attentions(model)}
    handles = []
    for edit in plan.edits:
        attention = found[edit.target]
        stay = attention.columns()[attention.members(edit.tensors()["index"])["q"]].flatten()
        mask = torch.zeros(attention.heads * attention.head_dim).index_fill_(0, stay, 1.0)
        handles.append(attention.linear("o").register_forward_pre_hook(_masking(mask)))
    return handles


def without_layers(model: nn.Module, plan: fk.Plan) -> list[Any]:
    def passed_by(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        return entered if isinstance(output, torch.Tensor) else type(output)((entered, *output[1:]))

    layers = [edit.settings()["layer"] for edit in plan.edits]
    return [model.get_submodule(layer).register_forward_hook(passed_by, with_kwargs=True) for layer in layers]


def _masking(mask: torch.Tensor) -> Callable[..., Any]:
    return lambda _, args: (args[0] * mask, *args[1:])


# --- one architecture -------------------------------------------------------------------------------------------------


def check(name: str, quick: bool = False) -> list[Row]:
    """The rows of one model type; one "not compared" where it is not built, has no FFN, or does not run."""
    try:
        model = build(name)
        if not (found := ffns(model)):
            return []
    except FfnkitError as error:
        return [Row(name, "", "no FFNs", _line(error))]
    except Exception as error:
        return [Row(name, "", "not built", _line(error))]
    batch = probe.runnable(model)
    if batch is None:
        return [Row(name, f"{len(found)} FFNs", "not compared", "it does not run on the inputs that can be made up")]
    if running.difference(running.outputs(model, batch), running.outputs(model, batch)) != 0:
        return [Row(name, f"{len(found)} FFNs", "not compared", "it gives something else each time")]
    if lost := _lost(model):
        return [
            Row(name, f"{len(found)} FFNs", "not compared", f"transformers saves it and does not find {lost} again")
        ]
    return [Row(name, trial.name, *_try(model, trial, batch)) for trial in trials(model, quick)]


def _lost(model: Any) -> str:
    """A tensor that transformers itself loses when it saves the unedited model and opens it; "" where none."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            _, told = type(model).from_pretrained(folder, output_loading_info=True)
        except Exception as error:
            return _line(error)
    return min(told["missing_keys"], default="")


def _try(model: Any, trial: Trial, batch: dict[str, Any]) -> tuple[str, str]:
    edited = copy.deepcopy(model)
    try:
        plan = fk.plan(edited, trial.method)
    except FfnkitError as error:
        return "refused", _line(error)
    except Exception as error:
        return "WRONG", f"planning: {_line(error)}"
    step = "hooks"
    try:
        handles = trial.silence(edited, plan)
        wanted = None if handles is None else running.outputs(edited, batch)
        for handle in handles or ():
            handle.remove()
        step = "the edited model"
        given = running.outputs(fk.apply(edited, plan), batch)
        found = {} if wanted is None else {step: running.difference(wanted, given)}
        with tempfile.TemporaryDirectory() as folder:
            step = "saved and opened by ffnkit"
            fk.save(edited, f"{folder}/compact")
            found[step] = running.difference(given, running.outputs(fk.load(f"{folder}/compact"), batch))
            step = "exported and opened by transformers"
            fk.export(edited, f"{folder}/standard")
            found[step] = running.difference(
                given, running.outputs(type(model).from_pretrained(f"{folder}/standard"), batch)
            )
    except Exception as error:
        return "WRONG", f"{step}: {type(error).__name__} {_line(error)}"
    wrong = [f"{step} differs by {off:.2g}" for step, off in found.items() if not off <= EQUAL]
    return ("WRONG", "; ".join(wrong)) if wrong else ("equal", f"to {max(found.values()):.0e}")


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; none: all of them")
    parser.add_argument("--quick", action="store_true", help="widths and one layer of each stack only")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began, counts, compared, kinds = time.time(), Counter[str](), set[str](), dict[str, Counter[str]]()
    for name in given.names or CONFIG_MAPPING_NAMES:
        for row in check(name, given.quick):
            counts[row.outcome] += 1
            if row.outcome in ("equal", "WRONG", "refused"):
                compared.add(name)
                kinds.setdefault(row.edit.split()[0], Counter())[row.outcome] += 1
            if row.outcome != "not built" or given.names:
                print(row, flush=True)
    print(f"\n{len(compared)} architectures compared in {time.time() - began:.0f} s: {dict(counts)}")
    for edit, found in kinds.items():
        print(f"  {edit:<8} {dict(found)}")
    return 1 if counts["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
