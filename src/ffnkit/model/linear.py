"""Linears of every kind: how their weights lie and how wide they are."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.special import Special

Linear = nn.Linear | Conv1D | Special


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight lies as (in, out)."""
    return isinstance(linear, Conv1D) or (isinstance(linear, Special) and linear.transposed)


def is_linear(module: object) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, Special))


def _shape(linear: Any) -> tuple[int, int]:
    if isinstance(linear, Special):
        return linear.features
    if isinstance(linear, nn.Linear) and not linear.weight.is_floating_point():  # several numbers may lie in a byte
        return linear.out_features, linear.in_features
    rows, columns = linear.weight.shape
    return (columns, rows) if is_transposed(linear) else (rows, columns)


def features(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear of any kind."""
    return _shape(linear)


def output_width(linear: nn.Module) -> int:
    """Columns of what a linear gives."""
    return _shape(linear)[0]


def descend(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below another, None where there is none."""
    current: nn.Module | None = module
    for part in path.split("."):
        current = current._modules.get(part) if current is not None else None
    return current
