"""What is trained and how: tuners, fine-tuning, evaluation, distillation. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import load_adapter as load_adapter
    from .calibration import calibration_batches as calibration_batches
    from .calibration import drawn_batches as drawn_batches
    from .checkpoints import clean as clean
    from .distil_loss import distillation_loss as distillation_loss
    from .distil_loss import layerwise_loss as layerwise_loss
    from .distil_text import distil_examples as distil_examples
    from .distil_text import text_examples as text_examples
    from .distillation import DistilResult as DistilResult
    from .distillation import distil as distil
    from .evaluation import assess as assess
    from .evaluation import evaluate as evaluate
    from .evaluation import write_predictions as write_predictions
    from .scoring import scorer as scorer
    from .scoring import with_score as with_score
    from .settings import CalibrationSettings as CalibrationSettings
    from .settings import DistilSettings as DistilSettings
    from .settings import TrainSettings as TrainSettings
    from .sharding import fsdp_plugin as fsdp_plugin
    from .sharding import wrap_classes as wrap_classes
    from .training import TrainResult as TrainResult
    from .training import seed_everything as seed_everything
    from .training import train as train
    from .tuners import TUNERS as TUNERS
    from .tuners import get as get
    from .tuners import trainable_parameters as trainable_parameters

_HOMES = {
    "load_adapter": "adapters",
    "calibration_batches": "calibration",
    "drawn_batches": "calibration",
    "CalibrationSettings": "settings",
    "clean": "checkpoints",
    "DistilResult": "distillation",
    "distil": "distillation",
    "distil_examples": "distil_text",
    "distillation_loss": "distil_loss",
    "layerwise_loss": "distil_loss",
    "text_examples": "distil_text",
    "assess": "evaluation",
    "evaluate": "evaluation",
    "write_predictions": "evaluation",
    "scorer": "scoring",
    "with_score": "scoring",
    "fsdp_plugin": "sharding",
    "wrap_classes": "sharding",
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
