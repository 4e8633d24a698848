"""The model card of a unit's checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffnkit.checkpoint.added import base_of
from ffnkit.checkpoint.export import written_widths
from ffnkit.io import quickstart
from ffnkit.io.architectures import is_own
from ffnkit.model.linear import added_to
from ffnkit.recipe.searching import found_of, rate_of
from ffnkit.recipe.sources import method_of
from ffnkit.recipe.state import Unit, unit_of, zeros_of
from ffnkit.report import environment
from ffnkit.report.card import CardInfo, Form, LayerWidth, Metric, model_card
from ffnkit.report.licence import licence_of
from ffnkit.tune import tuners

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnkit.recipe.schema import Recipe
    from ffnkit.tasks import AnyTask


def card_of(
    recipe: Recipe,
    unit: Unit,
    model: PreTrainedModel,
    task: AnyTask,
    before: dict[str, int],
    form: Form,
) -> str:
    """What the card says of how this checkpoint came to be and what was measured on it.

    Args:
        before: width of each FFN of the uncompressed model, by name.
    """
    arm = recipe.arms[unit.arm]
    evaluated = unit.marker("evaluate") or {}
    budget = {
        key: value for key, value in arm if key in ("budget", "multiple", "uniform", "target") and value is not None
    }
    settings: dict[str, Any] = {"seed": unit.seed, **budget, **arm.settings} if arm.compressed else {}
    return model_card(
        CardInfo(
            base_model=quickstart.HUB if recipe.model == quickstart.NAME else recipe.model,
            form="added" if added_to(model) else form,
            method=method_of(arm, unit.seed).name if arm.compressed else None,
            settings=settings,
            layers=_widths(model, before, form) if arm.compressed else (),
            metrics=_metrics(recipe, unit, task, evaluated.get("metrics", {})),
            training=_training(recipe, unit),
            figures=_counts(evaluated) | _zeros(recipe, unit, form),
            versions=environment.versions(),
            notes=[recipe.notes] if recipe.notes else [],
            auto_class=task.auto_class(model.config).__name__,
            own_class=is_own(model),
            pipeline_tag=task.pipeline_tag,
            license=licence_of(recipe.model),
        )
    )


def _counts(evaluated: dict[str, Any]) -> dict[str, str]:
    named = {"parameters": "parameters", "ffn_parameters": "of them in FFNs", "flops_per_token": "FLOPs a token"}
    return {name: f"{evaluated[key]:,}" for key, name in named.items()} if evaluated else {}


def _zeros(recipe: Recipe, unit: Unit, form: Form) -> dict[str, str]:
    """The share of zeros in this form, of an arm that was pruned."""
    found = zeros_of(recipe, unit)
    value = found.get("zeros" if form == "apart" else "zeros_merged")
    return {"zeros in linears": f"{value:.1%}"} if found.get("zeros") and value is not None else {}


def _widths(model: PreTrainedModel, before: dict[str, int], form: Form) -> tuple[LayerWidth, ...]:
    from ffnkit.model.finding import ffns

    now = {ffn.name: ffn.width for ffn in ffns(base_of(model))}
    held = written_widths(model) if form == "standard" else {}
    return tuple(LayerWidth(name, width, now.get(name), held.get(name)) for name, width in before.items())


def _metrics(recipe: Recipe, unit: Unit, task: AnyTask, found: dict[str, float]) -> tuple[Metric, ...]:
    first = next(iter(recipe.arms))
    reference = (unit_of(unit.folder.parents[2], first, unit.seed).marker("evaluate") or {}).get("metrics", {})
    whole = reference if unit.arm != first and not recipe.arms[first].compressed else {}
    dataset, config = task.hub[0] if task.hub else task.name, task.hub[1] if len(task.hub) > 1 else None
    split = "validation" if task.hub else "report"
    return tuple(
        Metric(
            name,
            value,
            dataset=dataset,
            config=config,
            split=split,
            task=task.pipeline_tag,
            baseline=whole.get(name),
        )
        for name, value in found.items()
    )


def _training(recipe: Recipe, unit: Unit) -> dict[str, Any]:
    if "tune" not in recipe.stages:
        return {}
    tuner = recipe.tuner_of(unit.arm)
    told = tuners.told(tuner.name, tuner.settings)
    fields = ("learning_rate", "schedule", "warmup", "weight_decay", "batch_size", "max_length", "precision")
    tune = recipe.tune_of(unit.arm, rate_of(unit))
    steps = (unit.marker("tune") or {}).get("steps")
    compared = {"layers": "hidden states", "logits": "logits", "both": "hidden states and logits"}
    distilled = {"distillation before tuning": compared[recipe.distil.objective]} if unit.marker("distil") else {}
    pruned = {"pruned afterwards by": [spec.model_dump() for spec in recipe.arms[unit.arm].prune]}
    recovered = {"steps of recovery": (unit.marker("recover") or {}).get("steps")}
    searched = {"learning rates tried": len(found["trials"])} if (found := found_of(unit)) else {}
    drawn = recipe.arms[unit.arm].tickets
    ticket = {"drawn before by iterative magnitude pruning": drawn.model_dump()} if drawn is not None else {}
    return {
        "tuner": {"name": tuner.name, **told} if told else tuner.name,
        "steps": steps,
        **{name: getattr(tune, name) for name in fields},
        **searched,
        **ticket,
        **distilled,
        **(pruned if unit.marker("prune") else {}),
        **(recovered if unit.marker("recover") else {}),
        "seed": unit.seed,
    }
