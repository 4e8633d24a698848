"""The kinds of edits: what a plan is made of. A new kind is its file and a line in ``EDITS``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ffnkit._registry import with_added
from ffnkit.edits.base import Edit, Shape, Stage
from ffnkit.edits.heads import SelectHeads
from ffnkit.edits.layers import DropLayer
from ffnkit.edits.linears import FactorLinear, LinearEdit, ReplaceLinear, ScaleInputs
from ffnkit.edits.masks import Mask
from ffnkit.edits.neurons import ClusterNeurons, NeuronEdit, ReplaceNeurons, SelectNeurons, SetWidth
from ffnkit.edits.own import KeepOwn
from ffnkit.edits.rescale import Rescale
from ffnkit.edits.ties import Tie
from ffnkit.edits.updates import Train, UpdateLinear
from ffnkit.errors import FfnkitError

EDITS: tuple[type[Edit], ...] = (
    DropLayer,
    SelectHeads,
    ClusterNeurons,
    SelectNeurons,
    ReplaceNeurons,
    SetWidth,
    ScaleInputs,
    KeepOwn,
    Tie,
    FactorLinear,
    ReplaceLinear,
    Rescale,
    Mask,
    UpdateLinear,
    Train,
)

__all__ = [
    "EDITS",
    "ClusterNeurons",
    "DropLayer",
    "Edit",
    "FactorLinear",
    "KeepOwn",
    "LinearEdit",
    "Mask",
    "NeuronEdit",
    "ReplaceLinear",
    "ReplaceNeurons",
    "Rescale",
    "ScaleInputs",
    "SelectHeads",
    "SelectNeurons",
    "SetWidth",
    "Shape",
    "Stage",
    "Tie",
    "Train",
    "UpdateLinear",
    "build",
    "known",
    "of_layer",
]


def _wrong(kind: Any) -> str:
    if not (isinstance(kind, type) and issubclass(kind, Edit)):
        return f"{kind!r} is no subclass of Edit"
    return "" if kind.kind else f"{kind.__name__} has no kind"


def known() -> tuple[type[Edit], ...]:
    """Our own kinds and those of other packages (entry points ``ffnkit.edits``)."""
    return with_added("ffnkit.edits", EDITS, lambda kind: str(kind.kind), _wrong)


def build(kind: str, settings: dict[str, Any], tensors: dict[str, Tensor], version: int = 1) -> Edit:
    """An edit from its saved parts. Raises FfnkitError for a kind or a version that this ffnkit does not know."""
    settings = dict(settings)
    if "ffn" in settings:  # of older files
        settings["target"] = settings.pop("ffn")
    for cls in known():
        if kind == cls.kind or kind in cls.formerly:
            if version > cls.version:
                what = f"version {version}, this ffnkit knows {cls.version}"
                raise FfnkitError(f"edit '{kind}'", what, "Update ffnkit or make the plan again")
            return cls.build(cls.settings_of_today(settings, version), tensors)
    names = ", ".join(cls.kind for cls in known())
    raise FfnkitError(f"edit '{kind}'", f"this version knows {names}", "Update ffnkit or make the plan again")


def of_layer(layer: str) -> type[LinearEdit] | type[Mask]:
    """The kind of edit that puts a layer of this name in a linear's place. Raises FfnkitError where there is none."""
    for cls in known():
        if issubclass(cls, LinearEdit | Mask) and cls.layer is not None and cls.layer.kind == layer:
            return cls
    raise FfnkitError(f"layer '{layer}'", "no kind of edit makes it", "Update ffnkit")
