"""Tasks to generate text for a prompt: E2E, WebNLG, DART, and files of the user's own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.tasks.generation import sets
from ffnkit.tasks.generation.writer import Writer, perplexity, written
from ffnkit.tasks.protocol import Evaluation
from ffnkit.tasks.rows.splitting import Splits
from ffnkit.tasks.running import encoded_rows, is_seq2seq
from ffnkit.tasks.settings import GenerationSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from ffnkit.tasks.encoding.sequences import Sequences
    from ffnkit.tasks.rows.splitting import Table

PREFIXED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})
"""Kinds of models that were taught what to do by a prefix."""


@dataclass(frozen=True)
class GenerationTask(Writer):
    """Prompts with one or more right answers each. Trained on every reference, on the answer's tokens only.

    Attributes:
        data: the rows and what is special about them.
    """

    data: sets.TextData

    kind = "generation"
    text = ("prompt",)
    label = "references"

    @property
    def origin(self) -> sets.TextData:
        """The data."""
        return self.data

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of the generated texts, and the perplexity of the references."""
        return (*self.data.metrics, "perplexity")

    @property
    def main_metric(self) -> str:
        """The first of the metrics in tables."""
        return self.data.metrics[0]

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that the tokenizer must learn."""
        return self.data.special_tokens

    def with_metrics(self, metrics: Sequence[str]) -> GenerationTask:
        """The task with other metrics of text, the main one first; FfnkitError for an unknown one."""
        from ffnkit.tasks.metrics.texts import check

        return replace(self, data=replace(self.data, metrics=tuple(dict.fromkeys(map(check, metrics)))))

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits[Dataset]:
        """One row a prompt: "prompt", "references", "segments", and the column of ``together`` where there is one; see
        :meth:`.sets.TextData.splits`."""
        found = self.data.splits(data_dir, **limits)
        return found.map(functools.partial(_dataset, together=found.together))

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """One example a reference: ``input_ids``, ``labels`` (-100 over the prompt), ``token_type_ids`` for GPT-2.

        Args:
            dataset: rows of one of the splits.
            max_length: tokens of prompt and answer together, of each of the two for an encoder-decoder.
            model: tells decoders and encoder-decoders apart; needed.

        Raises:
            FfnkitError: no room for a prompt and an answer.
        """
        pairs = sets.pairs(dataset.to_dict())
        sequences = self._sequences(tokenizer, model, max_length)
        return sequences.examples(self.framed(pairs["prompt"], model), pairs["target"], pairs["segments"])

    def framed(self, prompts: Sequence[str], model: Any) -> list[str]:
        """The prompts as this model reads them: of a translation with T5's prefix, or a decoder's cue to go on."""
        kind = "decoder"
        if is_seq2seq(model):
            kind = "t5" if model.config.model_type in PREFIXED else "seq2seq"
        frame = self.data.frames.get(kind, "{}")
        return [frame.format(prompt) for prompt in prompts]

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
        """Loss and perplexity of the references; unless ``loss_only``, texts are generated and scored."""
        data = encoded if encoded is not None else encoded_rows(self, dataset, tokenizer, max_length, model)
        loss = self.token_loss(model, tokenizer, data, batch_size)
        likelihood = {"perplexity": perplexity(loss)}
        if loss_only or "prompt" not in dataset.column_names:
            return Evaluation(likelihood, loss)
        settings = generation or GenerationSettings()
        most = settings.max_new_tokens or self.data.max_new_tokens
        sequences = self._sequences(tokenizer, model, max_length, most)
        rows = dataset.to_dict()
        prompts = sequences.prompts(self.framed(rows["prompt"], model), rows["segments"])
        scores, speed, predictions = written(model, sequences, prompts, rows, self.data.metrics, settings, most)
        return Evaluation({**scores, **likelihood}, loss, speed, predictions)

    def _sequences(self, tokenizer: Any, model: Any, max_length: int, most: int | None = None) -> Sequences:
        from ffnkit.tasks.encoding.sequences import Sequences

        data = self.data
        return Sequences(tokenizer, model, max_length, most or data.max_new_tokens, data.eos, data.target_type)


def generation_task(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    inputs: Sequence[str],
    target: str,
    template: str | None = None,
    metrics: Sequence[str] = ("rougeL", "rouge1", "rouge2"),
    name: str = "files",
    test: str | Path | None = None,
    max_new_tokens: int = 64,
) -> GenerationTask:
    """Summaries, answers, translations from files of one's own; arguments as of :func:`.sets.file_data`."""
    return GenerationTask(
        sets.file_data(
            train,
            validation,
            inputs=inputs,
            target=target,
            template=template,
            metrics=metrics,
            name=name,
            test=test,
            max_new_tokens=max_new_tokens,
        )
    )


def _dataset(table: Table, together: str | None) -> Dataset:
    import pyarrow
    from datasets import Dataset

    strings = pyarrow.list_(pyarrow.string())
    segments = [[list(pair) for pair in row] for row in table["segments"]]
    columns = {
        "prompt": pyarrow.array(table["prompt"], pyarrow.string()),
        "references": pyarrow.array(table["references"], strings),
        "segments": pyarrow.array(segments, pyarrow.list_(strings)),
    }
    if together is not None:
        columns[together] = pyarrow.array(table[together], pyarrow.string())
    return Dataset(pyarrow.table(columns))
