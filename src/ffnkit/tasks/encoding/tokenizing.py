"""Texts to token ids, in batches through the fast tokenizer, held in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 4096


def encode(dataset: Dataset, text: tuple[str, ...], label: str, kind: str, tokenizer: Any, max_length: int) -> Dataset:
    """``dataset`` as input_ids, attention_mask, token_type_ids where the tokenizer gives them, and labels.

    Where a tokenizer puts nothing between the two texts of a pair (GPT-2's), a line break goes there.

    Raises:
        FfnkitError: a length that leaves no room for a token of each text, or columns that are not there.
    """
    import pyarrow
    from datasets import Dataset

    missing = [column for column in (*text, label) if column not in dataset.column_names]
    if missing:
        found = f"no column {missing[0]!r} among {', '.join(dataset.column_names)}"
        raise FfnkitError("encode", found, "Give one of the splits of this task")
    pair = len(text) == 2
    least = tokenizer.num_special_tokens_to_add(pair=pair) + len(text)
    if max_length < least:
        raise FfnkitError(f"max_length {max_length}", "no room for the text", f"Use at least {least} tokens")
    limit = min(max_length, int(tokenizer.model_max_length))
    between = "\n" if pair and least - 1 == tokenizer.num_special_tokens_to_add(pair=False) + 1 else ""
    batches = []
    for start in counted(range(0, len(dataset), _BATCH), "reading tokens"):
        rows = dataset[start : start + _BATCH]
        texts = [rows[text[0]]] + ([[between + second for second in rows[text[1]]]] if pair else [])
        ids = tokenizer(*texts, truncation=True, max_length=limit, padding=False)
        batches.append(pyarrow.table(_columns(ids, rows[label], kind, tokenizer)))
    return Dataset(pyarrow.concat_tables(batches))


def _columns(ids: Any, labels: list[Any], kind: str, tokenizer: Any) -> dict[str, Any]:
    import pyarrow

    inputs = {name: ids[name] for name in ids}
    if not all(inputs["input_ids"]):
        _fill_empty(inputs, tokenizer)
    columns = {
        name: pyarrow.array(rows, pyarrow.list_(pyarrow.int32() if name == "input_ids" else pyarrow.int8()))
        for name, rows in inputs.items()
        if name in ("input_ids", "attention_mask", "token_type_ids")
    }
    columns["labels"] = pyarrow.array(labels, pyarrow.int64() if kind == "classification" else pyarrow.float32())
    return columns


def _fill_empty(inputs: dict[str, list[list[int]]], tokenizer: Any) -> None:
    """Gives rows without any token (empty texts, no special tokens) one token, so that a model can read them."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0]
    token = next(each for each in special if each is not None)
    for row, ids in enumerate(inputs["input_ids"]):
        if not ids:
            for name, rows in inputs.items():
                rows[row] = [{"input_ids": token, "attention_mask": 1}.get(name, 0)]
