"""Neurons out of an FFN whose linears carry updates: weights and updates lose the same rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.model.families.ffns import WIDTH_ATTRIBUTES
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import is_transposed
from ffnkit.nn.adapted import Adapted
from ffnkit.nn.special import fit


def carries(ffn: FFN) -> bool:
    """Whether an update, or coefficients, train beside a weight of the FFN."""
    return not ffn.layout.experts and any(isinstance(ffn.linear(site), Adapted) for site in ffn.sites)


def check_keepable(ffn: FFN, asked: str) -> None:
    """Raises FfnkitError where neurons of the FFN cannot go one by one beside its updates."""
    if ffn.special:
        kinds = ", ".join(f"{site} is {value['kind']}" for site, value in ffn.special.items())
        do = "Fold the model first (ffnkit.fold), then go on"
        raise FfnkitError(asked, f"{ffn.name} is edited already ({kinds})", do)
    for site in ffn.sites if carries(ffn) else ():
        linears = _linears(ffn, site)
        first = linears[0]
        if len(linears) > 1 and isinstance(first, Adapted):
            found = f"{ffn.name} and FFNs that share its weights have updates of their own"
            raise FfnkitError(asked, found, "Fold the model first (ffnkit.fold)")
        if isinstance(first, Adapted) and not first.base.is_floating_point():
            do = "Fold the model (ffnkit.fold), or remove neurons in float and quantize then"
            raise FfnkitError(asked, f"the weights of {ffn.name} are quantized", do)


@torch.no_grad()
def keep(ffn: FFN, index: Tensor) -> None:
    """Keep these neurons of an FFN, in every owner; outputs are as if the others gave zeros.

    Args:
        index: (width,) int64, ascending.
    """
    width = ffn.width
    for site in ffn.sites:
        linears = _linears(ffn, site)
        places = index.to(linears[0].bias.device if linears[0].bias is not None else _stored(linears[0]).device)
        if site == "down":
            _cut(linears, columns=places)
        else:
            _cut(linears, rows=torch.cat((places, places + width)) if ffn.layout.fused else places)
    for owner in dict.fromkeys(ffn.owners.values()):
        for name in WIDTH_ATTRIBUTES:
            if isinstance(owner.__dict__.get(name), int):
                setattr(owner, name, len(index))


def _linears(ffn: FFN, site: str) -> list[Any]:
    return list(dict.fromkeys(owner.get_submodule(ffn.path(site)) for owner in ffn.owners.values()))


def _stored(linear: Any) -> Tensor:
    weight: Tensor = linear.base if isinstance(linear, Adapted) else linear.weight
    return weight


def _cut(linears: list[Any], rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep rows or columns (of (out, in)) of linears that hold the same parameters."""
    first = linears[0]
    if isinstance(first, Adapted):
        first.cut(rows=rows, columns=columns)
        return
    turned = is_transposed(first)
    weight, bias = first.weight, first.bias
    if rows is not None:
        weight = _part(weight, rows, 1 if turned else 0)
        bias = None if bias is None else _part(bias, rows, 0)
    if columns is not None:
        weight = _part(weight, columns, 0 if turned else 1)
    for linear in linears:
        linear.weight, linear.bias = weight, bias
        fit(linear)


def _part(old: nn.Parameter, index: Tensor, side: int) -> nn.Parameter:
    """Some rows or columns of a parameter; it trains where the old one does."""
    new = nn.Parameter(old.detach().index_select(side, index).contiguous(), old.requires_grad)
    if getattr(old, "_is_hf_initialized", False):
        new._is_hf_initialized = True  # type: ignore[attr-defined]
    return new
