"""The ways in which families write attention, and where the rows of each head lie in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ffnkit._registry import added, not_of

Role = Literal["q", "k", "v"]
ROLES: tuple[Role, ...] = ("q", "k", "v")
Order = Literal["stacked", "interleaved", "grouped", "blocks"]
BLOCKS = 4  # CodeGen lays its heads in so many blocks, each with query, value and key


@dataclass(frozen=True)
class AttentionLayout:
    """One way in which model families write attention: dotted paths from the module that owns its linears.

    Attributes:
        name: what the row is called in ``inspect``.
        q, k, v, o: the linears of query, key, value and output; one path several times where one linear holds them.
        order: of a linear that holds several: one after the other ("stacked"), for each head query, key and value
            ("interleaved"), for each group of heads its queries, key and value ("grouped"), or CodeGen's "blocks".
        inner: the module that computes and remembers the counts; "" where the owner does.
        where: the row holds where the inner module has these attributes with these values.
        follow: further linears and parameters whose rows go with a role's: (path, role).
        per_head: parameters with one entry a head: (path, axis).
        reads: whether the family's forward reads the counts of its config.
    """

    name: str
    q: str
    k: str
    v: str
    o: str
    order: Order = "stacked"
    inner: str = ""
    where: tuple[tuple[str, bool], ...] = ()
    follow: tuple[tuple[str, Role], ...] = ()
    per_head: tuple[tuple[str, int], ...] = ()
    reads: bool = False

    @cached_property
    def roots(self) -> frozenset[str]:
        """Where the paths of its linears begin: an owner has children of these names."""
        return frozenset(path.partition(".")[0] for path in (self.q, self.k, self.v, self.o))

    def path(self, role: Role) -> str:
        """The linear that holds a role."""
        return str(getattr(self, role))


def _fused(name: str, qkv: str, o: str, order: Order = "stacked", **more: Any) -> AttentionLayout:
    return AttentionLayout(name, qkv, qkv, qkv, o, order=order, **more)


# The first row that fits is taken.
ATTENTION_LAYOUTS: list[AttentionLayout] = [
    AttentionLayout("LLaMA", "q_proj", "k_proj", "v_proj", "o_proj", per_head=(("sinks", 0),)),  # Qwen, Gemma, ViT
    AttentionLayout("BART", "q_proj", "k_proj", "v_proj", "out_proj"),  # Marian, Whisper, CLIP, OPT, GPT-J, GPT-Neo
    AttentionLayout("Phi", "q_proj", "k_proj", "v_proj", "dense"),
    AttentionLayout("BERT", "self.query", "self.key", "self.value", "output.dense", inner="self"),
    AttentionLayout(
        "DeBERTa-v2", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense", inner="self",
        follow=(("self.pos_key_proj", "k"), ("self.pos_query_proj", "q")),
    ),
    _fused(
        "DeBERTa", "self.in_proj", "output.dense", "interleaved", inner="self",
        follow=(("self.pos_proj", "k"), ("self.pos_q_proj", "q"), ("self.q_bias", "q"), ("self.v_bias", "v")),
    ),
    AttentionLayout("ALBERT", "query", "key", "value", "dense"),
    AttentionLayout("DistilBERT", "q_lin", "k_lin", "v_lin", "out_lin"),
    AttentionLayout("T5", "q", "k", "v", "o", per_head=(("relative_attention_bias.weight", 1),)),  # also MPNet
    _fused("ModernBERT", "Wqkv", "Wo"),
    _fused("MPT", "Wqkv", "out_proj"),
    _fused("Phi-3", "qkv_proj", "o_proj", reads=True),
    _fused("CodeGen", "qkv_proj", "out_proj", "blocks"),
    AttentionLayout("GPT-2 cross", "q_attn", "c_attn", "c_attn", "c_proj"),
    _fused("GPT-BigCode", "c_attn", "c_proj", "interleaved", where=(("multi_query", False),)),
    _fused("GPT-2", "c_attn", "c_proj"),  # Conv1D; also GPT-BigCode with one key and value for all heads
    _fused("Falcon new", "query_key_value", "dense", "grouped", where=(("new_decoder_architecture", True),)),
    _fused("Falcon", "query_key_value", "dense", where=(("multi_query", True),)),
    _fused("GPT-NeoX", "query_key_value", "dense", "interleaved"),  # also BLOOM
]  # fmt: skip


def _wrong(row: object) -> str:
    return not_of(row, AttentionLayout)


def attention_layouts() -> list[AttentionLayout]:
    """The rows in the order in which they are tried; other packages' (``ffnkit.attentions``) come last."""
    return [*ATTENTION_LAYOUTS, *(row for _, row in added("ffnkit.attentions", _wrong))]


def places(order: Order, sharing: tuple[Role, ...], counts: dict[Role, int], head_dim: int) -> dict[Role, Tensor]:
    """(heads, head_dim) int64 by role: the rows of a linear that holds these roles which belong to each head."""
    columns = torch.arange(head_dim)
    first: dict[Role, Tensor] = {}
    if len(sharing) == 1 or order == "stacked":
        start = 0
        for role in sharing:
            first[role] = start + torch.arange(counts[role]) * head_dim
            start += counts[role] * head_dim
    elif order == "interleaved":
        for number, role in enumerate(sharing):
            first[role] = (torch.arange(counts[role]) * len(sharing) + number) * head_dim
    elif order == "grouped":
        size = counts["q"] // counts["k"]
        head, group = torch.arange(counts["q"]), torch.arange(counts["k"]) * (size + 2)
        first["q"] = (head // size * (size + 2) + head % size) * head_dim
        first["k"], first["v"] = (group + size) * head_dim, (group + size + 1) * head_dim
    else:
        size, head = counts["q"] // BLOCKS, torch.arange(counts["q"])
        order_inside: tuple[Role, ...] = ("q", "v", "k")
        for number, role in enumerate(order_inside):
            first[role] = ((head // size * 3 + number) * size + head % size) * head_dim
    return {role: start[:, None] + columns for role, start in first.items()}
