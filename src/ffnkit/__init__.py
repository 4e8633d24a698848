"""ffnkit compresses and cheaply fine-tunes the feed-forward blocks of Hugging Face transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ffnkit.adapters import adapter, load_adapter, remove_adapter, save_adapter
    from ffnkit.analysis.study import analyze
    from ffnkit.blocks import LAYOUTS, Layout
    from ffnkit.budget.allocation import Allocation, allocate
    from ffnkit.checkpoint import export, load, save
    from ffnkit.errors import FfnkitError
    from ffnkit.inventory import inspect
    from ffnkit.methods.calibrated import CalibratedFusion
    from ffnkit.methods.combined import Combined
    from ffnkit.methods.dsee import DSEE
    from ffnkit.methods.fusion import Fusion
    from ffnkit.methods.heads import RemoveHeads
    from ffnkit.methods.merging import Merging
    from ffnkit.methods.pruning import Prune
    from ffnkit.methods.sparsegrad import SparseGrad
    from ffnkit.methods.structured import StructuredPruning
    from ffnkit.peft_lora import save_lora
    from ffnkit.plans import Plan, plan
    from ffnkit.surgery import apply, fold
    from ffnkit.tune import trainable_parameters


__all__ = [
    "inspect",
    "plan",
    "Plan",
    "Fusion",
    "CalibratedFusion",
    "Merging",
    "Combined",
    "SparseGrad",
    "DSEE",
    "Prune",
    "RemoveHeads",
    "StructuredPruning",
    "allocate",
    "Allocation",
    "apply",
    "fold",
    "analyze",
    "save",
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
    "inspect": "inventory",
    "plan": "plans",
    "Plan": "plans",
    "Fusion": "methods.fusion",
    "CalibratedFusion": "methods.calibrated",
    "Merging": "methods.merging",
    "Combined": "methods.combined",
    "Prune": "methods.pruning",
    "RemoveHeads": "methods.heads",
    "StructuredPruning": "methods.structured",
    "SparseGrad": "methods.sparsegrad",
    "DSEE": "methods.dsee",
    "save_lora": "peft_lora",
    "allocate": "budget.allocation",
    "Allocation": "budget.allocation",
    "apply": "surgery",
    "fold": "surgery",
    "analyze": "analysis.study",
    "save": "checkpoint",
    "load": "checkpoint",
    "export": "checkpoint",
    "trainable_parameters": "tune",
    "adapter": "adapters",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "remove_adapter": "adapters",
    "FfnkitError": "errors",
    "LAYOUTS": "blocks",
    "Layout": "blocks",
}


def __getattr__(name: str) -> Any:
    """Public names load on first use: torch and transformers take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ffnkit' has no attribute '{name}'")
    value = getattr(import_module(f"ffnkit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_hook() -> None:
    """Teach ``from_pretrained`` to open compact checkpoints, without importing transformers for it.

    Where transformers' quantizers are loaded already, at once; else in the moment in which they are.
    """
    import sys

    if "transformers.quantizers.auto" in sys.modules:
        import_module("ffnkit.hook")
    else:
        from ffnkit._late import after_import

        after_import("transformers.quantizers.auto", "ffnkit.hook")


_register_hook()
