"""Metrics and loss of a model on a split of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.tasks.generation.writer import once
from ffnkit.tasks.protocol import Evaluation
from ffnkit.tasks.rows.splitting import Splits
from ffnkit.tasks.running import encoded_rows, lengths, logits_of
from ffnkit.tasks.settings import GenerationSettings

__all__ = ["assess", "assess_all", "encoded_rows", "evaluate", "lengths", "logits_of", "write_predictions"]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    dataset: Any,
    *,
    batch_size: int = 64,
    max_length: int = 128,
    generation: GenerationSettings | None = None,
    predictions: str | Path | None = None,
) -> dict[str, float]:
    """Every metric of ``task`` on ``dataset``, and "loss": the mean over examples, or over target tokens.

    The model runs where it is, in eval mode; its mode is restored.

    Args:
        dataset: rows of the task, or rows that its ``encode`` has encoded (then without metrics of generated text).
        batch_size: examples a forward pass.
        max_length: longer texts are cut, in tokens.
        generation: how a generation task decodes.
        predictions: a file for what a generation task wrote: JSON lines of prompt, prediction, references.

    Raises:
        FfnkitError: no rows, or predictions of a task that writes none.
    """
    found = assess(model, tokenizer, task, dataset, batch_size=batch_size, max_length=max_length, generation=generation)
    if predictions is not None:
        write_predictions(predictions, found, task)
    return found.to_dict()


def assess(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    dataset: Any,
    *,
    batch_size: int = 64,
    max_length: int = 128,
    generation: GenerationSettings | None = None,
) -> Evaluation:
    """As :func:`evaluate`, with the predictions and figures of speed."""
    if len(dataset) == 0:
        raise FfnkitError(f"evaluating on {task.name}", "the split has no rows", "Give at least one row")
    found: Evaluation = task.evaluate(
        model, tokenizer, dataset, batch_size=batch_size, max_length=max_length, generation=generation
    )
    return found


def assess_all(model: nn.Module, tokenizer: Any, task: Any, splits: Splits[Any], **how: Any) -> dict[str, Evaluation]:
    """:func:`assess` of every reported split: "report", and the further ones by name.

    What is in several of them (a test split and its parts) is written once; figures of speed are of what is new.
    """
    with once():
        every = {"report": splits.report, **splits.extra}
        return {name: assess(model, tokenizer, task, rows, **how) for name, rows in every.items()}


def is_predictions(path: Path) -> bool:
    """Whether a file begins with what :func:`write_predictions` writes."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and set(first) == {"prompt", "prediction", "references"}


def write_predictions(path: str | Path, found: Evaluation, task: Any) -> None:
    """What a generation task wrote as JSON lines, in one piece. Raises FfnkitError where there is nothing."""
    from ffnkit.io.files import write_text

    if not found.predictions:
        raise FfnkitError(f"predictions of {task.name}", f"a {task.kind} writes no texts", "Leave the file out")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.predictions]
    write_text(Path(path), "".join(lines))
