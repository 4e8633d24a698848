"""What a linear keeps its weight in."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.nn.adapted import Adapted
from ffnkit.nn.masked import Masked

KINDS = (nn.Linear, Conv1D, Masked, Adapted)


def stored_weight(linear: Any) -> nn.Parameter:
    """The parameter that a linear keeps its weight in, below an update and as it is stored."""
    return cast(nn.Parameter, linear.base if isinstance(linear, Adapted) else linear.weight)


def is_maskable(module: nn.Module) -> bool:
    """Whether a mask can be put on the module."""
    return isinstance(module, KINDS)


def check_float(weight: Any, name: str) -> None:
    """Raises FfnkitError where the weights cannot be masked: quantized, or several numbers to a byte."""
    if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
        do = "Prune the model in float, save it, and load that with quantization_config"
        raise FfnkitError(f"pruning {name}", f"its weight is quantized ({type(weight).__name__} {weight.dtype})", do)
