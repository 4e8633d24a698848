"""What models are judged on: rows of a task, or text alone; and what they heal on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import is_shown
from ffnkit.recipe.state import file_digest
from ffnkit.search.chances import Metric, Rows
from ffnkit.tasks.metrics import greater_is_better

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ffnkit.search.settings import SearchRecipe
    from ffnkit.tune.healing.settings import HealSettings

Part = Literal["dev", "report"]
ROWS = 32  # of train that a healing draws from, at least
TOKENS = 8192  # of text that models are chosen by, and of what is reported


@dataclass(frozen=True)
class Scored:
    """A metric of a model on a part of the data, and what it gave for each row, where that is known."""

    value: float
    rows: Rows


def ground_of(recipe: SearchRecipe) -> Ground:
    """The task's rows where one is named, else text."""
    return Ground(recipe) if recipe.task is None else TaskGround(recipe)


class Ground:
    """Text alone: perplexity on parts of it that no fit sees."""

    metric = "perplexity"

    def __init__(self, recipe: SearchRecipe) -> None:
        from ffnkit.recipe.sources import expand, expand_model
        from ffnkit.tune.calibration_text import shares

        self.recipe = recipe
        self.name = expand_model(recipe.model)
        text = {expand(file): share for file, share in shares(recipe.calibration.text)} or None
        self.calibrating = recipe.calibration.model_copy(update={"text": text})

    @property
    def more(self) -> bool:
        """Whether more of the metric is better."""
        return greater_is_better(self.metric)

    @property
    def where(self) -> str:
        """The data in words."""
        files = self.calibrating.text
        return ", ".join(Path(file).name for file in files) if isinstance(files, dict) else "text of many kinds"

    @property
    def device(self) -> torch.device:
        """Where models run."""
        import torch

        here = self.recipe.tune.device == "auto" and torch.accelerator.is_available()
        return cast("torch.device", torch.accelerator.current_accelerator()) if here else torch.device("cpu")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's, or the one that the recipe names; it pads with its end of text where it has no padding."""
        from ffnkit.tasks.models import load_tokenizer

        return load_tokenizer(self.recipe.tokenizer or self.name)

    def facts(self) -> Any:
        """What the data are. Raises FfnkitError where a file is not there."""
        files = self.calibrating.text
        return [file_digest(file) for file in files] if isinstance(files, dict) else None

    def check(self) -> None:
        """Raises FfnkitError where a text that is named has no parts to choose by and to report on."""
        from ffnkit.tune.calibration import own_texts

        for part in ("decide", "report"):
            if self.calibrating.text is not None and not own_texts(self.tokenizer, self.calibrating, part):
                what = "it is too short, or too much alike, to keep parts of it apart from what is fitted"
                do = "Give more text, or none: text of many kinds takes its place"
                raise FfnkitError(f"searching by {self.where}", what, do)

    def original(self, out: Path) -> PreTrainedModel:
        """The model that all are compared with."""
        return self.open(self.name)

    def open(self, folder: str | Path) -> PreTrainedModel:
        """A model of a search, on the device."""
        from ffnkit.io.architectures import load_any

        return load_any(str(folder)).to(self.device)  # type: ignore[arg-type]

    def calibration(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        """Batches for methods that measure activations."""
        from ffnkit.tune import calibration_batches

        return calibration_batches(model, self.tokenizer, self.calibrating)

    def healing(self, model: PreTrainedModel, settings: HealSettings, seed: int) -> tuple[Any, Any]:
        """Batches to learn from with their shares, and held-out ones by name."""
        from ffnkit.tune.healing.data import healing_data

        return healing_data(model, self.tokenizer, settings, self.calibrating, seed=seed)

    def scored(self, model: PreTrainedModel, part: Part) -> Scored:
        """The metric of a model."""
        import torch

        from ffnkit.tasks.running import evaluating, row_losses

        sums, counts = [], []
        with torch.no_grad(), evaluating(model):
            for batch in self._texts(model, part):
                placed = {name: value.to(model.device) for name, value in batch.items()}
                loss, count = row_losses(model, placed)
                sums.append(loss.cpu().numpy())
                counts.append(count.cpu().numpy())
        rows = {"loss": np.concatenate(sums), "tokens": np.concatenate(counts)}
        return Scored(self.of_rows(part)(rows), rows)

    def of_rows(self, part: Part) -> Metric:
        """The metric of rows."""
        return lambda rows: float(np.exp(min(rows["loss"].sum() / max(rows["tokens"].sum(), 1), 700.0)))

    def _texts(self, model: PreTrainedModel, part: Part) -> list[dict[str, Any]]:
        from ffnkit.tune.apart import is_masked, kept_apart

        if is_masked(model) or getattr(model, "get_output_embeddings", lambda: None)() is None:
            what = f"{type(model).__name__} does not write text, so it has no perplexity"
            raise FfnkitError("searching by text alone", what, "Name a task")
        places = kept_apart(model, self.tokenizer, self.calibrating, "decide" if part == "dev" else "report", TOKENS)
        return places.get("in") or places["out"]


class TaskGround(Ground):
    """Rows of a task: the model heals on those of train without their labels, dev chooses, report is told once."""

    def __init__(self, recipe: SearchRecipe) -> None:
        super().__init__(recipe)
        from ffnkit.recipe.schema import recipe_from
        from ffnkit.recipe.sources import Source

        given = {"name", "model", "tokenizer", "task", "data_dir", "limits", "calibration", "tune"}
        plain = recipe.model_dump(mode="json", include=given, exclude_none=True)
        plain["task"] = recipe.task.model_dump(mode="json", exclude_none=True)  # type: ignore[union-attr]
        self.source = Source(recipe_from({**plain, "arms": {"original": {}}}))
        self.name, self.task = self.source.model_name, self.source.task
        metric = recipe.tune.best_metric or (recipe.task.metric if recipe.task else None)
        self.metric = metric if metric in self.task.metrics else self.task.main_metric

    @property
    def where(self) -> str:
        """The task in words."""
        return self.recipe.task.where if self.recipe.task else ""

    @cached_property
    def tokenizer(self) -> Any:
        """As the task wants it."""
        return self.source.tokenizer

    def check(self) -> None:
        """Rows are split as the source is read."""

    def facts(self) -> Any:
        """What the rows are."""
        return self.source.data_digest()

    def original(self, out: Path) -> PreTrainedModel:
        """The model with its head for the task: as it is where that is trained, else tuned once, in ``out``."""
        import ffnkit
        from ffnkit.tune import train

        tuning = out.with_name(f".{out.name}.tuning")
        if out.is_dir():
            shutil.rmtree(tuning, ignore_errors=True)
            return self.open(out)
        try:
            return self.open(self.name)
        except FfnkitError:
            model = self.source.model(self.recipe.search.seed)
        found = train(
            model,
            self.tokenizer,
            self.task,
            self.source.splits,
            self.recipe.tune,
            seed=self.recipe.search.seed,
            out_dir=tuning,
            progress=is_shown(),
        )
        ffnkit.save(found.model, out, tokenizer=self.tokenizer)
        shutil.rmtree(tuning, ignore_errors=True)
        return found.model.to(self.device).eval()  # type: ignore[arg-type]

    def open(self, folder: str | Path) -> PreTrainedModel:
        """With the task's head, which is trained."""
        model = self.task.load_model(str(folder), tokenizer=self.tokenizer, trained_head=True)
        return cast("PreTrainedModel", model.to(self.device).eval())

    def calibration(self, model: PreTrainedModel) -> Any:
        """Rows of train, or the statistics that take their place."""
        return self.source.calibration(model, self.recipe.search.seed)

    def healing(self, model: PreTrainedModel, settings: HealSettings, seed: int) -> tuple[Any, Any]:
        """Rows of train, and some of dev to decide on."""
        from ffnkit.tune.healing.data import healing_data

        splits = self.source.splits
        rows = {"task": self.task, "rows": self._drawn(settings.tokens // 2, seed), "dev": splits.dev}
        return healing_data(model, self.tokenizer, settings, self.calibrating, seed=seed, **rows)

    def _drawn(self, count: int, seed: int) -> Any:
        """So many rows of train: more than are learned from, so that not all of them need be read each time."""
        import torch

        rows: Any = self.source.splits.train
        if len(rows) <= max(count, ROWS):
            return rows
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        return rows.select(order[: max(count, ROWS)].tolist())

    def scored(self, model: PreTrainedModel, part: Part) -> Scored:
        """The metric on all rows of the part."""
        from ffnkit.tune import assess

        settings = self.recipe.tune
        sizes: dict[str, Any] = {"batch_size": settings.eval_batch_size, "max_length": settings.max_length}
        found = assess(model, self.tokenizer, self.task, self._rows(part), **sizes)
        rows: Mapping[str, np.ndarray] = {}
        if found.outputs is not None:
            rows = {"outputs": np.asarray(found.outputs), "labels": self._labels(part)}
        return Scored(float(found.metrics[self.metric]), rows)

    def of_rows(self, part: Part) -> Metric:
        """The task's own metric of outputs and labels."""
        return lambda rows: float(self.task.compute_metrics(rows["outputs"], rows["labels"])[self.metric])  # type: ignore[attr-defined]

    def _rows(self, part: Part) -> Any:
        return self.source.splits.dev if part == "dev" else self.source.splits.report

    def _labels(self, part: Part) -> np.ndarray:
        rows = self._rows(part)
        return np.asarray(rows["labels" if "labels" in rows.column_names else self.task.label])
