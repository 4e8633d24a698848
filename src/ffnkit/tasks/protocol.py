"""What every kind of task offers, so that training, evaluation, recipes and the command line treat all kinds alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from datasets import Dataset

    from ffnkit.tasks.rows.splitting import Splits
    from ffnkit.tasks.settings import GenerationSettings

Collate = Callable[[list[Any]], Mapping[str, Any]]
"""Makes a padded batch of encoded examples."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one split.

    Attributes:
        metrics: every metric of the task.
        loss: mean over examples of a classifier, over target tokens of a model that writes.
        speed: figures of speed by name, such as "generated_per_second"; they vary from run to run.
        predictions: of a task that generates a row {"prompt", "prediction", "references"} an input; else none.
        outputs: of a task with labels the scores of the classes (n, labels), or the numbers (n, 1); else None.
    """

    metrics: dict[str, float]
    loss: float
    speed: dict[str, float] = field(default_factory=dict)
    predictions: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    outputs: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, float]:
        """The metrics, and "loss"."""
        return {**self.metrics, "loss": self.loss}


class AnyTask(Protocol):
    """A task of any kind: "classification", "regression", "generation", "instruction", "language-modelling",
    "image-classification".

    Of images, what is called tokenizer here is the image processor.

    A model is always made by :meth:`load_model`, so that it has the head that the task wants.
    """

    @property
    def name(self) -> str:
        """As :func:`ffnkit.tasks.get` knows it."""

    @property
    def kind(self) -> str:
        """One of the six."""

    @property
    def text(self) -> tuple[str, ...]:
        """The columns that the model reads."""

    @property
    def label(self) -> str:
        """The column of what is right; "" for plain text."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported."""

    @property
    def main_metric(self) -> str:
        """The first of the metrics in tables."""

    @property
    def dev_metric(self) -> str:
        """What chooses checkpoints unless asked otherwise: a metric, or "loss"."""

    @property
    def source(self) -> str:
        """Where the data come from, in words."""

    @property
    def notes(self) -> str:
        """A line on what the task asks."""

    @property
    def hub(self) -> tuple[str, ...]:
        """Name and configuration of the dataset on the hub; () for other data."""

    @property
    def pipeline_tag(self) -> str:
        """The hub's name of the kind of task."""

    def splits(
        self,
        data_dir: str | Path | None = None,
        *,
        seed: int = 0,
        dev: int | float | None = None,
        train_limit: int | None = None,
        dev_limit: int | None = None,
        report_limit: int | None = None,
    ) -> Splits:
        """Rows to train on, to choose by, and to report."""

    def load_tokenizer(self, name_or_dir: str | Path, **kwargs: Any) -> Any:
        """The tokenizer of a model, with what the task adds to it."""

    def load_model(
        self, name_or_dir: str | Path, *, tokenizer: Any = None, trained_head: bool = False, **kwargs: Any
    ) -> Any:
        """The model with the task's head."""

    def auto_class(self, config: Any) -> Any:
        """The class of transformers that opens a model of this config with the task's head."""

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """Examples to train on: ``input_ids``, ``labels``, what else the model takes; unpadded."""

    def collator(self, tokenizer: Any, model: Any = None) -> Collate:
        """Makes padded batches of what :meth:`encode` gave."""

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        max_length: int = 128,
        generation: GenerationSettings | None = None,
        encoded: Dataset | None = None,
        loss_only: bool = False,
    ) -> Evaluation:
        """Every metric and the loss.

        Args:
            dataset: rows of one of the splits.
            generation: how text is decoded, where the task wants text.
            encoded: the same rows encoded before, to save the work.
            loss_only: leave the metrics out where they cost more than the loss.
        """
