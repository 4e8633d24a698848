"""Tuners whose plan puts small updates beside frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel

from ffnkit.checkpoint.adapters import save_adapter
from ffnkit.checkpoint.apart import save_apart
from ffnkit.io import processes
from ffnkit.io.progress import shown
from ffnkit.methods.update.coefficients import with_coefficients
from ffnkit.model.trainable import remember
from ffnkit.plans import Plan
from ffnkit.surgery.apply import SAVING, apply, fold
from ffnkit.surgery.planning import plan
from ffnkit.tune import masks, sparing, zeros

if TYPE_CHECKING:
    from ffnkit.tune.base import Updating
    from ffnkit.tune.lifecycle import Preparation


def put_on(model: nn.Module, tuner: Updating, preparation: Preparation) -> nn.Module:
    """The model with updates beside its weights, factors and masks set aside first (``masks``); changed in place."""
    keep = preparation.keep
    found = tuner.routers_of(model)
    whole = cast(PreTrainedModel, model)
    masked = masks.set_aside(model, preparation)
    noted = zeros.note(model) if tuner.keep_zeros or masked else {}
    if keep is not None and processes.of_first(keep.is_file()):
        made = Plan.load(keep)
    else:
        with shown(tuner.name, quiet=not preparation.progress):
            made = plan(model, cast(Any, tuner.method), data=cast(Any, preparation.data))
        if tuner.coefficients:
            made = with_coefficients(model, made, tuner.coefficients)
        if keep is not None:
            if processes.is_first():
                made.save(keep)
            processes.wait()
            made = made if processes.is_first() else Plan.load(keep)  # rounding may choose other entries elsewhere
    remember(model)
    apply(whole, made)
    if tuner.keep_zeros:
        sparing.spare(model, noted)
        zeros.hold(model, noted)
    else:
        sparing.spare_later(model, sparing.of(noted, masked))
    for router in found.values():
        router.requires_grad_(tuner.routers == "trained")
    return model


def save_updates(model: PreTrainedModel, tuner: Updating) -> None:
    """The updates that are on a model into the folders that the tuner names; of several processes the first does."""
    if not processes.is_first():
        return
    if tuner.adapter_dir is not None:
        save_adapter(model, tuner.adapter_dir)
    if tuner.apart_dir is not None:
        save_apart(model, tuner.apart_dir)


def take_off(model: nn.Module, tuner: Updating) -> nn.Module:
    """The plain model with the updates in its weights; saves them first where the tuner names a folder."""
    whole = cast(PreTrainedModel, model)
    save_updates(whole, tuner)
    noted = zeros.held(model)
    plain = fold(whole, masked=tuner.keep_zeros, keep=SAVING)
    zeros.restore(plain, noted)
    sparing.spare_nothing(plain)
    return masks.put_back(plain)
