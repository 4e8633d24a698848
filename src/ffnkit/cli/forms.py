"""In which form a result is saved, what that form saves, and how it is used elsewhere: what the last lines say."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal, cast

from ffnkit.cli import console
from ffnkit.errors import FfnkitError

Form = Literal["auto", "compact", "standard", "both", "apart"]
HELP = (
    "standard: plain from_pretrained; compact: opens with ffnkit; both: two folders; apart: as of tune; "
    "auto: standard, unless compact is smaller or keeps pruned weights zero."
)


def settled(form: str, model: Any) -> str:
    """The form that is written: what "auto" stands for with this model."""
    from ffnkit.checkpoint.sizes import best_form

    return best_form(model) if form == "auto" else form


def elsewhere(form: str, folder: Path | str, model: Any) -> str:
    """How the result is used without and with ffnkit, in one line."""
    from ffnkit.checkpoint.sizes import why_compact
    from ffnkit.io.architectures import is_own
    from ffnkit.surgery.description import description

    name = type(model).__name__
    if form == "standard":
        first = "import ffnkit; " if is_own(model) else ""
        return f"standard, opens everywhere: {first}transformers.{name}.from_pretrained('{folder}')"
    held = why_compact(model)
    if form == "compact" and (held or description(model) is not None):
        what, ways = f", for {held}" if held else "", f"ffnkit exec -- COMMAND, or ffnkit.load('{folder}')"
        return f"compact{what}; elsewhere: {ways}; ffnkit export {folder} --out DIR for tools without ffnkit"
    if form == "compact":
        return f"opens everywhere: transformers.{name}.from_pretrained('{folder}')"
    return f"opens with ffnkit.load('{folder}'); ffnkit export {folder} --out DIR for tools without ffnkit"


def warn_early(model: Any, chosen: Any) -> bool:
    """Say, before anything is planned, where the standard form of what is asked for will save nothing.

    Args:
        model: without weights. chosen: what a method's ``chosen`` gave: FFNs and the widths that they get, or another
            kind of thing, of which nothing is said yet.
    """
    from ffnkit.checkpoint.sizes import FIXED
    from ffnkit.model.config_values import Place, entry
    from ffnkit.model.ffn import FFN
    from ffnkit.model.finding import ffns
    from ffnkit.surgery.description import width_keys

    if not isinstance(chosen, list) or not chosen or not all(isinstance(row, tuple) for row in chosen):
        return False
    if not all(isinstance(ffn, FFN) and isinstance(width, int) for ffn, width in chosen):
        return False
    found = ffns(model)
    keys, new = width_keys(model, found), {ffn.name: width for ffn, width in chosen}
    if all(width == ffn.width for ffn, width in chosen):
        return False
    named = {entry(key) for key in keys.values() if key is not None}
    for place in named:
        group = [(ffn, Place.of(key[1])) for ffn in found if (key := keys[ffn.name]) and entry(key) == place]
        if max(p.said(new.get(ffn.name, ffn.width)) for ffn, p in group) < max(p.said(f.width) for f, p in group):
            return False
    few = f"{len(new)} of {len(found)} FFNs get narrower, and plain transformers has one width for all"
    why = few if named else FIXED.format(type(model).__name__)
    more = ". --layers all saves in every form" if named else ""
    console.say(f"saves nothing as a standard checkpoint: {why}; ffnkit's compact form saves{more}")
    return True


def warn_planned(model: Any, plan: Any) -> None:
    """The same of a plan, before it is applied, healed and measured."""
    from ffnkit.checkpoint.sizes import saves_nothing
    from ffnkit.surgery.meta import rehearse

    with contextlib.suppress(FfnkitError):  # a plan that does not fit is refused where it is applied
        if said := saves_nothing(model, cast(Any, rehearse(model, plan.edits))):
            console.say(said)


def warn_export(model: Any, history: Any, target: str) -> None:
    """The same of a checkpoint that is about to be exported."""
    from ffnkit.checkpoint.nemotron import check_shape
    from ffnkit.checkpoint.standard import padded_widths
    from ffnkit.model.finding import ffns, has_ffns
    from ffnkit.surgery.description import width_keys

    before = {name: width for name, width, _ in history.layers}
    if target != "standard" or not history.narrowed or not has_ffns(model):
        return
    found = ffns(model)
    targets = padded_widths(model, found, width_keys(model, found))
    stays = [targets[ffn.name] >= before.get(owner, 0) for ffn in found for owner in ffn.owners]
    if all(stays) and len(stays) >= len(before):
        way = "the compact form is the small one; its widths open with ffnkit alone"
        with contextlib.suppress(FfnkitError):
            check_shape(model)
            way = "--target nemotron-nas keeps each layer's width for engines that read it"
        console.say(f"saves nothing as a standard checkpoint: its FFNs are written as wide as they were before; {way}")
