"""What plain transformers builds from a model's config as it is written to a file: the structure, without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def built(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """A model of a class, built on the meta device, with the ties of its config.

    Raises:
        Exception: whatever the class raises where it does not bear the config.
    """
    with torch.device("meta"), no_init_weights():
        model = kind(config)
        model.tie_weights()  # left out with the initial values
    return model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer by name, tied ones under each of theirs."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(value.shape) for name, value in named}
