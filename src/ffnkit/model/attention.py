"""Where the attention of a model is, and which weights belong to which head: families as data.

A family is a row of ``ATTENTION_LAYOUTS``. Names find an attention; shapes have to confirm it, else it is listed with
the reason for which its heads cannot go alone (:attr:`Attention.why`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.model.families.attentions import BLOCKS, ROLES, AttentionLayout, Role, attention_layouts, places
from ffnkit.model.families.keys import HEAD_DIM_ATTRIBUTES, INCOMING
from ffnkit.model.families.rows import Rows
from ffnkit.model.finding import attention_layout, ffns, has_ffns, place, with_middle
from ffnkit.model.linear import descend, features, is_linear, linears, obstacle, own_weight, stored_weight, walk
from ffnkit.nn.pruned_attention import KeptHeads, kept_heads, plain_class

_NAMED = re.compile(r"att(ention|n)", re.IGNORECASE)  # of a class, or of what holds the module
_CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)
_AFTER = re.compile(r"(^|\.)(output\.)?(LayerNorm|layer_norm)\.")  # norms of what leaves the attention


@dataclass(eq=False)
class Attention:
    """One attention block of a model: its linears, and what of them belongs to which head.

    A *unit* is what can go alone: a head, or where several heads share a key and a value, all of that group. With one
    key and value for all heads a unit is a head again, and only its query goes.

    Attributes:
        name: the owner's path. module: the owner. layout: the row of ``ATTENTION_LAYOUTS`` that it matches.
        stack, layer: as of an FFN. twins: further paths of the very same module.
    """

    name: str
    module: nn.Module
    layout: AttentionLayout
    stack: str = ""
    layer: int = 0
    tied: list[str] = field(default_factory=list)

    @cached_property
    def why(self) -> str:
        """Why heads cannot go alone, "" where they can."""
        return _obstacle(self)

    # --- shape

    @property
    def inner(self) -> nn.Module:
        """The module that computes, and remembers the counts."""
        return self.module.get_submodule(self.layout.inner)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        values = (getattr(self.inner, name, None) for name in HEAD_DIM_ATTRIBUTES)
        return next((int(value) for value in values if isinstance(value, int)), 0)

    @property
    def heads(self) -> int:
        """Query heads."""
        return features(self.linear("o"))[1] // max(self.head_dim, 1)

    @property
    def kv_heads(self) -> int:
        """Heads of key and value."""
        rows = features(self.linear("v"))[0] // max(self.head_dim, 1)
        sharing = [role for role in ROLES if self.layout.path(role) == self.layout.v]
        return (rows - self.heads) // 2 if "q" in sharing else rows // len(sharing)

    @property
    def units(self) -> int:
        """What can go alone."""
        return self.kv_heads if self.kv_heads > 1 else self.heads

    @property
    def multiple(self) -> int:
        """The number of heads that stay has to be a multiple of this."""
        return BLOCKS if self.layout.order == "blocks" else 1

    @property
    def cross(self) -> bool:
        """Whether keys and values come from another stack."""
        return bool(_CROSS.search(self.name))

    @property
    def kept(self) -> KeptHeads | None:
        """Which heads stayed, where some were removed since the config said how many there are."""
        return kept_heads(self.inner)

    @property
    def incoming(self) -> str:
        """The argument with one entry a head that all layers get alike ("position_bias", "alibi"), or ""."""
        if getattr(getattr(self.inner, "config", None), "alibi", None) is False:
            return ""
        accepted = inspect.signature(plain_class(self.inner).forward).parameters
        return next((name for name in INCOMING if name in accepted), "")

    @property
    def num_parameters(self) -> int:
        """Numbers in the linears and in what goes with their heads."""
        each = {id(m): m for m in (self.linear(role) for role in (*ROLES, "o"))}
        own = [p for m in each.values() for p in _weights(m)]
        return sum(p.numel() for p in [*own, *(p for _, what, _ in self.following() for p in _weights(what))])

    @property
    def unit_parameters(self) -> int:
        """Numbers that go with one unit."""
        out, inner = features(self.linear("o"))
        count = out * inner * (self.heads // self.units) // self.heads
        counts = self.counts
        for role in ROLES:
            linear = self.linear(role)
            shared = counts[role] < self.units  # one key and value for all: they stay
            row = features(linear)[1] + (getattr(linear, "bias", None) is not None)
            count += 0 if shared else row * self.head_dim * counts[role] // self.units
        for _, what, follows in self.following():
            shared = follows is not None and counts[follows] < self.units
            count += 0 if shared else sum(p.numel() for p in _weights(what)) // self.units
        return count

    # --- parts

    def linear(self, role: str) -> Any:
        """The linear of "q", "k", "v" or "o"."""
        return self.module.get_submodule(getattr(self.layout, role))

    def paths(self) -> dict[str, tuple[Role, ...]]:
        """The linears of query, key and value by path, each with the roles that it holds."""
        return {
            self.layout.path(role): tuple(r for r in ROLES if self.layout.path(r) == self.layout.path(role))
            for role in ROLES
        }

    def following(self) -> Iterator[tuple[str, nn.Module | nn.Parameter, Role | None]]:
        """(path, what, role) of what goes with heads beside the four: linears whatever stands in their places (masks,
        updates), and bare parameters; role None has one entry a head."""
        own = dict(self.module.named_parameters())
        for path, role in self.layout.follow:
            module = descend(self.module, path)
            if module is not None and is_linear(module):
                yield path, module, role
                continue
            for name in (path, f"{path}.weight", f"{path}.bias"):
                if name in own:
                    yield name, own[name], role
        for name, _ in self.layout.per_head if not self.incoming else ():
            if name in own:
                yield name, own[name], None

    @property
    def counts(self) -> dict[Role, int]:
        return {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}

    def rows(self, role: Role, counts: dict[Role, int] | None = None) -> Tensor:
        """(heads of the role, head_dim) int64: the rows of its linear that belong to each head.

        Args:
            counts: heads by role, where they are others than the present ones.
        """
        sharing = self.paths()[self.layout.path(role)]
        return places(self.layout.order, sharing, counts or self.counts, self.head_dim)[role]

    def axis(self, name: str) -> int:
        """Along which axis of a parameter of :meth:`following` heads lie."""
        return dict(self.layout.per_head).get(name, 0)

    def columns(self) -> Tensor:
        """(heads, head_dim) int64: the columns of o that belong to each head."""
        return torch.arange(self.heads * self.head_dim).view(self.heads, self.head_dim)

    def members(self, units: Tensor) -> dict[Role, Tensor]:
        """The heads of each role that belong to these units, in order."""
        size = self.heads // self.units
        queries = (units.long()[:, None] * size + torch.arange(size)).flatten()
        keys = units.long() if self.kv_heads == self.units else torch.arange(self.kv_heads)
        return {"q": queries, "k": keys, "v": keys}

    def matrix(self, role: Role, read: Callable[[Any], Tensor] | None = None) -> Tensor:
        """(heads of the role, head_dim, in): a role's weights by head.

        Args:
            read: what is read of a linear, (out, in); None reads its frozen or plain weight.
        """
        weight = (read or own_weight)(self.linear(role))
        return weight[self.rows(role).to(weight.device)]


# --- finding ------------------------------------------------------------------------------------------------------


def attentions(model: nn.Module) -> list[Attention]:
    """Every attention block of a known layout in the order of the modules; one that several layers share is one."""
    found: dict[int, Attention] = {}
    rows = Rows(attention_layouts())
    for name, module in walk(model):
        if id(module) in found:
            found[id(module)].tied.append(name)
        elif (layout := attention_layout(module, rows)) is not None:
            found[id(module)] = Attention(name, module, layout)
    every = list(found.values())
    if every:
        place(every, model)
    return every


def find(model: nn.Module, name: str) -> Attention:
    """The attention of that name. Raises FfnkitError where there is none."""
    found = {attention.name: attention for attention in attentions(model)}
    if name not in found:
        what = f"{type(model).__name__} has {', '.join(list(found)[:3]) or 'none that is known'} ..."
        raise FfnkitError(f"the attention {name}", what, "Name one of them (ffnkit inspect)")
    return found[name]


def attention_modules(model: nn.Module) -> list[str]:
    """The modules that are attention, by name: those of a known row, and those named after it that hold none of them.

    A block that holds a known attention and more (SAM's two-way blocks, with an FFN) is none, whatever its name.
    """
    known = [name for each in attentions(model) for name in (each.name, *each.tied)]
    inside = tuple(f"{name}." for name in known)
    named = [n for n, m in model.named_modules() if _NAMED.search(f"{type(m).__name__} {n.rpartition('.')[2]}")]
    outer = [name for name in named if not any(each.startswith(f"{name}.") for each in known)]
    return known + [name for name in outer if name not in known and not name.startswith(inside)]


def attention_linears(model: nn.Module) -> list[str]:
    """The linears of attention by name, in the order of the modules; a linear of an FFN is never one."""
    owners = tuple(f"{name}." if name else "" for name in attention_modules(model))
    taken = _ffn_linears(model)
    return [name for name, linear in linears(model) if name.startswith(owners) and id(linear) not in taken]


def _ffn_linears(model: nn.Module) -> set[int]:
    """ids of the linears of FFNs, of those too that ffnkit does not edit for what stands in between."""
    found = ffns(model) if has_ffns(model) else []
    taken = {
        id(linear) for ffn in found if not ffn.layout.experts for site in ffn.sites for linear in ffn.linears(site)
    }
    paths = [(m, path) for _, m, row in with_middle(model) for path in (row.up, row.gate or row.up, row.down)]
    return taken | {id(descend(module, path)) for module, path in paths}


def _obstacle(attention: Attention) -> str:
    """Why heads of this attention cannot go alone, "" where they can."""
    if not attention.head_dim:
        return "the width of a head is not known"
    follows = {path: what for path, what, _ in attention.following() if isinstance(what, nn.Module)}
    for role, linear in ({role: attention.linear(role) for role in (*ROLES, "o")} | follows).items():
        if (found := obstacle(linear)) is not None:
            return f"its {role} {found[0]}"
    shapes = {role: features(attention.linear(role)) for role in (*ROLES, "o")}
    heads, kv_heads, width = attention.heads, attention.kv_heads, attention.head_dim
    expected = {
        path: width * sum(attention.counts[role] for role in roles) for path, roles in attention.paths().items()
    }
    fits = all(shapes[role][0] == expected[attention.layout.path(role)] for role in ROLES)
    if not fits or shapes["o"][1] != heads * width or kv_heads < 1 or heads % kv_heads:
        return f"its linears are not of whole heads of width {width}"
    if attention.layout.order == "interleaved" and heads != kv_heads:
        return "its fused linear is of an order that is not known"
    if attention.layout.order == "blocks" and heads % BLOCKS:
        return f"its heads do not lie in {BLOCKS} blocks"
    if getattr(getattr(attention.inner, "config", None), "alibi", False):
        return "its mask holds slopes by the number of the head (ALiBi)"
    if attention.incoming and hasattr(attention.inner, "block_len"):
        return "its position biases are laid in blocks of tokens"
    known = {path for path, _ in attention.layout.follow} | {path for path, _ in attention.layout.per_head}
    known |= {getattr(attention.layout, role) for role in (*ROLES, "o")}
    for name, parameter in attention.module.named_parameters():
        if name in known or name.rpartition(".")[0] in known or _AFTER.search(f"{name.rpartition('.')[0]}."):
            continue
        if tuple(parameter.shape) != (width,) or any(part.isdigit() for part in name.split(".")):
            return f"{name} works on all heads together"
    return ""


def _weights(linear: Any) -> list[Tensor]:
    """Weight and bias of a linear; of a parameter, itself."""
    if isinstance(linear, Tensor):
        return [linear]
    own = [stored_weight(linear), getattr(linear, "bias", None)]
    return [value for value in own if value is not None]
