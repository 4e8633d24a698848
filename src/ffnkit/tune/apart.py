"""Batches of text that no fit sees: parts of the user's own, and whole kinds of the text that comes with ffnkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration import shipped
from ffnkit.calibration.parts import Part, apart_from
from ffnkit.errors import FfnkitError
from ffnkit.tasks.running import IGNORED
from ffnkit.tune.calibration import drawn_batches, own_texts
from ffnkit.tune.calibration_text import read_calibration
from ffnkit.tune.distil_data import Collate
from ffnkit.tune.distil_text import text_examples, writes
from ffnkit.tune.settings import CalibrationSettings

WINDOW = 512  # tokens of a row at most
ROWS = 4  # of a batch
EVERY = 7  # of so many tokens one is masked, and asked for


def kept_apart(
    model: nn.Module,
    tokenizer: Any,
    settings: CalibrationSettings,
    part: Part,
    tokens: int,
    *,
    other: str | Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Batches of a part by place: "in" the user's text, "out" of all that is fitted; a place without text is not there.

    Rows are as long as a model may read, ``WINDOW`` tokens at most. Of a masked language model a seventh of the tokens
    is masked, and these are asked for; where its tokenizer has no mask, the text stays whole and has no labels.

    Args:
        tokens: of each place, about. other: a file of text that is "out", in place of kinds that come with ffnkit.

    Raises:
        FfnkitError: a file that cannot be read or has no text; no tokenizer for a text.
    """
    places = {"in": [text for texts, _ in own_texts(tokenizer, settings, part) for text in texts]}
    if other is None:
        places["out"] = shipped.texts(shipped.kinds(part))
    else:
        fitted = [text for texts, _ in own_texts(tokenizer, settings) for text in texts]
        places["out"] = apart_from(read_calibration(str(other), settings.text_column, tokenizer), fitted)
        if not places["out"]:
            raise FfnkitError(f"text {other}", "all of it is fitted to", "Name a text of another kind")
    size = settings.model_copy(update={"tokens": tokens, "batch_size": ROWS})
    found = {}
    for place, texts in places.items():
        if texts:
            found[place] = first_rows(model, tokenizer, texts, size)
    return found


def first_rows(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], settings: CalibrationSettings
) -> list[dict[str, Any]]:
    """Padded batches of these texts, spread over them, until they hold ``settings.tokens`` tokens."""
    window = min(WINDOW, max(settings.tokens // ROWS, 32))
    examples, collate = text_examples(texts, tokenizer, model, window)
    if is_masked(model) and tokenizer.mask_token_id is not None:
        collate = _masking(collate, tokenizer)
    return drawn_batches(examples, collate, settings, seed=0)


def is_masked(model: nn.Module) -> bool:
    """Whether the model gives words for masked ones, and writes no text (BART's class is listed for both)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as NAMES

    kind = getattr(getattr(model, "config", None), "model_type", "")
    return type(model).__name__ == NAMES.get(kind) and not writes(model)


def _masking(collate: Collate, tokenizer: Any) -> Collate:
    """The same batches with every ``EVERY``-th word masked; the labels are what stood there."""

    def masked(rows: list[Any]) -> Mapping[str, Tensor]:
        batch = dict(collate(rows))
        ids = batch["input_ids"]
        special = torch.tensor(tokenizer.all_special_ids)
        words = ~torch.isin(ids, special)
        chosen = words & (words.cumsum(1) % EVERY == EVERY // 2)
        batch["labels"] = ids.masked_fill(~chosen, IGNORED)
        batch["input_ids"] = ids.masked_fill(chosen, tokenizer.mask_token_id)
        return batch

    return masked
