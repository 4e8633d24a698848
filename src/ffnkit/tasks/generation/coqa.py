"""CoQA: questions on a story, each after those before it, from the official files or from the hub.

Source: Reddy et al., CoQA: A Conversational Question Answering Challenge, TACL 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.generation.sets import TextData
from ffnkit.tasks.rows.files import check_columns, read
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Source, Table, size

HUB = ("stanfordnlp/coqa",)
_FILES = {"train": ("coqa-train-v1.0.json", "train.jsonl"), "validation": ("coqa-dev-v1.0.json", "validation.jsonl")}
"""By split: the official file, and the name of one with a story a row."""


def _load(data_dir: Path | None) -> Source:
    asked, official = "data of task coqa", tuple(names[0] for names in _FILES.values())
    folder = data_folder("coqa", data_dir, official)
    if folder:
        paths = {split: [folder / name for name in names] for split, names in _FILES.items()}
        there = {split: next((p for p in several if p.is_file()), None) for split, several in paths.items()}
        stories, where = {split: read(path) for split, path in there.items() if path}, f"folder {folder}"
    else:
        loaded = from_hub("coqa", HUB, official)
        stories, where = {str(split): dict(rows.to_dict()) for split, rows in loaded.items()}, f"hub {HUB[0]}"
    absent = next((names[0] for split, names in _FILES.items() if split not in stories), None)
    if absent is not None:
        raise FfnkitError(asked, f"{where} has no {absent}", "Put the official one there")
    found = {split: turns(table, f"{where}, {split}") for split, table in stories.items()}
    lone = all(len(several) == 1 for several in found["validation"]["references"])
    note = ("the report has one answer a question: the official F1 is over four people's (coqa-dev-v1.0.json)",) * lone
    return Source(found["train"], found["validation"], where, notes=note, together="story")


def turns(table: Table, where: str) -> Table:
    """A row a question: the story, the turns before it and the question, and the answers of all people to it.

    Args:
        table: the official columns (lists of {"input_text", ...}, "additional_answers" by person), or the hub's
            ("questions": texts, "answers": {"input_text": texts}).

    Raises:
        FfnkitError: no such columns, or a story whose questions and answers are not as many.
    """
    check_columns(table, ("story", "questions", "answers"), where)
    out: Table = {"prompt": [], "references": [], "segments": [], "story": []}
    more = table.get("additional_answers") or [None] * size(table)
    rows = zip(table["story"], table["questions"], table["answers"], more, strict=True)
    for number, (story, asked, answered, others) in enumerate(rows, start=1):
        at = f"{where}, story {number}"
        questions, answers = _texts(asked, at), _texts(answered, at)
        everyone = [answers, *(_texts(each, at) for each in (others or {}).values() if each)]
        if not isinstance(story, str) or not questions or any(len(each) != len(questions) for each in everyone):
            counts = ", ".join(str(len(each)) for each in everyone)
            raise FfnkitError(at, f"{len(questions)} questions and {counts} answers", "Give an answer to each question")
        said = story.strip() + "\n"
        for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            said += f"\nQ: {question}\nA:"
            out["prompt"].append(said)
            out["references"].append([each[turn] for each in everyone])
            out["segments"].append([(said, "")])
            out["story"].append(story)
            said += f" {answer}"
    return out


def _texts(given: Any, where: str) -> list[str]:
    """The texts of a list of {"input_text": text}, of {"input_text": texts}, or of a list of texts."""
    if isinstance(given, Mapping):
        given = given.get("input_text")
    texts: list[Any] = [each.get("input_text") if isinstance(each, Mapping) else each for each in given or ()]
    if not all(isinstance(each, str) for each in texts):
        raise FfnkitError(where, "a question or an answer is no text", "Give strings, or objects with input_text")
    return [" ".join(each.split()) for each in texts]


DATA: dict[str, TextData] = {
    "coqa": TextData(
        "coqa",
        ("coqa_f1", "coqa_exact_match"),
        source=f"<data folder>/coqa, else {HUB[0]} on the hub",
        notes="answer a question on a story, after the turns before it",
        hub=HUB,
        max_new_tokens=32,
        load=_load,
    )
}
