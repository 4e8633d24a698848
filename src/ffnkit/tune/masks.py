"""Factors and masks off a model while a tuner adapts its linears; the masks on again afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel

from ffnkit.edits import Edit, Mask
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.nn.expert_weights import buffer_name
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import is_reparametrized, oriented
from ffnkit.surgery.apply import carry_out, fold
from ffnkit.surgery.description import standing_apart

if TYPE_CHECKING:
    from ffnkit.tune.lifecycle import Preparation

logger = logging.getLogger(__name__)
_MASKS = "_ffnkit_masks"  # on a model that is tuned: the masks that were on it, as edits


def set_aside(model: nn.Module, preparation: Preparation) -> set[str]:
    """Fold factors and masks, in place, so that what adapts linears finds plain ones; thin pairs stay, as two linears.

    Folding stays when the tuner is undone, but for the masks: an adapter merged into a factor would be multiplied by
    it, and it makes no difference where the factor stands.

    Returns:
        The names of weights whose masks come on again.
    """
    if not any(is_reparametrized(module) and not isinstance(module, LowRank) for module in model.modules()):
        return set()
    masks = list(masks_of(model))
    named = {f"{name}.weight" for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Masked)}
    fold(cast(PreTrainedModel, model), keep=(LowRank.kind,))
    preparation.from_here()
    if masks:
        what = f"{len(masks)} masks come on again at the end, and what is trained at their zeros goes"
        logger.warning("tuning %s: %s", type(model).__name__, what)
        object.__setattr__(model, _MASKS, masks)
        preparation.afterwards(partial(_mask, masks))
    return named


def put_back(model: nn.Module) -> nn.Module:
    """The masks that :func:`set_aside` took off, with zeros again where they have some."""
    _mask(taken(model), model)
    return model


def taken(model: nn.Module) -> list[Edit]:
    """The masks that are off the model; it forgets them."""
    return cast(list[Edit], model.__dict__.pop(_MASKS, []))


def say_lost(model: nn.Module) -> None:
    """Say that masks will be gone where updates stay on a model."""
    count = len(list(masks_of(model)))
    if count:
        what = f"{count} masks go, for updates stay on the model; their zeros stay below these"
        logger.warning(
            "tuning %s: %s, and keep_zeros keeps them when the updates are merged", type(model).__name__, what
        )


def masks_of(model: nn.Module) -> Iterator[Edit]:
    """The masks on a model as the edits that put them there, in every layer that shares one."""
    found = ffns(model) if has_ffns(model) else []
    for ffn in found:
        for site, row in ffn.special.items():
            if row["kind"] == Masked.kind:
                for owner in ffn.owners:
                    yield Mask.of(owner, site, _of(ffn, site))
    for name, layer in standing_apart(model, found).items():
        if isinstance(layer, Masked):
            yield Mask.of(name, "", oriented(layer.mask, layer.transposed))


def _of(ffn: FFN, site: str) -> Any:
    if ffn.layout.experts:
        mask = getattr(ffn.module, buffer_name(Masked.kind, site))
        return mask.mT if ffn.layout.transposed else mask
    layer: Any = ffn.linear(site)
    return oriented(layer.mask, layer.transposed)


def _mask(masks: list[Edit], model: nn.Module) -> None:
    if masks:
        carry_out(model, masks)
