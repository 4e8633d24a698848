"""Attention heads taken out of a model, and put back as zeros."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnkit.edits.kinds import Heads
from ffnkit.errors import FfnkitError
from ffnkit.model import parts
from ffnkit.model.attention import ROLES, Attention, Role, attentions, places
from ffnkit.model.linear import is_transposed
from ffnkit.nn.adapted import Adapted
from ffnkit.nn.masked import Masked
from ffnkit.nn.narrowed import Kept, narrow
from ffnkit.nn.special import Special, fit

# The names under which modules remember their heads; kept true when heads go.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim")  # where they are heads times width
_GROUPS = "num_key_value_groups"
_KV_WIDTH = "kv_dim"

# --- checking -----------------------------------------------------------------------------------------------------


def check(model: nn.Module, edits: Iterable[Heads]) -> None:
    """Raises FfnkitError where heads cannot go as the edits say; nothing is changed."""
    edits = list(edits)
    found = {attention.name: attention for attention in attentions(model)} if edits else {}
    twice = {edit.ffn for edit in edits if sum(other.ffn == edit.ffn for other in edits) > 1}
    for edit in edits:
        asked = f"removing heads of {edit.ffn}"
        attention = found.get(edit.ffn)
        if attention is None:
            found_ = f"{type(model).__name__} has no such attention"
            raise FfnkitError(asked, found_, "Make the plan for this model")
        if edit.ffn in twice:
            raise FfnkitError(asked, "the plan does so twice", "Apply one plan, then plan again")
        check_separable(attention)
        if (attention.heads, attention.units) != (edit.heads, edit.units):
            here = f"it has {attention.heads} heads in {attention.units} units"
            what = f"{here}, where the plan was made for {edit.heads} in {edit.units}"
            raise FfnkitError(asked, what, "Make the plan for this model")
        _check_index(attention, edit.index, asked)


def check_separable(attention: Attention) -> None:
    """Raises FfnkitError where no head of this attention can go alone."""
    asked = f"removing heads of {attention.name}"
    if attention.why:
        raise FfnkitError(asked, attention.why, "Leave its layer out, or use a model of another family")
    for role in (*ROLES, "o"):
        linear = attention.linear(role)
        weight = linear.base if isinstance(linear, Adapted) else linear.weight
        if isinstance(linear, Special) and not isinstance(linear, Adapted | Masked):
            raise FfnkitError(asked, f"its {role} is edited already ({linear.kind})", "Fold the model first")
        if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
            do = "Remove heads in float, save, and load that with quantization_config"
            raise FfnkitError(asked, f"its {role} is quantized ({type(weight).__name__} {weight.dtype})", do)


def _check_index(attention: Attention, index: Tensor, asked: str) -> None:
    kept = index.tolist()
    if not kept:
        raise FfnkitError(asked, "none is left", "Keep at least one head, or drop the layer")
    if kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < attention.units:
        raise FfnkitError(asked, f"{kept} are no places among {attention.units}", "Name those that stay, in order")
    if len(attention.members(index)["q"]) % attention.multiple:
        what = f"{len(kept)} would be left, and its heads lie in {attention.multiple} equal blocks"
        raise FfnkitError(asked, what, f"Keep a multiple of {attention.multiple}")


# --- removing -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def remove(model: nn.Module, attention: Attention, index: Tensor) -> None:
    """Keep these units (heads, or groups of them) of an attention, in place; outputs are as if the others gave zeros.

    Args:
        index: (units that stay,) numbers, ascending.
    """
    _check_index(attention, index, f"removing heads of {attention.name}")
    keep_heads(model, attention, attention.members(index))


@torch.no_grad()
def keep_heads(model: nn.Module, attention: Attention, stay: dict[Role, Tensor]) -> None:
    """Keep these heads of each role; the counts that the modules remember follow.

    Args:
        stay: numbers of the heads of query, key and value that stay.
    """
    width, before, record = attention.head_dim, attention._counts, attention.kept
    incoming, following = attention.incoming, list(attention.following())
    rows = {path: kept_rows(attention, roles, stay) for path, roles in attention.paths().items()}
    for path, index in rows.items():
        _cut(model, attention.module.get_submodule(path), rows=index)
    columns = attention.columns()[stay["q"]].flatten()
    _cut(model, attention.linear("o"), columns=columns)
    for name, _, role in following:
        axis, each = _axis(attention, name), 1 if role is None else width
        who = stay[role or "q"]
        places_ = (who[:, None] * each + torch.arange(each)).flatten()
        _replace(model, attention.module, name, places_, axis)
    now = {role: len(stay[role]) for role in ROLES}
    for module in dict.fromkeys((attention.module, attention.inner)):
        _remember(module, before, now, width)
    old = record or Kept(tuple(range(before["q"])), tuple(range(before["k"])), (before["q"], before["k"]))
    heads = tuple(old.heads[i] for i in stay["q"].tolist())
    kv = tuple(old.kv[i] for i in stay["k"].tolist())
    narrow(attention.inner, Kept(heads, kv, old.of), incoming, attention.layout.reads)


def kept_rows(attention: Attention, roles: tuple[Role, ...], stay: dict[Role, Tensor]) -> Tensor:
    """The rows of a linear that holds these roles which stay, in the order that the fewer heads want."""
    now = {role: len(stay[role]) for role in ROLES}
    order, width = attention.layout.order, attention.head_dim
    old = places(order, roles, attention._counts, width)
    new = places(order, roles, now, width)
    rows = torch.empty(sum(now[role] for role in roles) * width, dtype=torch.long)
    for role in roles:
        rows[new[role]] = old[role][stay[role]]
    return rows


def _axis(attention: Attention, name: str) -> int:
    return dict(attention.layout.per_head).get(name, 0)


def _cut(model: nn.Module, linear: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep rows and columns (of (out, in)) of a linear, in place."""
    weight = linear.base if isinstance(linear, Adapted) else linear.weight
    rows = None if rows is None else rows.to(weight.device)
    columns = None if columns is None else columns.to(weight.device)
    turned = linear.transposed if isinstance(linear, Adapted) else is_transposed(linear)
    axes = [(index, axis) for index, axis in ((rows, int(turned)), (columns, 1 - turned)) if index is not None]
    if isinstance(linear, Adapted):
        names = {id(p): name for name, p in model.named_parameters()}
        for index, axis in axes:
            parts.keep_noted(model, names[id(linear.base)], index, axis)
        if rows is not None and linear.bias is not None:
            parts.keep_noted(model, names[id(linear.bias)], rows, 0)
        linear.cut(rows=rows, columns=columns)
        return
    for index, axis in axes:
        _replace(model, linear, "weight", index, axis)
        if isinstance(linear, Masked):
            linear.mask = linear.mask.index_select(axis, index)
    if rows is not None and linear.bias is not None:
        _replace(model, linear, "bias", rows, 0)
    if not isinstance(linear, Special):
        fit(linear)


