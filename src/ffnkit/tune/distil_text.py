"""Examples for distillation: plain texts as a model reads them, or the training rows of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.tasks.encoding.sequences import positions
from ffnkit.tune.distil_data import Collate
from ffnkit.tune.settings import DistilSettings

_BATCH = 1024  # texts tokenized at a time


def distil_examples(
    model: nn.Module, tokenizer: Any, settings: DistilSettings, task: Any = None, rows: Any = None
) -> tuple[Any, Collate]:
    """Examples and collate for :func:`ffnkit.tune.distil`: of ``settings.text``, else of a task's rows.

    Raises:
        FfnkitError: neither a text file nor a task is given, a file that cannot be read or has no text, or
            ``hard_weight`` for a file without labels.
    """
    if settings.text is not None:
        from ffnkit.tasks.language_modelling.sets import read_texts

        if settings.hard_weight and not writes(model):
            found = f"text file {settings.text} has no labels for a {type(model).__name__}"
            raise FfnkitError("distillation with hard_weight", found, "Set hard_weight to 0, or leave out the text")
        texts = read_texts(settings.text, settings.text_column)
        return text_examples(texts, tokenizer, model, settings.max_length)
    if task is None:
        raise FfnkitError("distillation data", "neither a text file nor a task is given", "Set text to a file")
    examples = task.encode(rows, tokenizer, max_length=settings.max_length, model=model)
    return examples, task.collator(tokenizer, model)


def text_examples(texts: Sequence[str], tokenizer: Any, model: nn.Module, max_length: int = 128) -> tuple[Any, Collate]:
    """Unlabelled texts as examples, and what makes a padded batch of some.

    A model that writes gets blocks of ``max_length`` tokens cut out of all texts in a row, as language modelling does
    (:meth:`ffnkit.tasks.LanguageTask.encode`): an encoder-decoder reads the first half of a block and is asked for
    the second. Others, classifiers on a decoder too, read a text each; a longer one comes in pieces.

    Args:
        tokenizer: with a padding token.
        max_length: tokens of an example, special tokens included; not more than the model has positions for.

    Raises:
        FfnkitError: no text, no padding token, or no room in ``max_length`` for a token beside the reparametrized ones.
    """
    from transformers import DataCollatorWithPadding
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as CHOOSING

    texts = [text for text in texts if text.strip()]
    if not texts:
        raise FfnkitError("distillation text", "there is none", "Give at least one text that is not blank")
    if tokenizer.pad_token_id is None:
        raise FfnkitError("distillation text", "the tokenizer has no padding token", "Set tokenizer.pad_token")
    if type(model).__name__ in CHOOSING.values():
        found = "it reads several choices a row, and text has none"
        raise FfnkitError(f"text for a {type(model).__name__}", found, "Give a task, or batches in Python")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        found = "it does not read text"
        raise FfnkitError(f"text for a {type(model).__name__}", found, "Give a task, or batches in Python")
    if writes(model):
        return _blocks(texts, tokenizer, model, max_length)
    length = min(max_length, int(tokenizer.model_max_length), positions(model))
    if length <= tokenizer.num_special_tokens_to_add(pair=False):
        raise FfnkitError(f"max_length {max_length}", "no room for the text", "Use more tokens")
    return _pieces(texts, tokenizer, length), DataCollatorWithPadding(tokenizer)


def writes(model: nn.Module) -> bool:
    """Whether the model gives text, so that texts are their own labels."""
    return bool(getattr(model, "can_generate", lambda: False)())


def _blocks(texts: list[str], tokenizer: Any, model: nn.Module, max_length: int) -> tuple[Any, Collate]:
    from datasets import Dataset

    from ffnkit.tasks import LanguageTask
    from ffnkit.tasks.language_modelling.sets import LanguageData, source_of

    task = LanguageTask(LanguageData("text", load=lambda _: source_of({"train": texts}, "memory")))
    blocks = task.encode(Dataset.from_dict({"text": texts}), tokenizer, max_length, model=model)
    return blocks, task.collator(tokenizer, model)


def _pieces(texts: list[str], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """A row a text, or more where it is too long and the tokenizer can give the rest."""
    rows: list[dict[str, Any]] = []
    for start in counted(range(0, len(texts), _BATCH), "reading tokens"):
        read = tokenizer(
            texts[start : start + _BATCH],
            truncation=True,
            max_length=length,
            return_overflowing_tokens=bool(tokenizer.is_fast),
        )
        names = [name for name in read if name in ("input_ids", "attention_mask", "token_type_ids")]
        rows += [{name: read[name][row] for name in names} for row in range(len(read["input_ids"]))]
    return [row for row in rows if row["input_ids"]]
