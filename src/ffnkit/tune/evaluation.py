"""Metrics and loss of a model on a split of a task."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding

from ffnkit.errors import FfnkitError


def encoded(task: Any, dataset: Any, tokenizer: Any, max_length: int) -> Any:
    """``dataset`` as token ids; one that is encoded already comes back as it is."""
    if "input_ids" in dataset.column_names:
        return dataset
    return task.encode(dataset, tokenizer, max_length)


def lengths(dataset: Any) -> np.ndarray:
    """The number of tokens of each example of an encoded dataset."""
    return np.array([len(ids) for ids in dataset["input_ids"]], dtype=np.int64)


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a model's output: some models give further tensors beside them."""
    logits = output.logits if hasattr(output, "logits") else output[1]
    return logits[0] if isinstance(logits, tuple | list) else logits


def evaluate(
    model: nn.Module, tokenizer: Any, task: Any, dataset: Any, *, batch_size: int = 64, max_length: int = 128
) -> dict[str, float]:
    """Every metric of ``task`` on ``dataset``, and "loss", the mean over the examples.

    Examples are taken in order of length, for less padding; predictions go back to the dataset's order before the
    metrics are computed. The model runs where it is, in eval mode; its mode is restored.

    Args:
        dataset: rows of the task, or rows that :meth:`Task.encode` has encoded.
        batch_size: examples a forward pass.
        max_length: longer texts are cut, in tokens.

    Raises:
        FfnkitError: no rows.
    """
    data = encoded(task, dataset, tokenizer, max_length)
    if len(data) == 0:
        raise FfnkitError(f"evaluating on {task.name}", "the split has no rows", "Give at least one row")
    order = np.argsort(-lengths(data), kind="stable")
    device = next(model.parameters()).device
    collate = DataCollatorWithPadding(tokenizer)
    known = _arguments(model)
    keep = [name for name in data.column_names if name in known or name in ("label", "labels")]
    data = data.select_columns(keep)
    predictions: list[np.ndarray] = []
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = [data[int(i)] for i in order[start : start + batch_size]]
                batch = {name: value.to(device) for name, value in collate(rows).items()}
                output = model(**batch)
                losses.append(float(output.loss) * len(rows))
                predictions.append(logits_of(output).float().cpu().numpy())
    finally:
        model.train(was_training)
    scores = np.concatenate(predictions)
    restored = np.empty_like(scores)
    restored[order] = scores
    name = "labels" if "labels" in data.column_names else "label"
    metrics = task.compute_metrics(restored, np.asarray(data[name]))
    return {**{key: float(value) for key, value in metrics.items()}, "loss": float(np.sum(losses) / len(order))}


def _arguments(model: nn.Module) -> set[str]:
    """Names of the inputs of a model, of the one inside where peft wraps it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return set(inspect.signature(inner.forward).parameters)
