"""Several examples in one row of a batch: they see nothing of each other, and their positions begin anew."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.running import IGNORED, evaluating, forward_names, is_seq2seq, logits_of

if TYPE_CHECKING:
    from datasets import Dataset

_LEAVE = "Leave packing out"
_TOKENS = 12  # of an example, where a model is tried


def pack(model: Any, task: Any, data: Dataset, length: int) -> Dataset:
    """Encoded examples in rows of up to ``length`` tokens, for this model.

    Raises:
        FfnkitError: labels that are not of tokens, or a model whose tokens would see other examples.
    """
    if "input_ids" not in data.column_names or (len(data) and not isinstance(data[0]["labels"], list)):
        raise FfnkitError("packing", f"task {task.name} is a {task.kind}, without targets of tokens", _LEAVE)
    if is_seq2seq(model):
        raise FfnkitError("packing", "the model is an encoder-decoder", _LEAVE)
    if len(data):
        check_model(model, data)
    return packed(data, length)


def packed(data: Dataset, length: int) -> Dataset:
    """``input_ids``, ``labels`` (and ``token_type_ids``) of several examples in a row, with ``position_ids``.

    Nothing forecasts the first token of an example, so that the mean over target tokens is the one of the examples.
    """
    import pyarrow
    from datasets import Dataset

    names = [name for name in ("input_ids", "labels", "token_type_ids") if name in data.column_names]
    columns: dict[str, list[list[int]]] = {name: data[:][name] for name in names}
    columns["labels"] = [[IGNORED, *labels[1:]] for labels in columns["labels"]]
    columns["position_ids"] = [list(range(len(ids))) for ids in columns["input_ids"]]
    rows = bins([len(ids) for ids in columns["input_ids"]], length)
    kind = pyarrow.list_(pyarrow.int32())
    joined = {name: [[token for i in row for token in each[i]] for row in rows] for name, each in columns.items()}
    return Dataset(pyarrow.table({name: pyarrow.array(each, kind) for name, each in joined.items()}))


def bins(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which sizes go together: from the largest, each to the fullest row that has room (best fit decreasing).

    The numbers of a row ascend, and the rows go by their first; a size above ``length`` has a row of its own.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for one in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(free, (sizes[one], -1))
        room, row = free.pop(place) if place < len(free) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(one)
        bisect.insort(free, (room - sizes[one], row))
    return sorted(map(sorted, rows))


def check_model(model: Any, data: Dataset) -> None:
    """Tries a row of two examples: the second must not feel the first, and be read as it is alone.

    Models tell the examples of a row by positions that begin anew, where no attention mask is given.

    Raises:
        FfnkitError: the model takes no positions, or does not keep the examples apart.
    """
    import torch

    kind = type(model).__name__
    if "position_ids" not in forward_names(model):
        raise FfnkitError("packing", f"{kind} takes no positions", _LEAVE)
    first, second = (data[i]["input_ids"][:_TOKENS] for i in (0, len(data) - 1))
    other = [second[0], *first[:-1]] if len(set(first)) > 1 else [(first[0] + 1) % 2] * len(first)
    place = list(range(len(first)))
    own = list(range(len(second)))
    device = next(model.parameters()).device

    def logits(ids: list[int], positions: list[int]) -> torch.Tensor:
        more: dict[str, Any] = {"use_cache": False} if "use_cache" in forward_names(model) else {}
        batch = {"input_ids": ids, "position_ids": positions}
        out = model(**{name: torch.tensor([row], device=device) for name, row in batch.items()}, **more)
        return logits_of(out)[0, -len(second) :].float()

    with evaluating(model):
        found, moved, alone = (
            logits(first + second, place + own),
            logits(other + second, place + own),
            logits(second, own),
        )
    size = float(alone.abs().max().clamp(min=1e-6))
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    near, far = (1e-5, 1e-3) if exact else (1e-2, 5e-2)
    if float((found - moved).abs().max()) > near * size or float((found - alone).abs().max()) > far * size:
        raise FfnkitError("packing", f"{kind} does not keep the examples of a row apart", _LEAVE)
