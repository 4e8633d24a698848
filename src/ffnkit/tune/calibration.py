"""Calibration data: a few thousand tokens of a task or of text, as batches for ``fk.plan(..., data=batches)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnkit.calibration import shipped
from ffnkit.calibration.parts import texts_of
from ffnkit.tune.distil_text import text_examples
from ffnkit.tune.settings import CalibrationSettings


def calibration_batches(
    model: nn.Module,
    tokenizer: Any,
    settings: CalibrationSettings | None = None,
    *,
    task: Any = None,
    rows: Any = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Padded batches drawn with ``seed``, until they hold ``settings.tokens`` tokens or the data end.

    Beside the tokens of a text file, ``settings.mix`` of all are of the text of many kinds that comes with ffnkit; what
    is fitted to one kind of text loses on others. Where neither file nor task is given, all of them are.

    Args:
        task, rows: a task and rows of its training split, where ``settings.text`` names no file. Labels stay in the
            batches for decoders whose inputs are made from them; methods that measure activations do not use them.

    Raises:
        FfnkitError: a file that cannot be read or has no text; no tokenizer for a text.
    """
    settings = settings or CalibrationSettings()
    if settings.text is None and task is not None:
        examples = task.encode(rows, tokenizer, max_length=settings.max_length, model=model)
        return drawn_batches(examples, task.collator(tokenizer, model), settings, seed=seed)
    own: list[str] = []
    if settings.text is not None:
        from ffnkit.tasks.language_modelling.sets import read_texts

        own = texts_of(read_texts(Path(settings.text), settings.text_column), "fit")
    share = 1.0 if settings.text is None else settings.mix
    batches: list[dict[str, Any]] = []
    for texts, part in ((own, 1 - share), (shipped.texts() if share else [], share)):
        if tokens := round(settings.tokens * part):
            examples, collate = text_examples(texts, tokenizer, model, settings.max_length)
            batches += drawn_batches(examples, collate, settings.model_copy(update={"tokens": tokens}), seed=seed)
    return batches


def drawn_batches(
    examples: Any, collate: Any, settings: CalibrationSettings | None = None, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Padded batches of encoded examples in an order drawn with ``seed``, until ``settings.tokens`` or their end."""
    settings = settings or CalibrationSettings()
    count = getattr(collate, "tokens", _tokens)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    batches: list[dict[str, Any]] = []
    held = 0
    for start in range(0, len(order), settings.batch_size):
        batch = dict(collate([examples[i] for i in order[start : start + settings.batch_size]]))
        batches.append(batch)
        held += count(batch)
        if held >= settings.tokens:
            break
    return batches


def _tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.ne(0).sum()) if mask is not None else int(batch["input_ids"].numel())


def first_batches(examples: Any, collate: Any, size: int, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """At most ``count`` batches of ``size`` encoded examples with their labels, in an order drawn with ``seed``."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()[: size * count]
    return [dict(collate([examples[i] for i in order[start : start + size]])) for start in range(0, len(order), size)]
