"""Checkpoints of both forms opened as the class that they were saved from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from ffnkit.errors import FfnkitError
from ffnkit.io.architectures import load_any
from ffnkit.io.loading import open_errors
from ffnkit.surgery.apply import fold as fold_model


def load(directory: str | Path, *, fold: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Open a checkpoint in the class that it was saved from, compact or standard.

    Args:
        directory: a folder or hub name.
        fold: plain linears in the place of those with a factor, a mask, thin pairs or updates, for libraries that look
            for linears (peft, quantizers); outputs stay. Not beside a quantization.
        kwargs: passed to ``from_pretrained``, as it takes them (dtype, device_map, num_labels, trust_remote_code, ...).
            A ``quantization_config`` for a compact checkpoint is nested: its own quantizer works on the narrow model.

    Raises:
        FfnkitError: where both ``fold`` and a quantization are asked for, or it is missing, damaged or holds NaN.
    """
    name = str(directory)
    if os.path.isdir(name) and kwargs.get("subfolder"):  # a folder by itself, from which its other files travel too
        name = os.path.join(name, kwargs.pop("subfolder"))
    quantization = kwargs.get("quantization_config")
    if fold and quantization is not None:
        found = "what is quantized cannot be folded exactly"
        raise FfnkitError("load(fold=True, quantization_config=...)", found, "Fold first, save, and quantize that")
    if isinstance(quantization, dict):
        with open_errors(f"model {name}"):
            kwargs["quantization_config"] = AutoQuantizationConfig.from_dict(quantization)
    model = load_any(name, **kwargs)
    return fold_model(model) if fold else model
