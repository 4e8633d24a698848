"""The scalar whose gradients make a kernel, and single examples out of padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, checked, forward
from ffnkit.errors import FfnkitError

Output = Literal["probability", "logit"]
IGNORED = -100
ALONG = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


def check_output(output: str) -> None:
    """Raises FfnkitError where there is no such output."""
    if output not in get_args(Output):
        raise FfnkitError(f"ntk output '{output}'", "there is no such output", "Choose probability or logit")


def scalar(model: nn.Module, example: Batch, output: Output = "probability") -> Tensor:
    """f(x) of one example.

    - A classifier: "probability" softmax(logits)[0], as the paper has it; "logit" logits[0]. A regression: its one
      number in both cases.
    - A model that writes (decoder, encoder-decoder, masked language model): "probability" the sum of the target
      tokens' log-probabilities, "logit" the sum of their logits. Targets are the labels; without labels, outside
      of encoder-decoders, the tokens themselves.

    Raises:
        FfnkitError: a model without logits, or one that writes without targets.
    """
    found = forward(model, example)
    logits = getattr(found, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        do = "Open it with a head for a task (--task NAME), or leave the kernel out (--no-ntk)"
        raise FfnkitError(f"the kernel of {type(model).__name__}", "it gives no logits", do)
    if logits.ndim == 2:
        row = logits[0].float() if logits.dtype.itemsize < 4 else logits[0]
        return row[0] if output == "logit" or len(row) == 1 else row.softmax(-1)[0]
    targets = _targets(model, example)
    logits = logits[0]
    if _forecasts(model):
        logits, targets = logits[:-1], targets[1:]
    kept = targets.ne(IGNORED)
    if not bool(kept.any()):
        raise FfnkitError("the kernel of a model that writes", "an example has no target", "Give batches with labels")
    logits = logits[kept]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    scores = logits if output == "logit" else logits.log_softmax(-1)
    return scores.gather(1, targets[kept][:, None]).sum()


def _targets(model: nn.Module, example: Batch) -> Tensor:
    """(tokens,) ids, -100 where none is asked for."""
    labels = example.get("labels")
    if labels is not None and labels.ndim == 2:
        return labels[0]
    if "input_ids" not in example or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        do = "Give batches with labels, as a task's collator makes them"
        raise FfnkitError(f"the kernel of {type(model).__name__}", "the data have no labels", do)
    ids, mask = example["input_ids"][0], example.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask[0] == 0, IGNORED)


def _forecasts(model: nn.Module) -> bool:
    """Whether the logits at a token are of the next one."""
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return not two and "MaskedLM" not in type(model).__name__


def singles(batches: Iterable[Batch], count: int, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """The first ``count`` examples as batches of one, right padding cut off.

    Raises:
        FfnkitError: there are fewer.
    """
    found: list[dict[str, Any]] = []
    for example in _rows(batches):
        if len(found) == count:
            break
        found.append({k: v.to(device) if isinstance(v, Tensor) else v for k, v in _trimmed(example).items()})
    if len(found) < count:
        raise FfnkitError(f"a kernel of {count} examples", f"the data have {len(found)}", "Ask for fewer examples")
    return found


def rows_in(batch: Batch) -> int:
    """The examples of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _rows(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    for batch in checked(batches, "data"):
        size = rows_in(batch)
        for row in range(size):
            # clones, so that a row does not keep its whole batch
            yield {k: _row(v, row, size) for k, v in batch.items()}


def _row(value: Any, row: int, size: int) -> Any:
    fits = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
    return value[row : row + 1].clone() if fits else value


def _trimmed(example: Mapping[str, Any]) -> dict[str, Any]:
    """Without the columns at the end that are padding in every tensor that lies along the tokens."""
    mask = example.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(mask.any()):
        return dict(example)
    length = int(mask[0].nonzero().max()) + 1

    def cut(name: str, value: Any) -> Any:
        if name not in ALONG or not isinstance(value, Tensor) or value.shape != mask.shape:
            return value
        if name == "labels" and bool(value[:, length:].ne(IGNORED).any()):  # of a decoder's own tokens
            return value
        return value[:, :length]

    return {name: cut(name, value) for name, value in example.items()}
