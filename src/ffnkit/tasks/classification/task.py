"""What a task is: where its rows come from, how they are split and encoded, and how predictions are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.tasks.classification.classifier import Classifier
from ffnkit.tasks.rows.splitting import Source, Splits, Table, divide, once

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Task(Classifier):
    """A labelled text task.

    Attributes:
        name: as :func:`ffnkit.tasks.get` knows it.
        kind: "classification" or "regression".
        text: the one or two text columns.
        label: the label's column.
        metrics: names of the metrics that are reported.
        main_metric: the one of them that chooses checkpoints.
        source: where the data come from, in words.
        notes: a line on what the task asks.
        label_names: the classes by id; empty for a regression.
        hub: name and configuration of the dataset on the hub, for model cards; empty for other data.
        template: what models read, with the text columns in braces, "cola sentence: {sentence}"; else the texts as
            they are, two of them as a pair.
        load: reads the rows; takes the data folder or None.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    label: str
    metrics: tuple[str, ...]
    main_metric: str
    source: str
    notes: str = ""
    label_names: tuple[str, ...] = ()
    hub: tuple[str, ...] = ()
    template: str | None = None
    load: Callable[[Path | None], Source] = field(repr=False, compare=False, kw_only=True)

    @property
    def num_labels(self) -> int:
        """The width of the model's head: the number of classes, 1 for a regression."""
        return len(self.label_names) or 1

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty for a regression."""
        return dict(enumerate(self.label_names))

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the main metric is better."""
        from ffnkit.tasks.metrics import greater_is_better

        return greater_is_better(self.main_metric)

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
        """Reads the rows and splits them; the same arguments and files give the same rows.

        Args:
            data_dir: the folder of ``<task>/<split>.jsonl`` files; else FFNKIT_DATA, else the hub.
            seed: draws ``dev`` and the subsamples.
            dev: rows (int) or share (float) of train that become ``dev``; by default 5%, at least 64 where these are
                no more than a quarter, at most 1000; with the classes in their proportions.
            train_limit, dev_limit, report_limit: at most so many rows, for quick runs.

        Raises:
            FfnkitError: no data within reach, or rows that cannot be used.
        """
        asked = f"data of task {self.name}"
        read = self.load(Path(data_dir) if data_dir is not None else None)
        return divide(
            once(read, self.text, self.label, "texts"),
            same=self.text,
            asked=asked,
            what="rows",
            label=self.label,
            stratify=self.kind == "classification",
            seed=seed,
            dev=dev,
            train_limit=train_limit,
            dev_limit=dev_limit,
            report_limit=report_limit,
        ).map(self.dataset)

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """Token ids of every row, unpadded, and ``labels``; held in memory.

        Args:
            dataset: rows of one of the splits.
            max_length: longer texts are cut, in tokens; of a pair the longer text first.
            model: its positions bound the length too.
        """
        from ffnkit.tasks.encoding.sequences import positions
        from ffnkit.tasks.encoding.tokenizing import encode

        text = self.text
        if self.template is not None:
            dataset, text = dataset.add_column("prompt", self.prompts(dataset.to_dict())), ("prompt",)
        return encode(dataset, text, self.label, self.kind, tokenizer, min(max_length, positions(model)))

    def prompts(self, rows: Mapping[str, Sequence[str]]) -> list[str]:
        """What the template makes of rows.

        Raises:
            FfnkitError: a template that names other columns than the task's texts, or leaves one out.
        """
        from ffnkit.tasks.generation.own import filled_in, template_parts

        return filled_in(template_parts(self.template or "", self.text), rows)

    def compute_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Every metric of the task; see :func:`ffnkit.tasks.metrics.labelled.compute`."""
        from ffnkit.tasks.metrics.labelled import compute

        return compute(self.metrics, self.kind, predictions, labels)

    def load_tokenizer(self, name_or_dir: str | Path, **kwargs: Any) -> Any:
        """The tokenizer of a model, with a padding token; it pads on the right.

        Raises:
            FfnkitError: there are no tokenizer files.
        """
        from ffnkit.tasks.models import load_tokenizer

        return load_tokenizer(name_or_dir, **kwargs)

    def load_model(
        self, name_or_dir: str | Path, *, tokenizer: Any = None, trained_head: bool = False, **kwargs: Any
    ) -> Any:
        """A sequence-classification model with this task's head, in float32 unless ``dtype`` is given.

        Args:
            tokenizer: gives the padding token; else the end-of-text token of the config pads where none is set.
            trained_head: refuse a checkpoint whose head is missing or made for other labels, as to evaluate wants;
                else such a head is drawn anew (seed torch before).
            kwargs: for ``from_pretrained``.

        Raises:
            FfnkitError: the model cannot be opened or does not fit.
        """
        from ffnkit.tasks.models import load_model

        return load_model(self, name_or_dir, tokenizer=tokenizer, trained_head=trained_head, **kwargs)

    def dataset(self, table: Table) -> Dataset:
        """The text columns and the label as a dataset in memory."""
        import pyarrow
        from datasets import Dataset

        columns = {name: pyarrow.array(table[name], pyarrow.string()) for name in self.text}
        wanted = pyarrow.int64() if self.kind == "classification" else pyarrow.float32()
        columns[self.label] = pyarrow.array(table[self.label], wanted)
        return Dataset(pyarrow.table(columns))
