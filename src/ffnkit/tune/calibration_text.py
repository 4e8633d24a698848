"""The user's calibration texts: several files with their shares, tables by column, dialogues by the chat template."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError

Given = str | Sequence[str] | Mapping[str, float] | None
ROUNDING = 1e-6  # by which shares may miss 1


def shares(given: Given) -> list[tuple[str, float]]:
    """Files and their shares, which sum to 1: those that are given; the others have equal parts of what they leave.

    Args:
        given: a file, several, each as FILE or FILE=SHARE, or files with shares; None or nothing is none.

    Raises:
        FfnkitError: shares out of range, or that leave nothing to a file or sum to less than 1; a file twice.
    """
    if isinstance(given, Mapping):
        pairs: list[tuple[str, float | None]] = list(given.items())
    else:
        pairs = [_pair(each) for each in ([given] if isinstance(given, str) else given or ())]
    places = [os.path.realpath(Path(name).expanduser()) for name, _ in pairs]
    for place, (name, share) in zip(places, pairs, strict=True):
        if places.count(place) > 1:
            raise FfnkitError(f"calibration text {name}", "it is given twice", "Give it once, with its share")
        if share is not None and not 0 < share <= 1:
            do = "Give a share above 0 and up to 1, such as 0.7"
            raise FfnkitError(f"calibration text {name}={share:g}", "that is no share of the tokens", do)
    told = sum(share for _, share in pairs if share is not None)
    open_ones = [name for name, share in pairs if share is None]
    if told > 1 + ROUNDING or (open_ones and told > 1 - ROUNDING) or (pairs and not open_ones and told < 1 - ROUNDING):
        found = f"the shares sum to {told:g}" + (f", and nothing is left for {open_ones[0]}" if open_ones else "")
        raise FfnkitError("calibration texts", found, "Give shares that sum to 1, or leave some out")
    return [(name, (1 - told) / len(open_ones) if share is None else share) for name, share in pairs]


def _pair(given: str) -> tuple[str, float | None]:
    """FILE or FILE=SHARE; a file whose own name reads so is the file."""
    name, mark, share = given.rpartition("=")
    if not mark or os.path.exists(Path(given).expanduser()):
        return given, None
    try:
        number = float(share)
    except ValueError:
        return given, None
    if math.isnan(number):
        raise FfnkitError(f"calibration text {given}", "that is no share of the tokens", "Give a share such as 0.7")
    return name, number


def read_calibration(path: str, column: str, tokenizer: Any) -> list[str]:
    """The texts of a file: documents of a .txt file, rows of a table's ``column``; dialogues as the chat template says.

    A table that has dialogues (messages, Alpaca's columns, prompt and completion, trees) and no ``column`` gives these.

    Raises:
        FfnkitError: the file cannot be read, has no such column, no text, or rows that are neither text nor dialogues.
    """
    from ffnkit.tasks.language_modelling.sets import read_texts

    return _dialogues(path, tokenizer) if has_dialogues(path, column) else read_texts(Path(path), column)


def has_dialogues(path: str, column: str) -> bool:
    """Whether a file is read as dialogues, which takes a tokenizer's chat template."""
    from ffnkit.tasks.instructions.forms import columns_at, form_of

    columns = columns_at(path)
    return form_of(columns) is not None and (column not in columns or column == "messages")


def _dialogues(path: str, tokenizer: Any) -> list[str]:
    from ffnkit.tasks.encoding.sequences import affixes
    from ffnkit.tasks.instructions.chat import rendered, template_of
    from ffnkit.tasks.instructions.forms import dialogues
    from ffnkit.tasks.rows.files import read

    table, _ = dialogues(read(path), f"data file {path}")
    texts = rendered(tokenizer, template_of(None, tokenizer), table["messages"], cue=False)
    begins = [tokenizer.convert_ids_to_tokens(token) for token in affixes(tokenizer)[0]]
    start = "".join(begins)  # is put before each text again when it is read
    return [text.removeprefix(start) if start else text for text in texts]
