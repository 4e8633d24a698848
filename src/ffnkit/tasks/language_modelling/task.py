"""Language modelling: blocks to train on, and the perplexity of a text by a window that moves in strides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.tasks.generation.writer import Writer, perplexity
from ffnkit.tasks.language_modelling import sets
from ffnkit.tasks.protocol import Evaluation
from ffnkit.tasks.rows.splitting import Splits
from ffnkit.tasks.running import IGNORED, encoded_rows, is_seq2seq, token_loss
from ffnkit.tasks.settings import GenerationSettings

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1024  # texts tokenized at a time


@dataclass(frozen=True)
class LanguageTask(Writer):
    """Plain text, of which a model learns every token.

    Attributes:
        data: the documents.
        stride: tokens that the window of the perplexity moves on by; None: half of ``max_length``.
    """

    data: sets.LanguageData
    stride: int | None = None

    kind = "language-modelling"
    text = ("text",)
    label = ""

    @property
    def origin(self) -> sets.LanguageData:
        """The data."""
        return self.data

    @property
    def metrics(self) -> tuple[str, ...]:
        """Perplexity of a token, and bits a byte, which compare between tokenizers."""
        return ("perplexity", "bits_per_byte")

    @property
    def main_metric(self) -> str:
        """The perplexity."""
        return "perplexity"

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits[Dataset]:
        """One row a document: "text"; arguments as of :meth:`ffnkit.tasks.Task.splits`."""
        return self.data.splits(data_dir, **limits).map(_dataset)

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """Blocks of ``max_length`` tokens cut out of all documents in a row; the last may be shorter.

        An encoder-decoder reads the first half of a block and writes the second.

        Raises:
            FfnkitError: no text, or no room in a block.
        """
        limit = _limit(max_length, tokenizer, model)
        ids = stream(dataset["text"], tokenizer, is_seq2seq(model))
        blocks = [ids[start : start + limit] for start in range(0, len(ids), limit)]
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise FfnkitError(f"task {self.name}", "the texts have fewer than 2 tokens", "Give more text")
        if not is_seq2seq(model):
            return _examples([([], block) for block in blocks], tokenizer, model)
        return _examples([(block[: len(block) // 2], block[len(block) // 2 :]) for block in blocks], tokenizer, model)

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
        """Perplexity and bits a byte, every token scored once (:func:`windows`); ``loss_only``: loss of the blocks.

        Raises:
            FfnkitError: a stride that leaves no context.
        """
        if loss_only or "text" not in dataset.column_names:
            data = encoded if encoded is not None else encoded_rows(self, dataset, tokenizer, max_length, model)
            loss = self.token_loss(model, tokenizer, data, batch_size)
            return Evaluation({"perplexity": perplexity(loss)}, loss)
        limit = _limit(max_length, tokenizer, model)
        stride = limit // 2 if self.stride is None else self.stride
        if not 0 < stride < limit:
            found = f"the window has {limit} tokens"
            raise FfnkitError(f"stride {stride}", found, f"Use 1 to {limit - 1}, or leave it out")
        texts = list(dataset["text"])
        ids = stream(texts, tokenizer, is_seq2seq(model))
        data = _examples(list(windows(ids, limit, stride)), tokenizer, model)
        total, count = token_loss(model, data, self.collator(tokenizer, model), batch_size)
        loss = total / max(count, 1)
        size = sum(len(text.encode()) for text in texts)
        return Evaluation({"perplexity": perplexity(loss), "bits_per_byte": total / math.log(2) / max(size, 1)}, loss)


def text_task(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    column: str = "text",
    name: str = "files",
    test: str | Path | None = None,
    stride: int | None = None,
) -> LanguageTask:
    """Language modelling on files of one's own; arguments as of :func:`.sets.file_data`."""
    return LanguageTask(sets.file_data(train, validation, column=column, name=name, test=test), stride)


def stream(texts: Sequence[str], tokenizer: Any, seq2seq: bool) -> list[int]:
    """The tokens of all documents in a row.

    A decoder's documents begin with what its tokenizer puts there, else with its end-of-text token, so that each first
    word has a token before it; an encoder-decoder's end with that token.
    """
    from ffnkit.tasks.encoding.sequences import affixes, end_of_text

    before, after = affixes(tokenizer)
    if seq2seq:
        before, after = [], [end_of_text(tokenizer)]
    elif not before and not after and tokenizer.eos_token_id is not None:
        before = [int(tokenizer.eos_token_id)]
    ids: list[int] = []
    for start in counted(range(0, len(texts), _BATCH), "reading tokens"):
        read = tokenizer(list(texts[start : start + _BATCH]), add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(chain.from_iterable([*before, *each, *after] for each in read))
    return ids


def windows(ids: list[int], length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, scored) pieces: the first ``length`` tokens whole, then ``stride`` more at a time.

    Every token is scored once, after the first window with at least ``length - stride`` tokens of context.
    """
    yield [], ids[:length]
    for start in range(length, len(ids), stride):
        end = min(start + stride, len(ids))
        yield ids[end - length : start], ids[start:end]


def _examples(pieces: list[tuple[list[int], list[int]]], tokenizer: Any, model: Any) -> Dataset:
    """(context, target) pieces as the model takes them: in a row, or the context through the encoder."""
    import pyarrow
    from datasets import Dataset

    from ffnkit.tasks.encoding.sequences import affixes, end_of_text

    kind = pyarrow.list_(pyarrow.int32())
    if is_seq2seq(model):
        before, after = affixes(tokenizer)
        least = [] if before or after else [end_of_text(tokenizer)]
        inputs = [[*before, *context, *after] or least for context, _ in pieces]
        labels = [target for _, target in pieces]
    else:
        inputs = [context + target for context, target in pieces]
        labels = [[IGNORED] * len(context) + target for context, target in pieces]
    return Dataset(pyarrow.table({"input_ids": pyarrow.array(inputs, kind), "labels": pyarrow.array(labels, kind)}))


def _limit(max_length: int, tokenizer: Any, model: Any) -> int:
    from ffnkit.tasks.encoding.sequences import affixes, positions

    limit = min(max_length, int(tokenizer.model_max_length), positions(model))
    limit -= sum(map(len, affixes(tokenizer))) if is_seq2seq(model) else 0
    if limit < 2:
        raise FfnkitError(f"max_length {max_length}", "no room for two tokens", "Use more tokens")
    return limit


def _dataset(texts: list[str]) -> Dataset:
    import pyarrow
    from datasets import Dataset

    return Dataset(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}))
