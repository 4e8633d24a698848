"""The first arm, which the others are compared with, where it may be at work beside them."""

from __future__ import annotations

import time
from contextlib import suppress

from ffnkit.errors import FfnkitError
from ffnkit.recipe.schema import Recipe
from ffnkit.recipe.state import Unit, unit_of

POLL, IDLE = 0.2, 20.0  # seconds


def await_reference(recipe: Recipe, unit: Unit) -> None:
    """Wait until the first arm, which may be at work beside us, has the figures that our card compares with."""
    reference, idle = unit_of(unit.folder.parents[2], next(iter(recipe.arms)), unit.seed), 0.0
    if reference == unit or "evaluate" not in recipe.stages:
        return
    while reference.begun and not reference.over and reference.marker("evaluate") is None and idle < IDLE:
        time.sleep(POLL)
        with suppress(FfnkitError), reference.held(wait=0.0):
            idle += POLL  # nobody is at work on it
