"""The names under which families keep numbers: keys of configs and attributes of modules.

One table for all families: a name says the same wherever it stands, and a value confirms it.
"""

from __future__ import annotations

import re

# --- keys of configs; of several, the first whose value is that of the model counts

# Hidden neurons of an FFN.
WIDTH_KEYS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "n_inner",
    "d_ff",
    "ffn_dim",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
# These come first for FFNs with such a part in their path.
WIDTH_KEYS_OF_PARTS = {
    "shared_expert": "shared_expert_intermediate_size",
    "experts": "moe_intermediate_size",
    "encoder": "encoder_ffn_dim",
    "decoder": "decoder_ffn_dim",
}
# None there means that the family computes the width.
OPTIONAL_WIDTH_KEYS = ("n_inner",)

# Layers of a stack.
DEPTH_KEYS = (
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
)

# Lists that no layer has a part in, however long they are.
SPECIAL_TOKEN = re.compile(r"token|label")
# Hidden states of a part of the model, by number; the input of its first layer is number 0.
HIDDEN_STATE_KEYS = ("vision_feature_layer", "vision_feature_layers", "vision_select_layer", "feature_layer")

# Experts that a token reaches.
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "num_selected_experts")

# --- attributes of modules; kept true when what they count changes

# Hidden neurons, on the owner of an FFN.
WIDTH_ATTRIBUTES = (
    "intermediate_size",
    "intermediate_dim",
    "moe_intermediate_size",
    "expert_dim",
    "ffn_dim",
    "inner_dim",
)
# Query heads; heads of key and value; query heads for each of these.
HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEADS_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads", "kv_heads")
GROUPS_ATTRIBUTE = "num_key_value_groups"
# Width of one head; of all heads, where it is that; of all heads of key.
HEAD_DIM_ATTRIBUTES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
INNER_WIDTH_ATTRIBUTES = ("all_head_size", "inner_dim", "split_size", "embed_dim")
KV_WIDTH_ATTRIBUTE = "kv_dim"

# --- names of modules and arguments

# Arguments of attention that are computed once for all heads, and passed to every layer.
INCOMING = ("position_bias", "alibi")
# A router, and what stands beside it or holds it.
ROUTER = re.compile(r"router(_gate)?|gate")
EXPERTS = re.compile(r"experts?|moe", re.IGNORECASE)
