"""Calibration data: a few thousand tokens of a task or of text, as batches for ``fk.plan(..., data=batches)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ffnkit.calibration import shipped
from ffnkit.calibration.parts import Part, parts_of
from ffnkit.errors import FfnkitError
from ffnkit.tune.calibration_text import read_calibration, shares
from ffnkit.tune.distil_text import text_examples
from ffnkit.tune.settings import CalibrationSettings

HELD_OUT = 2048  # tokens that settings are decided on


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

    Beside the tokens of the texts that ``settings.text`` names, ``settings.mix`` of all are of the text of many kinds
    that comes with ffnkit; what is fitted to one kind of text loses on others. Where neither text nor task is given,
    all of them are. Batches of the texts take turns.

    Args:
        task, rows: a task and rows of its training split, where ``settings.text`` names no file. Labels stay in the
            batches for decoders whose inputs are made from them; methods that measure activations do not use them.

    Raises:
        FfnkitError: a file that cannot be read or has no text, shares that do not sum up.
    """
    settings = settings or CalibrationSettings()
    if settings.text is None and task is not None:
        examples = task.encode(rows, tokenizer, max_length=settings.row_length, model=model)
        return drawn_batches(examples, task.collator(tokenizer, model), settings, seed=seed)
    return mixed_batches(model, tokenizer, own_texts(tokenizer, settings), settings, seed=seed)


def own_texts(tokenizer: Any, settings: CalibrationSettings, part: Part = "fit") -> list[tuple[list[str], float]]:
    """Texts of each file that ``settings.text`` names, as much of them as belongs to a part, and the file's share.

    None where no file is named.
    """
    given = shares(settings.text)
    read = [read_calibration(file, settings.text_column, tokenizer) for file, _ in given]
    found = parts_of(read, part)
    for (file, _), texts in zip(given, found, strict=True):
        if part == "fit" and not texts:
            what = "all its texts stand in the files before it"
            raise FfnkitError(f"calibration text {file}", what, "Leave it out")
    return [(texts, share) for texts, (_, share) in zip(found, given, strict=True) if texts]


def mixed_batches(
    model: nn.Module,
    tokenizer: Any,
    own: Sequence[tuple[Sequence[str], float]],
    settings: CalibrationSettings,
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Batches of texts with these shares and, by ``settings.mix``, of the text of many kinds; their batches take turns.

    Args:
        own: texts and their share of what is theirs, 1 - mix. Where there are none, all is of the text of many kinds.
        kinds: of that text; None takes all that may be fitted.
    """
    mix = settings.mix if own else 1.0
    parts = [(texts, (1 - mix) * share) for texts, share in own]
    parts += [(shipped.texts(kinds), mix)] if mix else []
    placed = []
    for number, (texts, share) in enumerate(parts):
        if share:
            tokens = max(1, round(settings.tokens * share))
            examples, collate = text_examples(texts, tokenizer, model, settings.text_length)
            few = {"tokens": tokens, "batch_size": settings.texts_a_pass(settings.text_length)}
            found = drawn_batches(examples, collate, settings.model_copy(update=few), seed=seed)
            placed += [((place + 0.5) / len(found), number, batch) for place, batch in enumerate(found)]
    return [batch for *_, batch in sorted(placed, key=lambda each: each[:2])]


def deciding_batches(
    model: nn.Module,
    tokenizer: Any,
    settings: CalibrationSettings | None = None,
    *,
    task: Any = None,
    rows: Any = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Batches to fit to and batches to decide on, which are of other text: see ``calibration.deciding.decide``.

    Beside the user's texts, fitted to are two thirds of the kinds of the text of many kinds; decided on is text of the
    others, at most ``HELD_OUT`` tokens. Of a task, decided on are other rows of its own.

    Args: as of :func:`calibration_batches`.
    """
    settings = settings or CalibrationSettings()
    few = settings.model_copy(update={"tokens": min(HELD_OUT, settings.tokens)})
    if settings.text is None and task is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        cut = len(order) - max(1, len(order) // 4)
        return tuple(  # type: ignore[return-value]
            drawn_batches(
                task.encode(rows.select(part), tokenizer, max_length=settings.row_length, model=model),
                task.collator(tokenizer, model),
                each,
                seed=seed,
            )
            for part, each in ((order[:cut], settings), (order[cut:], few))
        )
    every = shipped.kinds()
    held = every[1::3]
    fitted = [kind for kind in every if kind not in held]
    own = own_texts(tokenizer, settings)
    return (
        mixed_batches(model, tokenizer, own, settings, kinds=fitted, seed=seed),
        mixed_batches(model, tokenizer, [], few, kinds=held, seed=seed),
    )


def drawn_batches(
    examples: Any, collate: Any, settings: CalibrationSettings | None = None, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Padded batches of encoded examples in an order drawn with ``seed``, until ``settings.tokens`` or their end.

    The last batch has no more examples than that takes, about.
    """
    settings = settings or CalibrationSettings()
    count, size = getattr(collate, "tokens", _tokens), settings.texts_a_pass(settings.row_length)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    batches: list[dict[str, Any]] = []
    held = start = 0
    while start < len(order) and held < settings.tokens:
        rows = order[start : start + size]
        batch = dict(collate([examples[i] for i in rows]))
        share = (settings.tokens - held) / max(count(batch), 1)
        if (enough := max(1, math.ceil(share * len(rows)))) < len(rows):
            rows = rows[:enough]
            batch = dict(collate([examples[i] for i in rows]))
        batches.append(batch)
        held += count(batch)
        start += len(rows)
    return batches


def _tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.ne(0).sum()) if mask is not None else int(batch["input_ids"].numel())


def first_batches(examples: Any, collate: Any, size: int, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """At most ``count`` batches of ``size`` encoded examples with their labels, in an order drawn with ``seed``."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()[: size * count]
    return [dict(collate([examples[i] for i in order[start : start + size]])) for start in range(0, len(order), size)]
