"""The search of an arm's learning rate: trials on a part of train, scored on rows of it that are kept apart."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError, WritingError
from ffnkit.io.files import read_json
from ffnkit.recipe.state import Unit, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from ffnkit.recipe.rates import Rates, Search
    from ffnkit.recipe.schema import Recipe
    from ffnkit.recipe.sources import Source

Trial = dict[str, Any]  # learning_rate, score (None where there is none), error where it failed
_STARTS = 10  # trials at random before Optuna models the scores, at most and of half the budget


def found_of(unit: Unit) -> dict[str, Any]:
    """What a search left for the arm of a unit, whichever of its seeds made it; {} before its end."""
    found = read_json(_path(unit)) or {}
    return found if "learning_rate" in found else {}


def rate_of(unit: Unit) -> float | None:
    """The rate that a search found for the arm of a unit; None where there was none."""
    return found_of(unit).get("learning_rate")


def _path(unit: Unit) -> Path:
    return unit.folder.parent / "search.json"


def search(recipe: Recipe, unit: Unit, source: Source, fresh: Callable[[], Any], bars: bool) -> dict[str, Any]:
    """Try the arm's rates one after the other, from where an earlier call stopped; the marker of the stage.

    The first seed that comes here searches, the others take what it found. Trials train on train without the rows that
    are kept apart; these choose the checkpoint and give the score. ``dev`` and ``report`` are not read.

    Args:
        fresh: a new model as it is before tuning.

    Raises:
        FfnkitError: no trial has a score.
    """
    assert recipe.search is not None
    if not (found := found_of(unit)):
        found = _search(recipe, unit, source, fresh, bars)
    return {name: found[name] for name in ("learning_rate", "score", "metric", "rows", "seed")}


def _search(recipe: Recipe, unit: Unit, source: Source, fresh: Callable[[], Any], bars: bool) -> dict[str, Any]:
    from ffnkit.recipe.sources import tuner_of
    from ffnkit.tasks.metrics import greater_is_better
    from ffnkit.tune.arguments import chosen_metric

    wanted: Search = recipe.search  # type: ignore[assignment]
    rates = recipe.rates_of(unit.arm)
    metric = chosen_metric(source.task, recipe.trial_of(unit.arm, 1.0))
    more = greater_is_better(metric)
    splits, rows = _apart(source, wanted)
    begun = read_json(_path(unit)) or {}
    trials: list[Trial] = begun.get("trials", []) if begun.get("seed") == unit.seed else []
    about = {"metric": metric, "rows": rows, "seed": unit.seed}
    while len(trials) < rates.budget:
        number = len(trials)
        rate = rates.values[number] if rates.values else _suggested(rates, trials, more, wanted.seed)
        settings = recipe.trial_of(unit.arm, rate)
        out = unit.work / f"search-{number}"
        score, error = _tried(recipe, unit, source, fresh, splits, settings, tuner_of(recipe, unit.arm), out, bars)
        trials.append({"learning_rate": rate, "score": score} | ({"error": error} if error else {}))
        write_json(_path(unit), {**about, "trials": trials})
    scored = [trial for trial in trials if trial["score"] is not None]
    if not scored:
        why = next((trial["error"] for trial in trials if "error" in trial), "no score is a finite number")
        raise FfnkitError(f"searching a rate for {unit.arm}", f"no trial has a score ({why})", "Try other rates")
    best = (max if more else min)(scored, key=lambda trial: trial["score"])  # the first of equal ones
    found = {**about, "learning_rate": best["learning_rate"], "score": best["score"], "trials": trials}
    write_json(_path(unit), found)
    return found


def _tried(
    recipe: Recipe, unit: Unit, source: Source, fresh: Callable[[], Any], splits: Any, settings: Any, tuner: Any,
    out: Path, bars: bool,
) -> tuple[float | None, str]:  # fmt: skip
    """The score of one rate, and why there is none."""
    from ffnkit.tune import train

    try:
        result = train(
            fresh(),
            source.tokenizer,
            source.task,
            splits,
            settings,
            tuner=tuner.model_copy(update={"adapter_dir": None}) if hasattr(tuner, "adapter_dir") else tuner,
            seed=unit.seed,
            out_dir=out,
            progress=bars,
            generation=recipe.generation,
        )
        score = result.best_metric
        del result
    except WritingError:  # tells nothing of the rate
        raise
    except FfnkitError as error:
        return None, str(error)
    finally:
        gc.collect()
    if score is None or not math.isfinite(score):
        return None, "it was not evaluated" if score is None else f"its score is {score}"
    return score, ""


def _apart(source: Source, wanted: Search) -> tuple[Any, int]:
    """The splits of a trial, whose dev is drawn from train, and how many rows it has: classes in their proportions, and
    what belongs together (the questions on a story) on one side."""
    import dataclasses

    from ffnkit.tasks.rows.splitting import carve, share

    splits = source.splits
    train: Any = splits.train
    asked = f"search.rows of {source.task.name}"
    count = share(len(train), wanted.rows, asked)
    labels = train["label"] if "label" in train.column_names else []
    classes = bool(len(labels)) and all(isinstance(label, int) for label in labels)
    table = {"row": list(range(len(train)))} | ({"label": list(labels)} if classes else {})
    if splits.together is not None:
        table[splits.together] = list(train[splits.together])
    drawn = carve(table, "label", count, wanted.seed, classes, splits.together)
    rest, apart = (part["row"] for part in drawn)
    trial = dataclasses.replace(splits, train=train.select(rest), dev=train.select(apart))
    return trial, len(apart)


# --- ranges ---------------------------------------------------------------------------------------------------------


def check_searcher(recipe: Recipe) -> None:
    """Raises FfnkitError where a range is to be searched and Optuna is not there."""
    if recipe.search is not None and any(not recipe.rates_of(arm).values for arm in recipe.arms):
        _optuna()


def _optuna() -> Any:
    try:
        import optuna  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        do = "pip install 'ffnkit[search]', or list the rates"
        raise FfnkitError("search.learning_rate as a range", "Optuna is not installed", do) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggested(rates: Rates, trials: list[Trial], more: bool, seed: int) -> float:
    """The next rate of a range by Optuna's TPE, log-uniform at first; of the trials so far alone, resumed or not."""
    optuna = _optuna()
    space = {"learning_rate": optuna.distributions.FloatDistribution(rates.low, rates.high, log=True)}
    starts = min(_STARTS, max(1, rates.budget // 2))
    sampler = optuna.samplers.TPESampler(seed=seed + len(trials), n_startup_trials=starts)
    study = optuna.create_study(direction="maximize" if more else "minimize", sampler=sampler)
    states = optuna.trial.TrialState
    for trial in trials:  # pruned ones rank below all that have a score; failed ones would be forgotten
        state = states.PRUNED if trial["score"] is None else states.COMPLETE
        params = {"learning_rate": trial["learning_rate"]}
        past = optuna.trial.create_trial(state=state, value=trial["score"], params=params, distributions=space)
        study.add_trial(past)
    return float(study.ask(space).params["learning_rate"])
