"""What plain transformers builds from a model's config as it is written to a file: the structure, without weights."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


def written(config: PreTrainedConfig) -> Any:
    """The config as it is read back from its file, without what quantizers or ffnkit wrote there.

    Raises:
        Exception: whatever its class raises where it does not bear the values.
    """
    data = json.loads(config.to_json_string())
    data.pop("quantization_config", None)
    return type(config).from_dict(data)


def built(model: nn.Module, config: PreTrainedConfig | None = None) -> Any:
    """A model of the same class, built from a config (None: its own) on the meta device.

    Raises:
        Exception: whatever the class raises where it does not bear the config.
    """
    with torch.device("meta"):
        return type(model)(written(config if config is not None else model.config))  # type: ignore[arg-type]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer by name, tied ones under each of theirs."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(value.shape) for name, value in named}
