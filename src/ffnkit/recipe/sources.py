"""What a unit is made from: the model, the tokenizer, the data, the method and the tuner that a recipe names."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.recipe.schema import NAMES, Arm, Recipe
from ffnkit.recipe.settings import fit_to, has_setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ffnkit.calibration.stored import StatisticsFile
    from ffnkit.tasks import AnyTask, Splits
    from ffnkit.tune import CalibrationSettings, TrainSettings

HUB_SET = "hub:"  # what the name of a data set of the hub begins with


def expand(path: str) -> str:
    """A path with ``~`` and ``$NAME`` put in. What names something on the hub stays as it is."""
    return path if path.startswith(HUB_SET) else os.path.expanduser(os.path.expandvars(path))


def expand_model(name: str) -> str:
    """The same of a model's name: what stands in the environment must not go over the network in a hub name.

    Raises:
        FfnkitError: with ``$NAME`` or ``~`` put in it is no path.
    """
    path = expand(name)
    if path == name or os.path.isabs(path) or path.startswith(".") or os.path.isdir(path):
        return path
    found = "what stands for $NAME is put in in paths only, and there is no such folder"
    raise FfnkitError(f"model {name}", found, "Write the name out, or give a path, such as $HOME/model or ./model")


def model_name(recipe: Recipe) -> str:
    """The folder or hub name of the model.

    Raises:
        FfnkitError: a path that leads nowhere, or to no model.
    """
    from ffnkit.io.loading import check_name

    return check_name(expand_model(recipe.model))


def method_of(arm: Arm, seed: int, widths: Any = None) -> Any:
    """The arm's method; its seed is the unit's unless the arm sets one.

    Args:
        widths: what the arm's budget gives, once it is known; until then such a method has the whole width.
    """
    from ffnkit import methods

    if arm.target is not None:
        return fit_to(arm.target)
    settings = arm.placed if widths is None else {**arm.settings, "width": widths}
    return methods.build(arm.method, **seeded(arm.method, settings, seed))


def seeded(method: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Settings of a method with the unit's seed, unless they have one."""
    return {"seed": seed, **settings} if has_setting(method, "seed") else settings


def widths_of(arm: Arm, model: Any, data: Any) -> Any:
    """Widths by layer where the arm has a budget, else None. A method that sees no data gets them from the weights."""
    if arm.budget is None:
        return None
    import ffnkit

    layers = method_of(arm, 0).layers
    return ffnkit.allocate(
        model, arm.budget, layers=layers, data=data, multiple=arm.multiple, uniform=bool(arm.uniform)
    )


def tuner_of(recipe: Recipe, arm: str) -> Any:
    """The arm's tuner as ``ffnkit.tune.train`` takes it."""
    from ffnkit.tune import get

    return get(recipe.tuner_of(arm).model_dump())


def neutral_texts(path: str) -> list[str]:
    """The texts that forgetting is measured on. Raises FfnkitError where the file cannot be read or has none."""
    from ffnkit.tasks.language_modelling.sets import read_texts

    return read_texts(expand(path))


def calibration_texts(recipe: Recipe) -> dict[str, float]:
    """The calibration's text files and their shares. Raises FfnkitError where these do not sum up."""
    from ffnkit.tune.calibration_text import shares

    return {expand(file): share for file, share in shares(recipe.calibration.text)}


def statistics_of(recipe: Recipe) -> StatisticsFile | None:
    """The statistics that take the place of calibration data. Raises FfnkitError where the file cannot be read."""
    from ffnkit.calibration.stored import StatisticsFile

    file = recipe.calibration.statistics
    return None if file is None else StatisticsFile(expand(file))


def task_of(recipe: Recipe) -> AnyTask:
    """The task that a recipe names, or one of its files."""
    from ffnkit import tasks

    fields = recipe.task.choice()
    files = {name: expand(fields[name]) for name in ("train", "validation", "test") if fields[name]}
    return tasks.choose({field: f"task.{name}" for field, name in NAMES.items()}, **{**fields, **files})


