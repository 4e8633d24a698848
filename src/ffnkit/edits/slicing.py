"""Rows and columns of linears, and what lies beside their weights, that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.edits.base import Writer
from ffnkit.errors import FfnkitError
from ffnkit.model.families.keys import WIDTH_ATTRIBUTES
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import is_transposed
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.expert_weights import buffer_name, parametrized_weights, remove_parametrizations
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import ReparametrizedLinear, update_features
from ffnkit.nn.scaled import Scaled


def slice_linears(
    writer: Writer, linears: list[Any], rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Keep rows or columns of the weight (out, in) that these linears hold, with all that lies beside it.

    Args:
        linears: every one that holds the weight. rows, columns: int64 places that stay, in their new order; None: all.
    """
    first = linears[0]
    weight, bias = (first.base if isinstance(first, AdapterLayer) else first.weight), first.bias
    turned = is_transposed(first)
    axes = [(index, axis) for index, axis in ((rows, int(turned)), (columns, 1 - turned)) if index is not None]
    if isinstance(first, AdapterLayer):
        for index, axis in axes:
            writer.keep_noted(weight, index, axis)
        if rows is not None and bias is not None:
            writer.keep_noted(bias, rows, 0)
        cut = first.cut_frozen if writer.empty else first.cut  # what an update loses hangs on its numbers
        cut(
            rows=None if rows is None else rows.to(weight.device),
            columns=None if columns is None else columns.to(weight.device),
        )
        return
    for index, axis in axes:
        weight = slice_parameter(writer, weight, index, axis, linears)
        for linear in linears:
            if isinstance(linear, Masked):
                linear.mask = linear.mask.index_select(axis, index.to(linear.mask.device))
    if rows is not None and bias is not None:
        slice_parameter(writer, bias, rows, 0, linears)
    for linear in linears:
        if not isinstance(linear, ReparametrizedLinear):
            update_features(linear)


def slice_parameter(
    writer: Writer, old: nn.Parameter, index: Tensor, axis: int, within: list[nn.Module]
) -> nn.Parameter:
    """Keep these places of an axis of a parameter, and of what is noted of it."""
    writer.keep_noted(old, index, axis)
    return writer.put(old, old.detach().index_select(axis, index.to(old.device)), within)


def check_ffn_untied(writer: Writer, ffn: FFN, asked: str) -> None:
    """Raises FfnkitError where something else than the FFN, and those that share it, holds one of its weights.

    And where those that share it share no biases: one linear is to stand in all places.
    """
    owners = [module for owner in ffn.owners.values() for module in owner.modules()]
    for site in () if ffn.layout.experts else (site for site in ffn.sites if site not in ffn.differing):
        if len({id(linear.bias) for linear in ffn.linears(site)}) > 1:
            do = "Share the biases too, or leave this one out"
            raise FfnkitError(asked, f"places that share its weights have biases of their own at '{site}'", do)
    for parameter in ffn.parameters():
        writer.check_untied(parameter, owners, asked)


# --- neurons


def check_cuttable(ffn: FFN, asked: str) -> None:
    """Raises FfnkitError where neurons of the FFN cannot go one by one beside its masks and updates."""
    ffn.check_unedited(asked, but=(Masked.kind,))
    for site in ffn.sites if ffn.updated else ():
        linears = ffn.linears(site)
        first = linears[0]
        if len(linears) > 1 and isinstance(first, AdapterLayer):
            found = f"{ffn.name} and FFNs that share its weights have updates of their own"
            raise FfnkitError(asked, found, "Fold the model first (ffnkit.fold)")
        if isinstance(first, AdapterLayer) and not first.base.is_floating_point():
            do = "Fold the model (ffnkit.fold), or remove neurons in float and quantize then"
            raise FfnkitError(asked, f"the weights of {ffn.name} are quantized", do)


@torch.no_grad()
def keep_neurons(writer: Writer, ffn: FFN, index: Tensor) -> None:
    """Keep these neurons of an FFN, in every owner; outputs are as if the others gave zeros.

    Args:
        index: (width,) int64, ascending.
    """
    rows = rows_of(ffn, index)
    for site in ffn.sites:
        linears = ffn.linears(site)
        slice_linears(writer, linears, columns=index) if site == "down" else slice_linears(writer, linears, rows=rows)
    set_width(ffn, len(index))


def keep_of_experts(ffn: FFN, index: Tensor) -> None:
    """Keep these neurons in the masks of an FFN's experts, as the weights will.

    Args:
        index: (E, width) int64.
    """
    for _, buffer in parametrized_weights(ffn.module):
        mask, turned = getattr(ffn.module, buffer), ffn.layout.transposed
        down = buffer == buffer_name(Masked.kind, "down")
        places = (index if down else rows_of(ffn, index)).to(mask.device)
        axis = 1 if down == turned else 2
        kept = mask.take_along_dim(places.unsqueeze(3 - axis), axis)
        for owner in dict.fromkeys(ffn.owners.values()):
            setattr(owner, buffer, kept)


def unmask(writer: Writer, ffn: FFN) -> None:
    """Plain weights in the place of masked ones."""
    if ffn.layout.experts:
        for owner in dict.fromkeys(ffn.owners.values()):
            remove_parametrizations(owner, keep=(Scaled.kind,))
        return
    for linear in [linear for site in ffn.sites for linear in ffn.linears(site) if isinstance(linear, Masked)]:
        writer.replace(linear, linear.fold())


def rows_of(ffn: FFN, index: Tensor) -> Tensor:
    """The rows of up that hold these neurons, (.., width); where it holds gate and up, those of both."""
    if not ffn.layout.fused:
        return index
    if ffn.layout.interleaved:
        return torch.stack((2 * index, 2 * index + 1), -1).flatten(-2)
    return torch.cat((index, index + ffn.width), -1)


def set_width(ffn: FFN, width: int) -> None:
    """Let the owners' own attributes say the new width."""
    for owner in dict.fromkeys(ffn.owners.values()):
        for name in WIDTH_ATTRIBUTES:
            if isinstance(owner.__dict__.get(name), int):
                setattr(owner, name, width)
