"""Classification by label words: a model that writes is asked which of the labels' names it finds most likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.generation.writer import Writer
from ffnkit.tasks.protocol import Evaluation
from ffnkit.tasks.rows.splitting import Splits
from ffnkit.tasks.running import by_length, encoded_rows, evaluating, row_losses
from ffnkit.tasks.settings import GenerationSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from ffnkit.tasks.encoding.sequences import Sequences

HEADS = ("class", "words")
_WORD = 32  # tokens that a label word has at most


@dataclass(frozen=True)
class WordsTask(Writer):
    """A classification task through the language-model head.

    The prompt is the task's template, or "<task> <column>: <text> <column>: <text>"; a decoder's ends in
    " <label column>:". The target is the label's name. A label's score is the log-likelihood of its name and the end of
    text; none is drawn at random. Only the target is trained on.

    Source: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, JMLR
        2020, section 2.4 and appendix D, for the prompts.
    Differs: the scores of all label words are compared, where T5 generates freely and counts other words as misses.

    Attributes:
        task: the classification task.
        words: a word for each label, by id; by default the labels' names.
    """

    task: Task
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task.kind != "classification":
            found = f"{self.task.name} is a {self.task.kind}"
            raise FfnkitError("head 'words'", found, "Use it for tasks with classes")
        words = self.words or self.task.label_names
        if len(words) != self.task.num_labels or len(set(words)) < len(words) or not all(w.strip() for w in words):
            found = f"{self.task.num_labels} labels, and the words {', '.join(map(repr, words)) or 'none'}"
            raise FfnkitError(f"label words of {self.task.name}", found, "Give each label a word of its own")
        object.__setattr__(self, "words", tuple(words))

    @property
    def origin(self) -> Task:
        """The classification task."""
        return self.task

    @property
    def kind(self) -> str:
        """ "classification"."""
        return self.task.kind

    @property
    def text(self) -> tuple[str, ...]:
        """The one or two text columns."""
        return self.task.text

    @property
    def label(self) -> str:
        """The label's column."""
        return self.task.label

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's own."""
        return self.task.metrics

    @property
    def main_metric(self) -> str:
        """The task's own."""
        return self.task.main_metric

    @property
    def dev_metric(self) -> str:
        """What chooses checkpoints: the main metric."""
        return self.task.main_metric

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits:
        """Those of the task."""
        return self.task.splits(data_dir, **limits)

    def compute_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Every metric of the task from scores (n, labels) or class ids (n,)."""
        return self.task.compute_metrics(predictions, labels)

    def prompts(self, rows: Mapping[str, Sequence[str]], seq2seq: bool) -> list[str]:
        """The prompt of each row."""
        cue = "" if seq2seq else f" {self.label}:"
        if self.task.template is not None:
            return [f"{each}{cue}" for each in self.task.prompts(rows)]
        texts = zip(*(rows[column] for column in self.text), strict=True)
        named = [" ".join(f"{c}: {t}" for c, t in zip(self.text, row, strict=True)) for row in texts]
        return [f"{self.name} {each}{cue}" for each in named]

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """Prompt and right word of each row: ``input_ids``, ``labels`` (-100 over the prompt)."""
        sequences, rows = self._sequences(tokenizer, model, max_length), dataset.to_dict()
        words = [self.words[label] for label in rows[self.label]]
        return sequences.examples(self.prompts(rows, sequences.seq2seq), words)

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
        """Metrics of the likeliest words, and the loss of the right ones a token; ``batch_size`` counts prompts."""
        if loss_only or self.label not in dataset.column_names:
            data = encoded if encoded is not None else encoded_rows(self, dataset, tokenizer, max_length, model)
            return Evaluation({}, self.token_loss(model, tokenizer, data, batch_size))
        rows = dataset.to_dict()
        scores, counts = self.scores(model, tokenizer, rows, batch_size, max_length)
        labels = np.asarray(rows[self.label])
        places = np.arange(len(labels))
        loss = -scores[places, labels].sum() / counts[places, labels].sum()
        metrics = self.compute_metrics(scores, labels)
        return Evaluation({name: float(value) for name, value in metrics.items()}, float(loss), outputs=scores)

    def scores(
        self, model: Any, tokenizer: Any, rows: Mapping[str, Sequence[str]], batch_size: int, max_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood of each label's word after each row's prompt, (n, labels), and the words' tokens.

        All words of a row are in one batch.
        """
        sequences = self._sequences(tokenizer, model, max_length)
        prompts = self.prompts(rows, sequences.seq2seq)
        size = len(self.words)
        data = sequences.examples(
            [prompt for prompt in prompts for _ in self.words], [word for _ in prompts for word in self.words]
        )
        order = by_length(data.select(range(0, len(data), size)))
        device = next(model.parameters()).device
        collate = self.collator(tokenizer, model)
        likely, tokens = np.empty((len(prompts), size)), np.empty((len(prompts), size), dtype=np.int64)
        with evaluating(model):
            for start in counted(range(0, len(order), batch_size), "evaluating"):
                chosen = order[start : start + batch_size]
                examples = [data[int(row) * size + word] for row in chosen for word in range(size)]
                batch = {name: value.to(device) for name, value in collate(examples).items()}
                losses, counts = row_losses(model, batch)
                likely[chosen] = -losses.reshape(-1, size).cpu().numpy()
                tokens[chosen] = counts.reshape(-1, size).cpu().numpy()
        return likely, tokens

    def _sequences(self, tokenizer: Any, model: Any, max_length: int) -> Sequences:
        from ffnkit.tasks.encoding.sequences import Sequences

        return Sequences(tokenizer, model, max_length, _WORD)