class Source:
    """Loads the parts of a recipe, each once; the model anew each time that it is asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model_name = model_name(recipe)

    @cached_property
    def task(self) -> AnyTask:
        """The task."""
        return task_of(self.recipe)

    @cached_property
    def splits(self) -> Splits:
        """The same rows for every arm and seed."""
        limits = self.recipe.limits
        data_dir = expand(self.recipe.data_dir) if self.recipe.data_dir else None
        return self.task.splits(data_dir, seed=0, dev=limits.dev, train_limit=limits.train, report_limit=limits.report)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, or the one that the recipe names."""
        name = self.recipe.tokenizer
        return self.task.load_tokenizer(expand_model(name) if name else self.model_name)

    def add_harness(self, found: dict[str, Any], model: PreTrainedModel, progress: bool) -> None:
        """Add what lm-evaluation-harness measures of a model, with the tokenizer as it lies beside the source."""
        from ffnkit.report.harness import harness

        settings, name = self.recipe.lm_eval, self.recipe.tokenizer
        if settings is not None:
            measured = harness(model, settings, expand_model(name) if name else self.model_name, progress=progress)
            found |= {"metrics": found["metrics"] | measured.named(), "lm_eval": measured.to_dict()}

    @property
    def device(self) -> torch.device:
        """Where the Trainer puts the model."""
        import torch

        accelerated = self.recipe.tune.device == "auto" and torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")  # type: ignore[return-value]

    def model(self, seed: int) -> PreTrainedModel:
        """The uncompressed model; its new head is the same in every arm that has this seed."""
        from transformers import set_seed

        set_seed(seed)
        return self.task.load_model(self.model_name, tokenizer=self.tokenizer)

    def teacher(self, seed: int) -> PreTrainedModel:
        """The model that distillation learns from: the uncompressed one, or the one that the recipe names.

        Raises:
            FfnkitError: its head is not trained, and its answers are asked for.
        """
        settings = self.recipe.distil
        if settings.teacher is None and settings.objective == "layers":
            return self.model(seed)
        name = self.model_name if settings.teacher is None else expand_model(settings.teacher)
        trained = settings.objective != "layers"
        return self.task.load_model(name, tokenizer=self.tokenizer, trained_head=trained)

    def empty(self) -> PreTrainedModel:
        """The shape of :meth:`model` without its weights, with the head and the tokens of the task; what a config alone
        does not tell (a compact checkpoint, updates beside the base) is loaded."""
        import torch

        from ffnkit.io.apart import has_adapters
        from ffnkit.io.architectures import is_ffnkit_config, read_config
        from ffnkit.io.loading import open_errors
        from ffnkit.tasks.generation.writer import grow

        config = read_config(self.model_name)
        if is_ffnkit_config(config) or has_adapters(self.model_name):
            return self.model(0)
        if (labels := getattr(self.task, "num_labels", None)) is not None:
            config.num_labels = labels
        with open_errors(f"model {self.recipe.model}"), torch.device("meta"):
            model: PreTrainedModel = self.task.auto_class(config).from_config(config)
            if tokens := getattr(self.task, "special_tokens", ()):
                grow(model, self.tokenizer, tokens)
        return model

    def calibration(self, model: PreTrainedModel, seed: int) -> list[dict[str, Any]] | StatisticsFile:
        """Batches for methods that measure activations: of the training rows, or of the file that is named; or the
        statistics in their place."""
        from ffnkit.tune import calibration_batches

        if (opened := statistics_of(self.recipe)) is not None:
            opened.check(model)
            return opened
        rows = self.splits.train
        return calibration_batches(model, self.tokenizer, self._calibrating, task=self.task, rows=rows, seed=seed)

    @property
    def _calibrating(self) -> CalibrationSettings:
        return self.recipe.calibration.model_copy(update={"text": calibration_texts(self.recipe) or None})

    def healed(self, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        """Heal a compressed model, in place, on what calibrates; how it went comes back."""
        from ffnkit.tune.healing.data import healing_data
        from ffnkit.tune.healing.heal import heal

        recipe, splits = self.recipe, self.splits
        rows = {"task": self.task, "rows": splits.train, "dev": splits.dev}
        parts, held = healing_data(model, self.tokenizer, recipe.heal, self._calibrating, seed=seed, **rows)
        original = self.model(seed).to(self.device)  # type: ignore[arg-type]
        found = heal(model.to(self.device), original, parts, recipe.heal, held=held, seed=seed)  # type: ignore[arg-type]
        return found.to_dict()

    def dev_batches(self, model: PreTrainedModel, settings: TrainSettings) -> list[dict[str, Any]]:
        """All rows of dev with their labels."""
        from ffnkit.tasks.running import encoded_rows
        from ffnkit.tune.calibration import first_batches

        rows = encoded_rows(self.task, self.splits.dev, self.tokenizer, settings.max_length, model)
        size = settings.eval_batch_size
        return first_batches(rows, self.task.collator(self.tokenizer, model), size, -(-len(rows) // size))

    def widths(self) -> dict[str, int]:
        """Width of each FFN before compression, by name."""
        from ffnkit.model.finding import ffns

        return {ffn.name: ffn.width for ffn in ffns(self.empty())}

    def data_digest(self) -> str:
        """Of every row of every split, in order."""
        content = hashlib.sha256()
        for split in (self.splits.train, self.splits.dev, self.splits.report, *self.splits.extra.values()):
            content.update(b"split")
            # where an image is plays no part; what holds rows together is in their texts
            spare = ["image"] if "digest" in split.column_names else [self.splits.together]
            split = split.remove_columns([name for name in spare if name in split.column_names])
            for rows in split.iter(batch_size=8192):
                content.update(json.dumps(rows, sort_keys=True, default=str).encode())
        return content.hexdigest()[:16]
