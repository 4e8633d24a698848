"""Checks that need the model's shape and the data, made before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import check_statistics
from ffnkit.recipe.learnt import check_learnt
from ffnkit.recipe.searching import check_searcher
from ffnkit.recipe.sources import (
    Source,
    calibration_texts,
    expand,
    method_of,
    neutral_texts,
    statistics_of,
    tuner_of,
)
from ffnkit.recipe.state import distilled, folder_digest
from ffnkit.tune.scoring import with_score
from ffnkit.tune.tracking import trackers

if TYPE_CHECKING:
    from ffnkit.recipe.schema import Recipe


WHOLE = ("heads", "layer-drop", "ffn-drop")  # ways of pruning that leave the weights of FFNs as they are


def preflight(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> tuple[str, str]:
    """Digests of the model and of the data, after every check that is cheap.

    Args:
        say: takes lines on the rows: how many, what labels are, what was carved out.

    Raises:
        FfnkitError: no such model or tokenizer, layers or a width that do not fit an arm's model, data that lack
            columns or labels. The line names the arm or the field.
    """
    check_searcher(recipe)
    for name in recipe.arms:
        trackers(recipe.tune_of(name).report_to)
    source = Source(recipe)
    changed = {name: arm for name, arm in recipe.arms.items() if arm.compressed or arm.prune}
    if changed:
        from ffnkit.budget.sizes import room

        empty = source.empty()
        for name, arm in changed.items():
            try:
                if arm.compressed:
                    method = method_of(arm, recipe.seeds[0])
                    method.chosen(empty)
                    with_score(method, source.task, None, None)  # says where the task has no such metric
                    if recipe.calibration.statistics is not None:
                        check_statistics(method)
                    check_learnt(arm.settings, method, empty)
                    if "heal" in recipe.stages:
                        recipe.heal.check_beside(method)
                    if arm.budget is not None:
                        room(empty, arm.budget, method.layers, arm.multiple)
                for spec in arm.prune:
                    pruning = methods.build(spec.method, **spec.settings)
                    if arm.compressed and spec.method not in WHOLE and getattr(method, "extras", False):
                        found = f"{method.name} leaves layers that share an FFN something of their own"
                        raise FfnkitError(f"pruning by {spec.method}", found, "Set extras: false")
                    pruning.chosen(empty)
                    check_learnt(spec.settings, pruning, empty, tuner_of(recipe, name))
            except FfnkitError as error:
                raise error.within(f"arms.{name}") from None
    try:
        for file in calibration_texts(recipe):
            if not os.path.isfile(file):
                raise FfnkitError(f"text {file}", "there is no such file", "Check the path")
        _ = statistics_of(recipe)
    except FfnkitError as error:
        raise error.within("calibration") from None
    _targets(recipe, source)
    _ = source.tokenizer
    for split in ("train", "dev", "report"):
        if len(getattr(source.splits, split)) == 0:
            raise FfnkitError(f"the {split} split of {source.task.name}", "has no rows", "Give more data")
    sizes = ", ".join(f"{len(getattr(source.splits, split))} {split}" for split in ("train", "dev", "report"))
    say(f"{source.task.name}: {sizes} rows")
    for note in source.splits.notes:
        say(f"  {note}")
    if recipe.forgetting is not None:
        try:
            neutral_texts(recipe.forgetting)
        except FfnkitError as error:
            raise error.within("forgetting") from None
    if recipe.judge is not None:
        _judges(recipe, source)
    if recipe.lm_eval is not None:
        _asks_the_harness(recipe, source)
    if any(distilled(recipe, name) for name in recipe.arms):
        _distils(recipe, source)
    folder = Path(source.model_name)
    return (folder_digest(folder) if os.path.isdir(folder) else source.model_name), source.data_digest()


def _targets(recipe: Recipe, source: Source) -> None:
    """Refuse a tuner that finds none of the linears that it names in a model that is tuned as it is."""
    from ffnkit.model.targets import targets

    tuners = {name: tuner_of(recipe, name) for name, arm in recipe.arms.items() if not arm.compressed}
    named = {name: tuner for name, tuner in tuners.items() if hasattr(tuner, "targets")}
    if not named or "tune" not in recipe.stages:
        return
    empty = source.empty()
    for name, tuner in named.items():
        try:
            targets(empty, tuner.targets, getattr(tuner, "layers", "all"))
        except FfnkitError as error:
            raise error.within(f"arms.{name}.tuner") from None


def _judges(recipe: Recipe, source: Source) -> None:
    """Refuse a judge where nothing is written that it could compare, and a local one that is not there."""
    from ffnkit.io.loading import check_name
    from ffnkit.recipe.sources import expand_model

    task, settings = source.task, recipe.judge
    try:
        if task.kind not in ("generation", "instruction") or task.metrics == ("perplexity",):
            what = f"task {task.name} writes no answers" if task.kind != "instruction" else "no answer is generated"
            raise FfnkitError("judge", what, "Leave it out, or name a metric of text")
        if settings is not None and settings.url is None:
            check_name(expand_model(settings.model))
    except FfnkitError as error:
        raise error if error.asked == "judge" else error.within("judge") from None


def _asks_the_harness(recipe: Recipe, source: Source) -> None:
    """Refuse tasks that the harness does not know, and a model that it cannot ask."""
    from ffnkit.report import harness

    assert recipe.lm_eval is not None
    try:
        harness.check(recipe.lm_eval)
        harness.check_writes(source.empty(), recipe.lm_eval)
    except FfnkitError as error:
        raise error.within("lm_eval") from None


def _distils(recipe: Recipe, source: Source) -> None:
    """Refuse a teacher without a trained head where its answers are wanted, and a text that is not there."""
    settings = recipe.distil
    try:
        if settings.text is not None and not os.path.isfile(Path(expand(settings.text))):
            raise FfnkitError(f"text {settings.text}", "there is no such file", "Check the path")
        if settings.teacher is not None or settings.objective != "layers":
            source.teacher(recipe.seeds[0])
    except FfnkitError as error:
        raise error.within("distil") from None
