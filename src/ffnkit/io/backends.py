"""What transformers' quantizers say where they cannot work, and what to do about it, in one line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ffnkit.errors import FfnkitError

_DEVICE = re.compile(r"(requires|only supported on|no) (an? )?([A-Z]\w* )*(GPU|XPU|MPS)", re.IGNORECASE)
_ON_A_CPU = "bitsandbytes, torchao or quanto, which work on a CPU too"


@contextmanager
def quantizer_errors(asked: str, config: Any) -> Iterator[None]:
    """Turns what a quantizer raises into one FfnkitError about ``asked``.

    Args:
        config: its config: an object of transformers.
    """
    try:
        yield
    except FfnkitError:
        raise
    except Exception as error:  # each quantizer has its own kinds
        raise FfnkitError(f"{asked} with {method_of(config)}", *quantizer_reason(error)) from error


def method_of(config: Any) -> str:
    """The name of a quantization, of its config."""
    return str(getattr(config.quant_method, "value", config.quant_method))


def check_writes(model: Any, asked: str) -> None:
    """Raises FfnkitError where the quantizer that stays on a model writes no checkpoints (quanto)."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        inner = getattr(quantizer, "inner", None) or quantizer
        found = f"{method_of(inner.quantization_config)} writes no checkpoints of what it quantized"
        raise FfnkitError(asked, found, "Write the model from before, and quantize it whenever it is opened")


def is_of_quantizer(error: BaseException) -> bool:
    """Whether a quantizer of transformers raised it, or its config."""
    files = [frame.f_code.co_filename.replace("\\", "/") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any("/transformers/quantizers/" in each or each.endswith("quantization_config.py") for each in files)


def quantizer_reason(error: Exception) -> tuple[str, str]:
    """What was found, and what to do, for an error of a quantizer."""
    found = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "pre-quantized" in found:
        do = f"Export the model (ffnkit export) and quantize that with the method's own tool, or ask for {_ON_A_CPU}"
        return "it opens weights that its own tool quantized, and quantizes none itself", do
    if _DEVICE.search(found):
        return found, f"Open it on a machine that has one, or ask for {_ON_A_CPU}"
    if isinstance(error, ImportError) or "pip install" in found:
        return found, "Install that package in this environment, or open the model without quantization_config"
    return found, f"Ask for {_ON_A_CPU}, or open the model without quantization_config"
