"""Running a model over encoded examples: order, inputs, eval mode, and the loss of every target token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ffnkit.io.progress import counted
from ffnkit.tasks.protocol import Collate

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a token that does not count, as in transformers."""


def encoded_rows(task: Any, dataset: Any, tokenizer: Any, max_length: int, model: Any) -> Any:
    """``dataset`` as a model's inputs; one that is encoded already comes back as it is."""
    if any(name in dataset.column_names for name in ("input_ids", "pixel_values")):
        return dataset
    return task.encode(dataset, tokenizer, max_length, model=model)


def lengths(dataset: Any) -> np.ndarray:
    """The number of tokens of each example of an encoded dataset, of the longest text where it has several; of images,
    which are all of one size, 1."""
    if "input_ids" not in dataset.column_names:
        return np.ones(len(dataset), dtype=np.int64)
    rows = dataset["input_ids"]
    return np.array([max(map(len, ids)) if isinstance(ids[0], list) else len(ids) for ids in rows], dtype=np.int64)


def by_length(dataset: Any) -> np.ndarray:
    """The order of an encoded dataset from long to short: less padding, and the largest batch comes first."""
    return np.argsort(-lengths(dataset), kind="stable")


def forward_names(model: Any) -> set[str]:
    """Names of the inputs of a model, of the one inside where peft wraps it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: some models give further tensors beside them."""
    logits = output.logits if hasattr(output, "logits") else output[1]
    return logits[0] if isinstance(logits, tuple | list) else logits


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode is restored."""
    import torch

    from ffnkit.calibration import batches

    with batches.evaluating(model), torch.inference_mode():
        yield


def is_seq2seq(model: Any) -> bool:
    """Whether an encoder reads and a decoder writes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def target_counts(labels: Tensor, model: Any) -> Tensor:
    """Target tokens of each row of ``labels`` (batch, tokens); nothing forecasts the first token of a decoder."""
    return (labels if is_seq2seq(model) else labels[:, 1:]).ne(IGNORED).sum(-1)


def row_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each row's target tokens (nats, float64) and their number, both (batch,).

    Computed from the logits, in float32 a row at a time: losses that a model adds (of routers) are not in it.
    """
    import torch
    from torch.nn import functional as F

    labels, two = batch["labels"], is_seq2seq(model)
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in forward_names(model) else {}
    inputs = batch if two else {name: value for name, value in batch.items() if name != "labels"}
    logits = logits_of(model(**inputs, **more))
    if not two:
        logits, labels = logits[:, :-1], labels[:, 1:]
    sums = []
    for row, wanted in zip(logits, labels, strict=True):
        kept = wanted.ne(IGNORED)
        sums.append(F.cross_entropy(row[kept].float(), wanted[kept], reduction="none").double().sum())
    return torch.stack(sums), labels.ne(IGNORED).sum(-1)


def token_loss(model: Any, data: Any, collate: Collate, batch_size: int) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) of all target tokens of encoded examples, and their number."""
    order = by_length(data)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for start in counted(range(0, len(order), batch_size), "evaluating"):
            rows = [data[int(i)] for i in order[start : start + batch_size]]
            batch = {name: value.to(device) for name, value in collate(rows).items()}
            losses, counts = row_losses(model, batch)
            total += float(losses.sum())
            count += int(counts.sum())
    return total, count
