"""Linears whose weight is quantized: bitsandbytes' and torchao's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_LAYERS = ("Linear4bit", "Linear8bitLt")


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether a linear holds its weight in another form than float; peft's layers of the same names hold none."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    return type(module).__name__ in _LAYERS or type(weight.data).__module__.startswith("torchao.")


@torch.no_grad()
def float_weight(linear: Any) -> Tensor:
    """What a linear's weight stands for, (out, in), float: the weight itself, or a copy dequantized."""
    if not is_quantized_linear(linear):
        weight: Tensor = linear.weight.detach()
        return weight.mT if isinstance(linear, Conv1D) else weight
    if type(linear).__name__ == "Linear8bitLt":  # peft's function exchanges the layer's weight
        state, held = linear.state, linear.weight
        scales = state.SCB if state.SCB is not None else held.SCB
        numbers = state.CB if state.CB is not None else held.CB if held.CB is not None else held.data
        exact: Tensor = numbers.float() * (scales.float() / 127)[:, None].to(numbers.device)
        return exact
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(linear).detach()


def quantized_features(linear: Any) -> tuple[int, int]:
    """(out, in) of a linear; packed weights do not show it."""
    if is_quantized_linear(linear) or (isinstance(linear, nn.Linear) and not linear.weight.is_floating_point()):
        return int(linear.out_features), int(linear.in_features)
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


@torch.no_grad()
def dequantized(linear: Any, dtype: torch.dtype) -> Any:
    """The plain layer of the class that the model had, around what the quantized weight stands for."""
    weight = float_weight(linear).to(dtype)
    stored = nn.Parameter((weight.T if was_transposed(linear) else weight).contiguous())
    return plain_of(linear, stored, linear.bias)


def was_transposed(linear: Any) -> bool:
    """Whether a quantized linear took the place of a Conv1D, whose weight lies as (in, out)."""
    return issubclass(getattr(linear, "source_cls", nn.Linear), Conv1D)


def plain_of(linear: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> Any:
    """The plain layer of the class that the model had, around a weight as that class stores it."""
    rows, columns = weight.shape
    with torch.device("meta"):
        plain = Conv1D(columns, rows) if was_transposed(linear) else nn.Linear(columns, rows)
    plain.weight = weight
    plain._parameters["bias"] = bias
    return plain.train(linear.training)
