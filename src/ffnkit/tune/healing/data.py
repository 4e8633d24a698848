"""Text to heal on: the calibration's own, read longer, and held-out text of two kinds to decide on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ffnkit.tasks.images.batches import tokens_each
from ffnkit.tune.apart import ROWS, kept_apart
from ffnkit.tune.calibration import calibration_batches
from ffnkit.tune.distil_text import writes
from ffnkit.tune.healing.heal import size_of
from ffnkit.tune.healing.settings import HealSettings
from ffnkit.tune.settings import CalibrationSettings

HELD = 1024  # tokens of each held-out text
Batches = list[dict[str, Any]]
Parts = list[tuple[Batches, float]]


def healing_data(
    model: nn.Module,
    tokenizer: Any,
    settings: HealSettings,
    calibration: CalibrationSettings,
    *,
    task: Any = None,
    rows: Any = None,
    dev: Any = None,
    seed: int = 0,
) -> tuple[Parts, dict[str, Batches]]:
    """Batches with their shares of the tokens, and held-out ones by name: the arguments of :func:`.heal.heal`.

    Text is mixed as for calibration: a share of the user's file, the rest of the text of many kinds that comes with
    ffnkit; with a task, its rows. Each is read again as often as its tokens need.

    Args:
        task, rows, dev: a task, rows to learn from and rows to decide on, where the calibration names no file. Where
            there are none to decide on, there is no held-out text: :func:`.heal.heal` keeps some of the others apart.

    Raises:
        FfnkitError: a file that cannot be read or has no text; no tokenizer for a text.
    """
    length = settings.max_length if writes(model) else min(settings.max_length, calibration.row_length)
    own = calibration.model_copy(update={"tokens": settings.tokens, "max_length": length, "mix": 0.0})
    if calibration.text is None and task is not None:
        held = own.model_copy(update={"tokens": HELD, "batch_size": ROWS})
        decide = calibration_batches(model, tokenizer, held, task=task, rows=dev) if dev else []
        some = decide or calibration_batches(model, tokenizer, held, task=task, rows=rows)
        image = tokens_each(model.config)
        rows_read = sum(len(next(iter(batch.values()))) for batch in some)
        size = sum(size_of(batch, image) for batch in some) / rows_read  # of a row
        own = own.model_copy(update={"batch_size": settings.texts_a_step(size)})
        learned = calibration_batches(model, tokenizer, own, task=task, rows=rows, seed=seed)
        return [(learned, 1.0)], {task.name: decide} if decide else {}
    own = own.model_copy(update={"batch_size": settings.texts_a_step(length)})
    many = own.model_copy(update={"text": None})
    share = 1.0 if calibration.text is None else calibration.mix
    parts: Parts = []
    for each, part in ((own, 1 - share), (many, share)):
        if part:
            parts.append((calibration_batches(model, tokenizer, each, seed=seed), part))
    return parts, kept_apart(model, tokenizer, own, "decide", HELD)
