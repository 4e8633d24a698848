"""The config of a LLaMA-shaped model whose FFNs differ in width by layer, in the form of NVIDIA's Nemotron-NAS models.

It travels with the checkpoint and needs transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Row(dict):
    """A row of ``block_configs``: engines read attributes, config.json wants a dict."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """As ``LlamaConfig``, with ``block_configs``: {"attention": {...}, "ffn": {...}} for each layer.

    An FFN's width is its ``intermediate_size``, or follows from its ``ffn_mult``; with ``no_op`` there is none.
    ``qkv_bias``: the projections of queries, keys and values have biases, that of the output has none.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, qkv_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        rows = block_configs or []
        self.block_configs = [Row({part: Row(values) for part, values in row.items()}) for row in rows]
        if qkv_bias:  # where it is there at all, engines take its word over attention_bias
            self.qkv_bias = True


def width_of(ffn: dict[str, Any], hidden_size: int) -> int:
    """The neurons of an FFN, 0 for none; ``ffn_mult`` is rounded up to a multiple of 256 as the engines do."""
    if ffn.get("no_op"):
        return 0
    if ffn.get("intermediate_size") is not None:
        return int(ffn["intermediate_size"])
    return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256
