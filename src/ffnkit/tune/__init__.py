"""What is trained and how: tuners, fine-tuning, evaluation, distillation. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffnkit.tune import tuners as tuners
    from ffnkit.tune.adapters import load_adapter as load_adapter
    from ffnkit.tune.calibration import calibration_batches as calibration_batches
    from ffnkit.tune.calibration import deciding_batches as deciding_batches
    from ffnkit.tune.calibration import drawn_batches as drawn_batches
    from ffnkit.tune.checkpoints import clean as clean
    from ffnkit.tune.distil_loss import distillation_loss as distillation_loss
    from ffnkit.tune.distil_loss import layerwise_loss as layerwise_loss
    from ffnkit.tune.distil_text import distil_examples as distil_examples
    from ffnkit.tune.distil_text import text_examples as text_examples
    from ffnkit.tune.distillation import DistilResult as DistilResult
    from ffnkit.tune.distillation import distil as distil
    from ffnkit.tune.evaluation import assess as assess
    from ffnkit.tune.evaluation import assess_all as assess_all
    from ffnkit.tune.evaluation import evaluate as evaluate
    from ffnkit.tune.evaluation import write_predictions as write_predictions
    from ffnkit.tune.scoring import scorer as scorer
    from ffnkit.tune.scoring import with_score as with_score
    from ffnkit.tune.settings import CalibrationSettings as CalibrationSettings
    from ffnkit.tune.settings import DistilSettings as DistilSettings
    from ffnkit.tune.settings import TrainSettings as TrainSettings
    from ffnkit.tune.sharding import fsdp_plugin as fsdp_plugin
    from ffnkit.tune.sharding import ties_in_one_group as ties_in_one_group
    from ffnkit.tune.sharding import wrap_classes as wrap_classes
    from ffnkit.tune.training import TrainResult as TrainResult
    from ffnkit.tune.training import seed_everything as seed_everything
    from ffnkit.tune.training import train as train
    from ffnkit.tune.tuners import TUNERS as TUNERS
    from ffnkit.tune.tuners import get as get
    from ffnkit.tune.tuners import remove_added as remove_added
    from ffnkit.tune.tuners import trainable_parameters as trainable_parameters

_HOMES = {
    "load_adapter": "adapters",
    "calibration_batches": "calibration",
    "deciding_batches": "calibration",
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
    "assess_all": "evaluation",
    "evaluate": "evaluation",
    "write_predictions": "evaluation",
    "scorer": "scoring",
    "with_score": "scoring",
    "fsdp_plugin": "sharding",
    "ties_in_one_group": "sharding",
    "wrap_classes": "sharding",
    "DistilSettings": "settings",
    "TrainSettings": "settings",
    "TrainResult": "training",
    "seed_everything": "training",
    "train": "training",
    "TUNERS": "tuners",
    "get": "tuners",
    "remove_added": "tuners",
    "trainable_parameters": "tuners",
}
__all__ = sorted([*_HOMES, "tuners"])


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name == "tuners":  # a module of its own: prepare and finish are found there
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
