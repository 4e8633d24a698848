"""ffnkit compresses and cheaply fine-tunes the feed-forward blocks of Hugging Face transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ffnkit.analysis.study import analyze
    from ffnkit.budget.allocation import Allocation, allocate
    from ffnkit.budget.fitting import FitTo
    from ffnkit.calibration.stored import StatisticsFile
    from ffnkit.checkpoint.adapters import adapter, load_adapter, remove_adapter, save_adapter
    from ffnkit.checkpoint.apart import save_apart
    from ffnkit.checkpoint.export import export
    from ffnkit.checkpoint.load import load
    from ffnkit.checkpoint.peft_lora import save_lora
    from ffnkit.checkpoint.save import save
    from ffnkit.errors import FfnkitError
    from ffnkit.methods.calibrating import calibrate
    from ffnkit.methods.combined import Combined
    from ffnkit.methods.drop.heads import RemoveHeads
    from ffnkit.methods.drop.pruning import Prune
    from ffnkit.methods.drop.structured import StructuredPruning
    from ffnkit.methods.narrow.calibrated import CalibratedFusion
    from ffnkit.methods.narrow.fusion import Fusion
    from ffnkit.methods.share.calibrated import CalibratedMerging
    from ffnkit.methods.share.merging import Merging
    from ffnkit.methods.update.dsee import DSEE
    from ffnkit.methods.update.sparsegrad import SparseGrad
    from ffnkit.model.families.ffns import LAYOUTS, Layout
    from ffnkit.model.inspect import inspect
    from ffnkit.plans import Plan
    from ffnkit.report.costing import cost
    from ffnkit.stream.job import compress
    from ffnkit.surgery.apply import apply, fold
    from ffnkit.surgery.planning import plan
    from ffnkit.tune import trainable_parameters
    from ffnkit.tune.healing.heal import heal


__all__ = [
    "inspect",
    "plan",
    "Plan",
    "Fusion",
    "CalibratedFusion",
    "Merging",
    "CalibratedMerging",
    "Combined",
    "SparseGrad",
    "DSEE",
    "Prune",
    "RemoveHeads",
    "StructuredPruning",
    "FitTo",
    "calibrate",
    "StatisticsFile",
    "allocate",
    "Allocation",
    "apply",
    "compress",
    "fold",
    "analyze",
    "cost",
    "heal",
    "save",
    "save_apart",
    "load",
    "export",
    "trainable_parameters",
    "adapter",
    "save_adapter",
    "load_adapter",
    "remove_adapter",
    "save_lora",
    "FfnkitError",
    "LAYOUTS",
    "Layout",
]

_HOMES = {
    "inspect": "model.inspect",
    "plan": "surgery.planning",
    "Plan": "plans",
    "Fusion": "methods.narrow.fusion",
    "CalibratedFusion": "methods.narrow.calibrated",
    "Merging": "methods.share.merging",
    "CalibratedMerging": "methods.share.calibrated",
    "Combined": "methods.combined",
    "Prune": "methods.drop.pruning",
    "RemoveHeads": "methods.drop.heads",
    "StructuredPruning": "methods.drop.structured",
    "SparseGrad": "methods.update.sparsegrad",
    "DSEE": "methods.update.dsee",
    "save_lora": "checkpoint.peft_lora",
    "FitTo": "budget.fitting",
    "calibrate": "methods.calibrating",
    "StatisticsFile": "calibration.stored",
    "allocate": "budget.allocation",
    "Allocation": "budget.allocation",
    "apply": "surgery.apply",
    "compress": "stream.job",
    "fold": "surgery.apply",
    "analyze": "analysis.study",
    "cost": "report.costing",
    "heal": "tune.healing.heal",
    "save": "checkpoint.save",
    "save_apart": "checkpoint.apart",
    "load": "checkpoint.load",
    "export": "checkpoint.export",
    "trainable_parameters": "tune",
    "adapter": "checkpoint.adapters",
    "save_adapter": "checkpoint.adapters",
    "load_adapter": "checkpoint.adapters",
    "remove_adapter": "checkpoint.adapters",
    "FfnkitError": "errors",
    "LAYOUTS": "model.families.ffns",
    "Layout": "model.families.ffns",
}


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Public names load on first use: torch and transformers take seconds to import."""
        if name not in _HOMES:
            raise AttributeError(f"module 'ffnkit' has no attribute '{name}'")
        value = getattr(import_module(f"ffnkit.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# encoder-decoders that transformers has no classifier for
_CLASSIFIED = (
    *("blenderbot", "blenderbot_small", "led", "longt5", "m2m_100", "marian", "nllb_moe", "pegasus"),
    *("pegasus_x", "switch_transformers"),
)


def _register_hooks() -> None:
    """Teach ``from_pretrained`` to open compact checkpoints and to classify with more encoder-decoders, and peft what
    it cannot adapt.

    Neither is imported for it: where its modules are loaded already, at once; else in that moment.
    """
    from ffnkit._late import after_import

    after_import("transformers.quantizers.auto", "ffnkit.checkpoint.hook")
    after_import("transformers.modeling_utils", "ffnkit.checkpoint.drawn")
    after_import("peft.tuners.tuners_utils", "ffnkit.surgery.beside_peft")
    for name in _CLASSIFIED:  # the config is what an Auto class asks for first
        config, model = (f"transformers.models.{name}.{part}_{name}" for part in ("configuration", "modeling"))
        after_import(model, "ffnkit.model.families.classifiers")
        after_import(config, model)


_register_hooks()
