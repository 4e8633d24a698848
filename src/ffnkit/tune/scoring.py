"""A task's metric as a score that a search can rank models by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.tasks.metrics import greater_is_better
from ffnkit.tasks.models import other_labels
from ffnkit.tune.evaluation import assess


def scorer(
    task: Any, tokenizer: Any, rows: Any, metric: str | None = None, *, batch_size: int = 64, max_length: int = 128
) -> Callable[[nn.Module], float]:
    """A function of a model: the metric on ``rows``, negated where less is better, so that higher is better.

    Args:
        rows: to choose by, not those of the report. metric: one of the task's, or "loss"; None: the one that chooses
            checkpoints.

    Raises:
        FfnkitError: a metric that the task does not have; from the function, a model whose head is for other labels.
    """
    name = metric or task.dev_metric
    known = [*task.metrics, "loss"]
    if name not in known:
        raise FfnkitError(f"score {name}", f"{task.name} has no such metric", f"Choose one of {', '.join(known)}")
    sign = 1.0 if greater_is_better(name) else -1.0

    def score(model: nn.Module) -> float:
        if why := other_labels(task, model.config):
            raise FfnkitError(f"score {name} of {task.name}", why, f"Tune the model on {task.name} first")
        found = assess(model, tokenizer, task, rows, batch_size=batch_size, max_length=max_length)
        return sign * found.to_dict()[name]

    score.__name__ = name
    return score


def with_score(
    method: Any, task: Any, tokenizer: Any, rows: Any, *, batch_size: int = 64, max_length: int = 128
) -> Any:
    """The method with its ``score``, where it is the name of a metric, made a function of the task.

    Raises:
        FfnkitError: the name of a metric and no task, or one that the task does not have.
    """
    if hasattr(method, "methods"):  # several in one
        sizes = {"batch_size": batch_size, "max_length": max_length}
        return dataclasses.replace(
            method, methods=[with_score(m, task, tokenizer, rows, **sizes) for m in method.methods]
        )
    name = getattr(method, "score", None)
    if not isinstance(name, str):
        return method
    if task is None:
        raise FfnkitError(f"score={name}", "a metric needs a task", "Add --task, or leave score out for the proxy")
    score = scorer(task, tokenizer, rows, name, batch_size=batch_size, max_length=max_length)
    return dataclasses.replace(method, score=score)
