"""A LLaMA-shaped model whose FFNs differ in width by layer, for plain transformers with ``trust_remote_code=True``.

It travels with the checkpoint and needs transformers alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_decilm import DeciLMConfig, width_of


class NoFfn(nn.Module):
    """In the place of an FFN that is left out."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class DeciLMForCausalLM(LlamaForCausalLM):
    """``LlamaForCausalLM`` with FFNs as ``config.block_configs`` says."""

    config_class = DeciLMConfig

    def __init__(self, config: Any) -> None:
        narrow = copy.copy(config)
        narrow.intermediate_size = 1
        super().__init__(narrow)
        self.config = self.model.config = config
        for layer, row in zip(self.model.layers, config.block_configs, strict=True):
            width = width_of(row["ffn"], config.hidden_size)
            own = copy.copy(config)
            own.intermediate_size = width
            layer.mlp = LlamaMLP(own) if width else NoFfn()
            if not width:
                layer.post_attention_layernorm = nn.Identity()
            if getattr(config, "qkv_bias", False):
                for name in ("q_proj", "k_proj", "v_proj"):
                    plain = getattr(layer.self_attn, name)
                    setattr(layer.self_attn, name, nn.Linear(plain.in_features, plain.out_features, bias=True))
        self.post_init()
