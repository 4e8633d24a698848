"""Checkpoints of both forms opened as the class that they were saved from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ffnkit.io import files
from ffnkit.io.architectures import architecture_class, read_config
from ffnkit.io.formats import is_compact
from ffnkit.io.loading import load_pretrained

# Settings of from_pretrained that find the config as well as the weights.
_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "force_download")


def load(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Open a checkpoint in the class that it was saved from, compact or standard.

    Args:
        directory: a folder or hub name.
        kwargs: passed to ``from_pretrained``. A ``quantization_config`` for a compact checkpoint is nested: its own
            quantizer works on the narrow model.

    Raises:
        FfnkitError: where it is missing, damaged or holds NaN.
    """
    files.recover(directory)
    config = kwargs.pop("config", None) or read_config(str(directory), **{k: kwargs[k] for k in _HUB if k in kwargs})
    described = getattr(config, "quantization_config", None)
    if is_compact(described):
        quantization = kwargs.pop("quantization_config", None)
        if quantization is not None:
            data = quantization if isinstance(quantization, dict) else quantization.to_dict()
            config.quantization_config = {**described, "base": data, "base_done": False}
    return load_pretrained(architecture_class(config, str(directory)), directory, config=config, **kwargs)
