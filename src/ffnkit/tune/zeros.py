"""Weights that are zero before tuning and shall be zero after it, though an update went into them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffnkit.model.linear import PLAIN, linears, stored_weight
from ffnkit.model.trainable import head_parameters
from ffnkit.ops.masks import packed, unpacked

_ZEROS = "_ffnkit_zeros"  # on a model that is tuned: packed places of zeros and shapes, by parameter name


def note(model: nn.Module) -> dict[str, tuple[Tensor, torch.Size]]:
    """Where the weights of linears and of experts are exactly zero: packed bits and shape, by parameter name.

    Task heads and embeddings are left out, and weights without a zero.
    """
    held = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    held |= {id(p) for p in head_parameters(model)}
    weights = {id(stored_weight(m)) for _, m in linears(model) if isinstance(m, PLAIN)}
    done: dict[int, tuple[Tensor, torch.Size] | None] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = id(parameter)
        if own in held or not (own in weights or parameter.ndim == 3) or not parameter.is_floating_point():
            continue
        if own not in done:
            zero = parameter.detach() == 0
            done[own] = (packed(zero), parameter.shape) if bool(zero.any()) else None
        if (entry := done[own]) is not None:
            found[name] = entry
    return found


def hold(model: nn.Module, noted: dict[str, tuple[Tensor, torch.Size]]) -> None:
    """Remember what :func:`note` gave on the model that trains."""
    object.__setattr__(model, _ZEROS, noted)


def held(model: nn.Module) -> dict[str, tuple[Tensor, torch.Size]]:
    """What :func:`hold` remembered, which is forgotten; empty where nothing was."""
    noted: dict[str, tuple[Tensor, torch.Size]] = getattr(model, _ZEROS, {})
    if hasattr(model, _ZEROS):
        object.__delattr__(model, _ZEROS)
    return noted


@torch.no_grad()
def restore(model: nn.Module, noted: dict[str, tuple[Tensor, torch.Size]]) -> None:
    """Zeros again where there were some, in a plain model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for name, (bits, shape) in noted.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != shape or id(parameter) in done:
            continue
        done.add(id(parameter))
        parameter.masked_fill_(unpacked(bits, shape).to(parameter.device), 0.0)
