"""Which linears are attention and which are FFNs: one rule for all, and never both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import CLIP_TEXT, FAMILIES, IMAGE
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attention_linears, attentions
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.targets import targets
from ffnkit.model.trainable import parts_of

SAM = {
    "vision_config": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 40, "image_size": 16,
        "patch_size": 4, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1],
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 16, "patch_size": 4, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16, "mlp_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
    },
}  # fmt: skip
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 2}
GROUPVIT = {
    "text_config": CLIP_TEXT | {"intermediate_size": 24},
    "vision_config": IMAGE | {
        "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0], "intermediate_size": 40,
    },
}  # fmt: skip
LED = {
    "vocab_size": 99, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "attention_window": 4,
}  # fmt: skip
PERCEIVER = {
    "num_latents": 4, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 8,
}  # fmt: skip

LONGCAT = {
    "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50, "num_hidden_layers": 4, "num_layers": 2,
    "moe_topk": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 8, "n_routed_experts": 4, "zero_expert_num": 2,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip

# Families beside those of families.py: blocks and layers named after attention, and attention of no known row.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "sam": ("SamModel", SAM),
    "groupvit": ("GroupViTModel", GROUPVIT),
    "swin": ("SwinModel", SWIN),
    "swinv2": ("Swinv2Model", SWIN),
    "led": ("LEDModel", LED),
    "perceiver": ("PerceiverModel", PERCEIVER),
    "longcat": ("LongcatFlashModel", LONGCAT),  # no class of it is named attention
}
# How many of them each has.
COUNTS = {
    "sam": 2 * 2 + (2 * 3 + 1) * 4,
    "swin": 2 * 4,
    "swinv2": 2 * 6,
    "led": 7 + 2 * 4,
    "perceiver": 2 * 4,
    "longcat": 2 * 2 * 5,
}


def empty(name: str) -> Any:
    """The model without weights."""
    kind, given = MORE[name] if name in MORE else (FAMILIES[name].model_class, None)
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        return model_class(model_class.config_class(**given) if given is not None else FAMILIES[name].config())


def of_ffns(model: nn.Module) -> set[str]:
    """Every path of an FFN's linear."""
    found = [ffn for ffn in ffns(model) if not ffn.layout.experts] if has_ffns(model) else []
    return {f"{owner}.{ffn.path(site)}".strip(".") for ffn in found for owner in ffn.owners for site in ffn.sites}


def named_after_it(model: nn.Module) -> set[str]:
    """Linears below modules whose class is named after attention, whatever else these hold."""
    owners = tuple(f"{n}." for n, m in model.named_modules() if "attention" in type(m).__name__.lower())
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(owners)}


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_no_linear_is_both(name: str) -> None:
    model = empty(name)
    found = attention_linears(model)
    assert found == [n for n in dict(model.named_modules()) if n in set(found)], "in the order of the modules"
    assert found and not of_ffns(model) & set(found)
    roles = {f"{each.name}.{path}" for each in attentions(model) for path in (*each.paths(), each.layout.o)}
    assert roles <= set(found)
    assert len(found) == COUNTS.get(name, len(found))


@pytest.mark.parametrize("name", ["sam", "groupvit", "siglip"])
def test_a_name_alone_would_take_ffns_for_attention(name: str) -> None:
    model = empty(name)
    assert of_ffns(model) & named_after_it(model)  # the control


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "siglip", "sam", "groupvit"])
def test_all_that_name_attention_mean_the_same(name: str) -> None:
    model = empty(name)
    found = attention_linears(model)
    assert targets(model, "attention")[0] == found
    own = {id(p) for n in found for p in model.get_submodule(n).parameters()}
    assert {id(p) for p in parts_of(model, ["attention"])} == own
    assert targets(model, "all")[0] == [*targets(model, "ffn")[0], *found]


def test_pruning_attention_leaves_ffns_alone() -> None:
    model: Any = FAMILIES["siglip"].model()
    plan = fk.plan(model, fk.Prune(sparsity=0.5, targets="attention"))
    assert {edit.target for edit in plan.edits} <= set(attention_linears(model))
    with pytest.raises(FfnkitError, match="no linear"):
        targets(nn.Sequential(nn.Linear(3, 4)), "attention")