def _taken(old: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    """A parameter of some rows or columns, that trains where the old one does."""
    new = nn.Parameter(old.detach().index_select(axis, index.to(old.device)).contiguous(), old.requires_grad)
    if getattr(old, "_is_hf_initialized", False):
        new._is_hf_initialized = True  # type: ignore[attr-defined]
    return new


def _replace(model: nn.Module, owner: nn.Module, name: str, index: Tensor, axis: int) -> None:
    """Keep these places of an axis of a parameter, and of what is noted of it."""
    holder, _, last = name.rpartition(".")
    module = owner.get_submodule(holder)
    old = module._parameters[last]
    assert old is not None
    for path in [path for path, parameter in model.named_parameters() if parameter is old]:
        parts.keep_noted(model, path, index, axis)
    new = module._parameters[last] = _taken(old, index, axis)
    if isinstance(module, nn.Embedding):
        module.embedding_dim = new.shape[1]
    elif isinstance(module, nn.Linear) and owner is not module:
        fit(module)


def _remember(module: nn.Module, before: dict[Role, int], now: dict[Role, int], width: int) -> None:
    """Counts and widths that a module computes with."""
    own = {name: value for name, value in vars(module).items() if type(value) is int}
    for name in own:
        if name in _HEADS:
            setattr(module, name, now["q"])
        elif name in _KV_HEADS:
            setattr(module, name, now["k"])
        elif name in _WIDTHS and own[name] == before["q"] * width:
            setattr(module, name, now["q"] * width)
        elif name == _KV_WIDTH:
            setattr(module, name, now["k"] * width)
        elif name == _GROUPS:
            setattr(module, name, now["q"] // now["k"])


# --- checkpoints ---------------------------------------------------------------------------------------


def here(model: PreTrainedModel, rows: dict[str, Any]) -> list[tuple[Attention, dict[str, Any]]]:
    """The described attentions under the names that they have in ``model``, which may have another head or none."""
    if not rows:
        return []
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    by_name = {name: each for each in attentions(model) for name in (each.name, *each.twins)}
    found = []
    for name, row in rows.items():
        near = (name, name.removeprefix(prefix), prefix + name)
        own = next((by_name[n] for n in near if n in by_name), None)
        if own is None:
            ends = {id(a): a for n, a in by_name.items() if n.endswith("." + name) or name.endswith("." + n)}
            own = next(iter(ends.values())) if len(ends) == 1 else None
        if own is not None:
            found.append((own, row))
    return found


def rebuild(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Take the heads out of a freshly built, empty model that a compact checkpoint does not have."""
    for attention, row in here(model, described.get("attention", {})):
        if [attention.heads, attention.kv_heads] != row["of"]:
            what = f"{attention.name} has {attention.heads} heads, the checkpoint was made of {row['of'][0]}"
            raise FfnkitError("opening a compact checkpoint", what, "Leave the config as it was saved")
        with torch.device("cpu"):  # models are built on the meta device: places are real all the same
            kv = torch.tensor(row["kv"])
            keep_heads(model, attention, {"q": torch.tensor(row["heads"]), "k": kv, "v": kv})


def padded(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Put zeros where heads were removed into a plain state dict, so that the config's class takes it.

    Heads of zeros give nothing, so outputs stay. Returns the names of the attentions that got some.
    """
    changed = []
    for attention in attentions(model):
        record = attention.kept
        if record is None:
            continue
        changed.append(attention.name)
        whole: dict[Role, int] = {"q": record.of[0], "k": record.of[1], "v": record.of[1]}
        stay = {"q": torch.tensor(record.heads), "k": torch.tensor(record.kv), "v": torch.tensor(record.kv)}
        for name in (attention.name, *attention.twins):
            for path, value, axis, index, size in _spread(attention, whole, stay, state, name):  # type: ignore[arg-type]
                shape = list(value.shape)
                shape[axis] = size
                state[path] = value.new_zeros(shape).index_copy_(axis, index.to(value.device), value)
    return changed


def _spread(
    attention: Attention, whole: dict[Role, int], stay: dict[Role, Tensor], state: dict[str, Tensor], name: str
) -> Iterator[tuple[str, Tensor, int, Tensor, int]]:
    """(name, tensor, axis, places of what is there, size) of each tensor that lacks heads."""
    width, order, layout = attention.head_dim, attention.layout.order, attention.layout
    for path, roles in attention.paths().items():
        old, new = places(order, roles, whole, width), places(order, roles, attention._counts, width)
        index = torch.empty(sum(attention._counts[role] for role in roles) * width, dtype=torch.long)
        for role in roles:
            index[new[role]] = old[role][stay[role]]
        size = sum(whole[role] for role in roles) * width
        axis = 1 if is_transposed(attention.module.get_submodule(path)) else 0
        yield f"{name}.{path}.weight", state[f"{name}.{path}.weight"], axis, index, size
        if f"{name}.{path}.bias" in state:
            yield f"{name}.{path}.bias", state[f"{name}.{path}.bias"], 0, index, size
    columns = (stay["q"][:, None] * width + torch.arange(width)).flatten()
    axis = 0 if is_transposed(attention.linear("o")) else 1
    yield f"{name}.{layout.o}.weight", state[f"{name}.{layout.o}.weight"], axis, columns, whole["q"] * width
    for path, _, follows in attention.following():
        who, count = stay[follows or "q"], whole[follows or "q"]
        each = 1 if follows is None else width
        index = (who[:, None] * each + torch.arange(each)).flatten()
        yield f"{name}.{path}", state[f"{name}.{path}"], _axis(attention, path), index, count * each
