"""What is trained and how: tuners, fine-tuning, evaluation, layer-wise distillation. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import clean as clean
    from .distil_loss import layerwise_loss as layerwise_loss
    from .distillation import DistilResult as DistilResult
    from .distillation import distil as distil
    from .evaluation import evaluate as evaluate
    from .settings import DistilSettings as DistilSettings
    from .settings import TrainSettings as TrainSettings
    from .training import TrainResult as TrainResult
    from .training import seed_everything as seed_everything
    from .training import train as train
    from .tuners import TUNERS as TUNERS
    from .tuners import get as get
    from .tuners import trainable_parameters as trainable_parameters

_HOMES = {
    "clean": "checkpoints",
    "DistilResult": "distillation",
    "distil": "distillation",
    "layerwise_loss": "distil_loss",
    "evaluate": "evaluation",
    "DistilSettings": "settings",
    "TrainSettings": "settings",
    "TrainResult": "training",
    "seed_everything": "training",
    "train": "training",
    "TUNERS": "tuners",
    "get": "tuners",
    "trainable_parameters": "tuners",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
