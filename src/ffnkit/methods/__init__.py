"""The methods: each plans, none changes a model, none knows another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffnkit._registry import lacking, with_added
from ffnkit.errors import FfnkitError
from ffnkit.methods.combined import Combined
from ffnkit.methods.drop.heads import RemoveHeads
from ffnkit.methods.drop.layers import FfnDrop, LayerDrop
from ffnkit.methods.drop.pruning import Prune
from ffnkit.methods.drop.structured import StructuredPruning
from ffnkit.methods.drop.unstructured import Unstructured
from ffnkit.methods.narrow.calibrated import CalibratedFusion
from ffnkit.methods.narrow.closed_forms import ModeGpt, Surgeon
from ffnkit.methods.narrow.clustering import Clustering
from ffnkit.methods.narrow.flap import Flap
from ffnkit.methods.narrow.fusion import Fusion
from ffnkit.methods.narrow.mmd import Mmd
from ffnkit.methods.narrow.reinit import Reinit
from ffnkit.methods.narrow.selection import Importance, Magnitude, Random
from ffnkit.methods.narrow.sketch import Sketch
from ffnkit.methods.narrow.svd import Svd
from ffnkit.methods.share.calibrated import CalibratedMerging
from ffnkit.methods.share.merging import Merging
from ffnkit.methods.update.dsee import DSEE
from ffnkit.methods.update.sparsegrad import SparseGrad
from ffnkit.settings import build as build_from
from ffnkit.settings.presets import unlike

METHODS: tuple[Any, ...] = (
    Fusion,
    CalibratedFusion,
    Merging,
    CalibratedMerging,
    Clustering,
    Sketch,
    Svd,
    Mmd,
    Random,
    Magnitude,
    Importance,
    Flap,
    ModeGpt,
    Surgeon,
    Reinit,
    Unstructured,
    Prune,
    RemoveHeads,
    StructuredPruning,
    LayerDrop,
    FfnDrop,
    SparseGrad,
    DSEE,
    Combined,
)


def _wrong(method: Any) -> str:
    return lacking(method, "name", "summary", "settings", "draft")


def known() -> tuple[Any, ...]:
    """Our own methods and those of other packages (entry points ``ffnkit.methods``)."""
    return with_added("ffnkit.methods", METHODS, lambda method: str(method.name), _wrong)


def names() -> list[str]:
    return [method.name for method in known()]


def get(name: str) -> Any:
    """The method of that name. Raises FfnkitError, naming those there are."""
    for method in known():
        if method.name == name:
            return method
    raise FfnkitError(f"method '{name}'", f"there are {', '.join(names())}", "Name one of them")


def compressing() -> list[str]:
    """The names of those that are done once they are applied; what the others add has to be trained first."""
    return [method.name for method in known() if not getattr(method, "trains", False)]


def check_compresses(name: str) -> None:
    """Raises FfnkitError where no method has that name, or what it plans has to be trained."""
    if getattr(get(name), "trains", False):
        what = "it changes nothing by itself: what it adds has to be trained"
        raise FfnkitError(
            f"method '{name}'", what, f"Tune with it as the tuner {name}, or choose among {', '.join(compressing())}"
        )


def build(name: str, **settings: Any) -> Any:
    """A method from its name and settings. Raises FfnkitError on a setting that it does not have."""
    return build_from(get(name), settings, name)


def unlike_papers(name: str, settings: Mapping[str, Any]) -> list[str]:
    """In words, how a method's settings differ from those of its paper, where it has a preset of these."""
    parts = settings.get("methods")
    if isinstance(parts, list | tuple):
        return [line for each in parts for line in unlike_papers(*_taken_apart(each))]
    found = unlike(get(name), settings) if name in names() else None
    return [] if found is None else [f"{name}: {found}"]


def _taken_apart(part: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(part, Mapping):
        return part.name, part.settings()
    return str(part.get("method")), {key: value for key, value in part.items() if key != "method"}
