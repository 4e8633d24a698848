"""The weights of a unit between its stages: a file, read into a model of the same form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit.io.files import replacing
from ffnkit.io.processes import is_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_weights(model: PreTrainedModel, path: Path) -> None:
    """All of a model's tensors, in one step; of several processes of one training the first writes them."""
    if not is_first():
        return
    from safetensors.torch import save_model

    with replacing(path) as new:
        save_model(model, str(new))


def read_weights(model: PreTrainedModel, path: Path) -> None:
    """Put the tensors of a file into a model."""
    from safetensors.torch import load_model

    load_model(model, str(path))
