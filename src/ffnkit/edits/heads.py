"""Attention heads that go, with their rows of query, key and value and their columns of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ffnkit.edits.base import Edit, Own, Quantities, Stage, Writer, notes
from ffnkit.edits.fields import Count, Places, Size
from ffnkit.edits.slicing import slice_linears, slice_parameter
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import Attention
from ffnkit.model.families.attentions import ROLES, Role, places
from ffnkit.model.families.keys import (
    GROUPS_ATTRIBUTE,
    HEADS_ATTRIBUTES,
    INNER_WIDTH_ATTRIBUTES,
    KV_HEADS_ATTRIBUTES,
    KV_WIDTH_ATTRIBUTE,
)
from ffnkit.model.generation_numbers import set_numbers
from ffnkit.model.linear import stored_weight
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.masked import Masked
from ffnkit.nn.pruned_attention import KeptHeads, prune_attention
from ffnkit.nn.reparametrized import ReparametrizedLinear


@dataclass(frozen=True, eq=False)
class SelectHeads(Edit):
    """Attention heads go, with their rows of query, key and value and their columns of the output.

    Attributes:
        target: the attention's name. index: int32 numbers, ascending, of the units that stay: heads, or groups of
            heads that share a key and a value.
        heads, units: how many there are before. parameters: those that go.
        silent: what stays gives zeros: the attention is left out, and a module that its family knows stands there.
    """

    index: Places
    heads: Size
    units: Size
    parameters: Count
    silent: bool = False

    kind: ClassVar[str] = "SelectHeads"
    formerly: ClassVar[tuple[str, ...]] = ("Heads",)
    stage: ClassVar[Stage] = Stage.HEADS
    reshapes: ClassVar[bool] = False

    @classmethod
    def blank(cls, attention: Attention, row: dict[str, Any]) -> SelectHeads:
        """The structure that a config describes: {"heads", "kv", "of"}, the numbers of those that stay, and counts."""
        if [attention.heads, attention.kv_heads] != row["of"]:
            what = f"{attention.name} has {attention.heads} heads, the checkpoint was made of {row['of'][0]}"
            raise FfnkitError("opening a compact checkpoint", what, "Leave the config as it was saved")
        stay = row["kv"] if attention.kv_heads == attention.units else row["heads"]
        index = torch.tensor(stay, dtype=torch.int32, device="cpu")
        return cls(attention.name, index, heads=attention.heads, units=attention.units, parameters=0)

    @property
    def asked(self) -> str:
        return f"removing heads of {self.target}"

    @property
    def saved_elsewhere(self) -> int:
        return self.parameters

    @property
    def left(self) -> int:
        """Heads that stay."""
        return len(self.index) * self.heads // self.units

    @classmethod
    def lines(cls: type[Own], edits: Sequence[Own], quantities: Quantities) -> list[str]:
        found = cast(Sequence[SelectHeads], edits)
        width = max((len(edit.target) for edit in found), default=0)
        lines = []
        for edit in found:
            units = f" ({edit.units} -> {len(edit.index)} groups)" if edit.units != edit.heads else ""
            zeros = " of zeros" if edit.silent else ""
            lines.append(
                f"  {edit.target:<{width}}  {edit.heads} heads  ->  {edit.left}{units}{zeros},"
                f" {edit.parameters:,} parameters fewer{notes(quantities, edit.target)}"
            )
        return lines

    def check_fields(self) -> str:
        if self.index.ndim != 1 or self.heads % self.units:
            return "the heads do not come in so many units"
        return ""

    # --- what it does

    def check(self, writer: Writer) -> None:
        asked = self.asked
        attention = writer.attention(self.target)
        check_separable(attention)
        if (attention.heads, attention.units) != (self.heads, self.units):
            here = f"it has {attention.heads} heads in {attention.units} units"
            what = f"{here}, where the plan was made for {self.heads} in {self.units}"
            raise FfnkitError(asked, what, "Make the plan for this model")
        self._check_index(attention, asked)
        own = list(attention.module.modules())
        for linear in _linears(attention).values():
            writer.check_untied(stored_weight(linear), own, asked)

    def _check_index(self, attention: Attention, asked: str) -> None:
        kept = self.index.tolist()
        if not kept:
            raise FfnkitError(asked, "none is left", "Keep at least one head, or drop the layer")
        if kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < attention.units:
            raise FfnkitError(asked, f"{kept} are no places among {attention.units}", "Name those that stay, in order")
        if len(attention.members(self.index)["q"]) % attention.multiple:
            what = f"{len(kept)} would be left, and its heads lie in {attention.multiple} equal blocks"
            raise FfnkitError(asked, what, f"Keep a multiple of {attention.multiple}")

    def perform(self, writer: Writer) -> None:
        with torch.device("cpu"):  # models are built on the meta device: places are real all the same
            attention = writer.attention(self.target)
            self._check_index(attention, self.asked)
            keep_heads(writer, attention, attention.members(self.index))
            if self.silent:
                output = attention.linear("o")
                writer.put(stored_weight(output), torch.zeros_like(stored_weight(output)), [output])

    def silenced(self, writer: Writer) -> list[Any]:
        """The other heads, and all where the attention is left out, hand zeros to the output linear."""
        attention = writer.attention(self.target)
        heads = attention.members(self.index)["q"][: 0 if self.silent else None]
        stay = attention.columns()[heads].flatten()

        def zeroed(_: nn.Module, args: tuple[Any, ...]) -> Any:
            mask = torch.zeros(args[0].shape[-1], dtype=args[0].dtype).index_fill_(0, stay, 1.0)
            return (args[0] * mask.to(args[0].device), *args[1:])

        return [attention.linear("o").register_forward_pre_hook(zeroed)]


def check_separable(attention: Attention) -> None:
    """Raises FfnkitError where no head of this attention can go alone."""
    asked = f"removing heads of {attention.name}"
    if attention.why:
        raise FfnkitError(asked, attention.why, "Leave its layer out, or use a model of another family")
    for role, linear in _linears(attention).items():
        weight = stored_weight(linear)
        if isinstance(linear, ReparametrizedLinear) and not isinstance(linear, AdapterLayer | Masked):
            raise FfnkitError(asked, f"its {role} is edited already ({linear.kind})", "Fold the model first")
        if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
            do = "Remove heads in float, save, and load that with quantization_config"
            raise FfnkitError(asked, f"its {role} is quantized ({type(weight).__name__} {weight.dtype})", do)


def _linears(attention: Attention) -> dict[str, Any]:
    """All that lose rows or columns with the heads, by role or path."""
    following = {path: what for path, what, _ in attention.following() if isinstance(what, nn.Module)}
    return {role: attention.linear(role) for role in (*ROLES, "o")} | following


@torch.no_grad()
def keep_heads(writer: Writer, attention: Attention, stay: dict[Role, Tensor]) -> None:
    """Keep these heads of each role; the counts that the modules remember follow.

    Args:
        stay: numbers of the heads of query, key and value that stay.
    """
    width, before, record = attention.head_dim, attention.counts, attention.kept
    incoming, following = attention.incoming, list(attention.following())
    rows = {path: kept_rows(attention, roles, stay) for path, roles in attention.paths().items()}
    columns = attention.columns()[stay["q"]].flatten()
    for path, index in rows.items():
        slice_linears(writer, [attention.module.get_submodule(path)], rows=index)
    slice_linears(writer, [attention.linear("o")], columns=columns)
    for name, what, role in following:
        each = 1 if role is None else width
        index = (stay[role or "q"][:, None] * each + torch.arange(each)).flatten()
        if isinstance(what, nn.Module):
            slice_linears(writer, [what], rows=index)
            continue
        holder = attention.module.get_submodule(name.rpartition(".")[0])
        new = slice_parameter(writer, what, index, attention.axis(name), [holder])
        if isinstance(holder, nn.Embedding):
            holder.embedding_dim = new.shape[1]
    now = {role: len(stay[role]) for role in ROLES}
    for module in dict.fromkeys((attention.module, attention.inner)):
        _remember(module, before, now, width)
    if attention.cross:
        kept = stay["q"].tolist()
        set_numbers(
            writer.model,
            lambda n, head: (n, head) if n != attention.layer else (n, kept.index(head)) if head in kept else None,
        )
    old = record or KeptHeads(tuple(range(before["q"])), tuple(range(before["k"])), (before["q"], before["k"]))
    heads = tuple(old.heads[i] for i in stay["q"].tolist())
    kv = tuple(old.kv[i] for i in stay["k"].tolist())
    prune_attention(attention.inner, KeptHeads(heads, kv, old.of), incoming, attention.layout.reads)


def kept_rows(attention: Attention, roles: tuple[Role, ...], stay: dict[Role, Tensor]) -> Tensor:
    """The rows of a linear that holds these roles which stay, in the order that the fewer heads want."""
    now = {role: len(stay[role]) for role in ROLES}
    order, width = attention.layout.order, attention.head_dim
    old = places(order, roles, attention.counts, width)
    new = places(order, roles, now, width)
    rows = torch.empty(sum(now[role] for role in roles) * width, dtype=torch.long)
    for role in roles:
        rows[new[role]] = old[role][stay[role]]
    return rows


def _remember(module: nn.Module, before: dict[Role, int], now: dict[Role, int], width: int) -> None:
    """Counts and widths that a module computes with."""
    own = {name: value for name, value in vars(module).items() if type(value) is int}
    for name in own:
        if name in HEADS_ATTRIBUTES:
            setattr(module, name, now["q"])
        elif name in KV_HEADS_ATTRIBUTES:
            setattr(module, name, now["k"])
        elif name in INNER_WIDTH_ATTRIBUTES and own[name] == before["q"] * width:
            setattr(module, name, now["q"] * width)
        elif name == KV_WIDTH_ATTRIBUTE:
            setattr(module, name, now["k"] * width)
        elif name == GROUPS_ATTRIBUTE:
            setattr(module, name, now["q"] // now["k"])
