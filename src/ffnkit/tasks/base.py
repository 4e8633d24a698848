"""What a task is: where its rows come from, how they are split and encoded, and how predictions are scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError

from .classifying import Classifier
from .splitting import Table, carve, distinct, share, size, subsample, without

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Rows as read and checked: labels are class ids or floats.

    Attributes:
        train: rows to train on.
        report: rows for the reported figure; None where they are to be carved out of train.
        extra: further labelled rows by name ("mismatched", "test"), to be reported beside.
        where: where the rows come from, in words.
        notes: what a reader of the figures must know.
        report_share: the share of train carved out where ``report`` is None.
    """

    train: Table
    report: Table | None
    where: str
    extra: Mapping[str, Table] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    report_share: float = 0.1


@dataclass(frozen=True)
class Splits:
    """Rows of a task. No text of ``report`` or ``extra`` is in ``train`` or ``dev``, and none of ``dev`` in ``train``.

    Attributes:
        train: to train on.
        dev: out of the training rows, to choose settings and checkpoints.
        report: for the reported figure, and for nothing else.
        extra: further rows to report on, by name ("mismatched", "test").
        source: where the rows come from.
        notes: what was dropped and carved, and what a reader of the figures must know.
    """

    train: Dataset
    dev: Dataset
    report: Dataset
    extra: Mapping[str, Dataset] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()


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
        from .metrics import greater_is_better

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
        train, report, notes = self._disjoint(read)
        parts, stratified = {}, self.kind == "classification"
        count = share(size(train), dev, f"{asked}: dev split")
        rest, carved = carve(train, self.label, count, seed, stratified)
        notes.append(f"dev: {size(carved)} rows carved out of train with seed {seed}")
        limits = {"train": (rest, train_limit), "dev": (carved, dev_limit), "report": (report, report_limit)}
        for name, (table, limit) in limits.items():
            parts[name] = subsample(table, limit, seed, f"{asked}: limit of {name}")
            if size(parts[name]) < size(table):
                notes.append(f"{name}: {size(parts[name])} of {size(table)} rows drawn with seed {seed}")
        extra = {name: subsample(table, report_limit, seed, asked) for name, table in read.extra.items()}
        for note in notes:
            logger.info("%s: %s", self.name, note)
        return Splits(
            **{name: self._dataset(table) for name, table in parts.items()},
            extra={name: self._dataset(table) for name, table in extra.items()},
            source=read.where,
            notes=tuple(notes),
        )

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """Token ids of every row, unpadded, and ``labels``; held in memory.

        Args:
            dataset: rows of one of the splits.
            max_length: longer texts are cut, in tokens; of a pair the longer text first.
            model: plays no part here.
        """
        from .encoding import encode

        return encode(dataset, self.text, self.label, self.kind, tokenizer, max_length)

    def compute_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Every metric of the task; see :func:`ffnkit.tasks.metrics.compute`."""
        from .metrics import compute

        return compute(self.metrics, self.kind, predictions, labels)

    def load_tokenizer(self, name_or_dir: str | Path, **kwargs: Any) -> Any:
        """The tokenizer of a model, with a padding token; it pads on the right.

        Raises:
            FfnkitError: there are no tokenizer files.
        """
        from .models import load_tokenizer

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
        from .models import load_model

        return load_model(self, name_or_dir, tokenizer=tokenizer, trained_head=trained_head, **kwargs)

    def _disjoint(self, read: Source) -> tuple[Table, Table, list[str]]:
        """Train and report without a common text, with notes."""
        notes = list(read.notes)
        train, dropped, conflicts = distinct(read.train, self.text, self.label)
        if dropped:
            notes.append(f"train: {dropped} repeated texts dropped, {conflicts} of them with another label")
        reported = {"report": read.report, **read.extra} if read.report else dict(read.extra)
        for name, table in reported.items():
            train, dropped = without(train, table, self.text)
            if dropped:
                notes.append(f"train: {dropped} rows dropped whose text is in {name}")
        asked = f"data of task {self.name}"
        if size(train) < 4:
            found = f"{size(train)} training rows are left of {size(read.train)} once repeated texts are dropped"
            raise FfnkitError(asked, found, "Give more rows, and a validation file that is not the training file")
        if read.report:
            return train, read.report, notes
        count = share(size(train), None, f"{asked}: report split", usual=read.report_share, most=5000)
        train, report = carve(train, self.label, count, 0, self.kind == "classification")
        notes.append(f"report: {count} rows carved out of train with seed 0")
        return train, report, notes

    def _dataset(self, table: Table) -> Dataset:
        """The text columns and the label as a dataset in memory."""
        import pyarrow
        from datasets import Dataset

        columns = {name: pyarrow.array(table[name], pyarrow.string()) for name in self.text}
        wanted = pyarrow.int64() if self.kind == "classification" else pyarrow.float32()
        columns[self.label] = pyarrow.array(table[self.label], wanted)
        return Dataset(pyarrow.table(columns))
