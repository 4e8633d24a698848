"""Tasks of sentence embeddings: two texts and how alike they are (STS), and triplets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.protocol import Collate
from ffnkit.tasks.rows.files import check_columns, in_words, named, read
from ffnkit.tasks.rows.splitting import Source, Table

if TYPE_CHECKING:
    from datasets import Dataset

HEAD = "cosine"
RIGHT = "nearer"  # the column that says which of a triplet's two texts is near: the first, always


@dataclass(frozen=True)
class EmbeddingTask(Task):
    """Texts compared by the cosine of their embeddings, through a model without a head.

    Two texts have a number: rows are judged by the correlations of the cosines with it. Three are an anchor, a text
    that is near it and one that is far: accuracy is the share of rows whose near text is the nearer.
    Made by :func:`similarity_task` and :func:`triplet_task`.
    """

    @property
    def pipeline_tag(self) -> str:
        """The hub's name of the kind of task."""
        return "sentence-similarity"

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """``input_ids``: the token ids of each text of a row; and ``labels``."""
        import pyarrow
        from datasets import Dataset

        from ffnkit.tasks.encoding.sequences import positions
        from ffnkit.tasks.encoding.tokenizing import encode

        limit = min(max_length, positions(model))
        texts = [encode(dataset, (each,), self.label, self.kind, tokenizer, limit) for each in self.text]
        ids = [list(row) for row in zip(*(each["input_ids"] for each in texts), strict=True)]
        kind = pyarrow.list_(pyarrow.list_(pyarrow.int32()))
        return Dataset(pyarrow.table({"input_ids": pyarrow.array(ids, kind), "labels": texts[0].data.column("labels")}))

    def collator(self, tokenizer: Any, model: Any = None) -> Collate:
        """Batches of (rows x texts, tokens), a row's texts beside one another, with labels (rows,)."""
        return Rows(tokenizer)

    def auto_class(self, config: Any) -> Any:
        """AutoModel; of an encoder-decoder its encoder."""
        from transformers import AutoModel, AutoModelForTextEncoding

        return AutoModelForTextEncoding if getattr(config, "is_encoder_decoder", False) else AutoModel

    def load_model(
        self, name_or_dir: str | Path, *, tokenizer: Any = None, trained_head: bool = False, **kwargs: Any
    ) -> Any:
        """The model without a head, in float32 unless ``dtype`` is given, that compares texts.

        Of sentence-transformers the modules behind it are applied as they are; other models have the mean over tokens.
        """
        import torch

        from ffnkit.io.architectures import read_config
        from ffnkit.io.loading import load_pretrained
        from ffnkit.nn.comparing import Comparison, compare
        from ffnkit.tasks.embeddings.pooling import pooled
        from ffnkit.tasks.models import set_padding

        name = str(name_or_dir)
        auto = self.auto_class(read_config(name))
        model = load_pretrained(auto, name, **{"dtype": torch.float32, **kwargs})
        set_padding(model, tokenizer, name)
        compare(model, Comparison(pooled(name), len(self.text)))
        return model


@dataclass(frozen=True)
class Rows:
    """Makes batches of rows of several texts."""

    tokenizer: Any

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` (rows x texts, tokens), ``labels`` (rows,)."""
        import torch

        texts = [{"input_ids": list(ids)} for row in rows for ids in row["input_ids"]]
        batch = dict(self.tokenizer.pad(texts, return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def similarity_task(task: Task) -> EmbeddingTask:
    """A task of two texts and a number, by the cosine of their embeddings.

    Raises:
        FfnkitError: another kind of task.
    """
    if task.kind != "regression" or len(task.text) != 2 or task.template is not None:
        found = f"{task.name} is a {task.kind} of {len(task.text)} texts"
        do = "Use it for two texts and a number, without a template, or for three texts without a label"
        raise FfnkitError(f"head {HEAD!r}", found, do)
    fields = {each.name: getattr(task, each.name) for each in dataclasses.fields(task)}
    metrics = tuple(name for name in task.metrics if name != "mse")  # labels have a range of their own
    main = "spearman" if task.main_metric == "mse" else task.main_metric
    return EmbeddingTask(**{**fields, "metrics": metrics, "main_metric": main})


def triplet_task(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    text: Sequence[str],
    name: str = "files",
    test: str | Path | None = None,
) -> EmbeddingTask:
    """Triplets of a table; files as of :func:`ffnkit.tasks.file_task`.

    Args:
        text: the columns of the anchor, of a text that is near it, of one that is far.

    Raises:
        FfnkitError: files that cannot be read, columns that are not there, rows without text.
    """
    text = tuple(text)
    if len(set(text)) != 3 or RIGHT in text:
        found = f"text {', '.join(text) or 'none'}"
        raise FfnkitError(f"task {name}", found, "Name three columns: an anchor, a near text, a far one")
    files = named(train, validation, test, name)
    tables = {split: _rows(path, text) for split, path in files.items()}
    source = Source(
        train=tables.get("train"),
        report=tables.get("report"),
        extra={"test": tables["test"]} if "test" in tables else {},
        where=in_words(files),
    )
    return EmbeddingTask(
        name=name,
        kind="classification",
        text=text,
        label=RIGHT,
        metrics=("accuracy",),
        main_metric="accuracy",
        source=source.where,
        notes=f"{text[0]} is nearer to {text[1]} than to {text[2]}",
        label_names=("nearer", "farther"),
        load=lambda _: source,
    )


def _rows(path: Path, text: tuple[str, ...]) -> Table:
    table, where = read(path), f"data file {path}"
    check_columns(table, text, where)
    for column in text:
        bad = [row for row, value in enumerate(table[column]) if not isinstance(value, str) or not value.strip()]
        if bad:
            found = f"{len(bad)} of {len(table[column])} rows have no text in {column!r}, row {bad[0] + 1} first"
            raise FfnkitError(where, found, "Fill or remove these rows")
    return {**{column: table[column] for column in text}, RIGHT: [0] * len(table[text[0]])}
