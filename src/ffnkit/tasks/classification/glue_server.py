"""Predictions for GLUE's test server: rows without labels, and the files that the server asks for.

Source: the submission format of gluebenchmark.com: a file a task, "index" and "prediction" parted by a tab; class names
of MNLI, QNLI, RTE and the diagnostic set (AX), numbers of the others; similarities of STS-B from 0 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ffnkit.errors import FfnkitError
from ffnkit.io.files import write_text
from ffnkit.tasks.classification.glue import HUB, RANGE
from ffnkit.tasks.classification.label_words import WordsTask
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.rows.files import check_columns, read
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Table, size, take

FILES: dict[str, dict[str, tuple[str, str]]] = {
    "cola": {"CoLA.tsv": ("cola", "test")},
    "sst2": {"SST-2.tsv": ("sst2", "test")},
    "mrpc": {"MRPC.tsv": ("mrpc", "test")},
    "stsb": {"STS-B.tsv": ("stsb", "test")},
    "qqp": {"QQP.tsv": ("qqp", "test")},
    "mnli": {
        "MNLI-m.tsv": ("mnli", "test_matched"),
        "MNLI-mm.tsv": ("mnli", "test_mismatched"),
        "AX.tsv": ("ax", "test"),
    },
    "qnli": {"QNLI.tsv": ("qnli", "test")},
    "rte": {"RTE.tsv": ("rte", "test")},
    "wnli": {"WNLI.tsv": ("wnli", "test")},
}
"""By task: each file with the configuration of the hub (or folder of the data folder) and the split that it is of."""

NAMED = ("mnli", "qnli", "rte")  # whose predictions are names of classes
OPTIONAL = "AX.tsv"


def check(task: Any) -> None:
    """Raises FfnkitError for a task that the server does not know."""
    if task.name not in FILES or not isinstance(task, Task | WordsTask):
        do = f"Choose one of {', '.join(FILES)}"
        raise FfnkitError(f"predictions of {task.name} for GLUE's test server", "it is no task of GLUE", do)


def write_predictions(
    model: Any,
    tokenizer: Any,
    task: Any,
    out: str | Path,
    *,
    data_dir: str | Path | None = None,
    batch_size: int = 64,
    max_length: int = 128,
) -> dict[str, int]:
    """What a model answers on the test rows of a GLUE task, in the server's files; their names with their rows.

    The answers for the diagnostic set (AX) are those of MNLI's model, where its rows are at hand.

    Args:
        task: of GLUE, also by label words. out: the folder of the files; it is made.

    Raises:
        FfnkitError: another task, or no test rows within reach.
    """
    check(task)
    plain = task.task if isinstance(task, WordsTask) else task
    found = test_rows(plain, Path(data_dir) if data_dir is not None else None)
    written, folder = {}, Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for file, table in found.items():
        rows = plain.dataset({**table, plain.label: [0] * size(table)})  # a label that every task has; nobody reads it
        outputs = task.evaluate(model, tokenizer, rows, batch_size=batch_size, max_length=max_length).outputs
        answers = answers_of(plain, np.asarray(outputs))
        lines = [f"{index}\t{answer}\n" for index, answer in zip(table["idx"], answers, strict=True)]
        write_text(folder / file, "index\tprediction\n" + "".join(lines))
        written[file] = size(table)
    return written


def answers_of(task: Task, outputs: np.ndarray) -> list[str]:
    """Scores (n, labels), or numbers (n,) or (n, 1) of a regression, as the server reads them."""
    if task.kind == "regression":
        return [f"{value:.3f}" for value in outputs.reshape(len(outputs), -1)[:, 0].clip(*RANGE)]
    ids = outputs.argmax(-1)
    return [task.label_names[i] for i in ids] if task.name in NAMED else [str(int(i)) for i in ids]


def test_rows(task: Task, data_dir: Path | None) -> dict[str, Table]:
    """By file of the server the text columns and "idx", in its order; labels, -1 as a rule, are not looked at.

    Raises:
        FfnkitError: no test rows within reach, or rows that lack a text.
    """
    wanted = FILES[task.name]
    names = [f"{split}.jsonl" for _, split in wanted.values()]
    folder = data_folder(task.name, data_dir, names[:1])
    found = {}
    for file, (name, split) in wanted.items():
        table, where = _from_folder(folder.parent / name, split) if folder else _from_hub(name, split, file)
        if table is None and file == OPTIONAL:
            continue
        if table is None:
            raise FfnkitError(f"test rows of task {task.name}", f"{where} is not there", "Put the official one there")
        found[file] = _checked(table, task.text, where)
    return found


def _from_folder(folder: Path, split: str) -> tuple[Table | None, str]:
    path = folder / f"{split}.jsonl"
    plain = folder / "test.jsonl"  # of mnli's matched rows too
    path = plain if split == "test_matched" and not path.is_file() else path
    return (read(path) if path.is_file() else None), str(path)


def _from_hub(name: str, split: str, file: str) -> tuple[Table | None, str]:
    where = f"{HUB} {name}/{split}"
    try:
        loaded: Mapping[str, Any] = from_hub(name, (HUB, name), [f"{split}.jsonl"])
    except FfnkitError:
        if file != OPTIONAL:
            raise
        return None, where
    return (dict(loaded[split].to_dict()) if split in loaded else None), where


def _checked(table: Table, text: tuple[str, ...], where: str) -> Table:
    check_columns(table, text, where)
    bad = [row for column in text for row, value in enumerate(table[column]) if not isinstance(value, str)]
    if bad:
        raise FfnkitError(where, f"row {bad[0] + 1} lacks a text", f"Give every row {' and '.join(text)}")
    index = table.get("idx", list(range(size(table))))
    if sorted(index) != list(range(size(table))):
        raise FfnkitError(where, "idx does not count the rows from 0 on", "Give the official rows")
    order = sorted(range(size(table)), key=index.__getitem__)
    return take({**{column: table[column] for column in text}, "idx": index}, order)
