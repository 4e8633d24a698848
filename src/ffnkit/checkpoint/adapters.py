"""Updates of a model as small files: take them, save them, put them on a fresh base model, exchange them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ffnkit import __version__
from ffnkit.edits import Edit, Stage, Train, UpdateLinear
from ffnkit.errors import FfnkitError
from ffnkit.io.folders import staging
from ffnkit.io.snapshots import name_of
from ffnkit.nn.adapter_layer import adapter_layers, fingerprint
from ffnkit.plans import Plan
from ffnkit.surgery.apply import apply, remove_updates
from ffnkit.surgery.journal import journal
from ffnkit.surgery.writer import beside, parts_beside

# The description is not called as peft calls its own, so that an adapter may lie beside a model that peft looks at.
TENSORS, CONFIG = "adapter.safetensors", "adapter.json"


@torch.no_grad()
def adapter(model: PreTrainedModel) -> Plan:
    """The updates that are on a model, with what trained beside them, as a plan: ``fk.apply`` puts them on again.

    Entries that were chosen anew while training are all in it; applied, it holds them as a fixed selection. It fits
    the very base model only, which is told by the fingerprints of the weights.

    Raises:
        FfnkitError: no update is on the model.
    """
    layers = adapter_layers(model)
    if not layers:
        raise FfnkitError(f"the adapter of {type(model).__name__}", "no update is on it", "Apply a plan or load one")
    edits: list[Edit] = []
    for name, layer in layers.items():
        given, parts = layer.made_of()
        edits.append(UpdateLinear(name, layer.kind, given, parts, fingerprint=fingerprint(layer.base).tolist()))
    values = {name: p.detach().clone() for name, p in beside(model).items()}
    edits.append(Train("", parts=parts_beside(model), values=values))
    kinds = sorted({layer.kind for layer in layers.values()})
    return Plan(
        method="+".join(kinds),
        settings={},
        model=type(model).__name__,
        edits=tuple(edits),
        shapes={},
        parameters=sum(p.numel() for p in model.parameters()),
    )


def save_adapter(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write the updates that are on a model, and what trained beside them: safetensors and a JSON description.

    Raises:
        FfnkitError: no update is on the model, or the folder cannot be written.
    """
    plan = adapter(model)
    layers = [cast(UpdateLinear, edit) for edit in plan.edits if edit.stage is Stage.UPDATE]
    train = [cast(Train, edit) for edit in plan.edits if edit.stage is Stage.TRAIN]
    about: dict[str, Any] = {
        "adapter": plan.method,
        "ffnkit": __version__,
        "base_model": name_of(model) or None,
        "model": plan.model,
        "trained_beside": [part for edit in train for part in edit.parts],
        "layers": {edit.target: {**edit.given, "fingerprint": edit.fingerprint} for edit in layers},
    }
    with staging(folder, "adapter") as temporary:
        plan.save(temporary / TENSORS)
        (temporary / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put saved updates on their base model, in place, in the place of those that are there; it may train on.

    Raises:
        FfnkitError: no adapter is there, it is damaged, or the base model is another one; the model is as before then.
    """
    path = Path(folder) / TENSORS
    if not os.path.isfile(path):
        raise FfnkitError(f"adapter {folder}", f"there is no {TENSORS}", "Name a folder that save_adapter wrote")
    wanted = Plan.load(path)
    with journal(model):
        if adapter_layers(model):
            remove_updates(model)
        return apply(model, wanted)


remove_adapter = remove_updates


def is_adapted(model: nn.Module) -> bool:
    """Whether updates are on the model."""
    return bool(adapter_layers(model))
