"""A unit's weights between its stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit.io.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_weights(model: PreTrainedModel, path: Path) -> None:
    """All of them; tied ones once."""
    from safetensors.torch import save_model

    with replacing(path) as new:
        save_model(model, str(new))


def read_weights(model: PreTrainedModel, path: Path) -> None:
    """Into a model of the same shape, in place."""
    from safetensors.torch import load_model

    load_model(model, str(path))
