"""The forms that rows of dialogues come in: messages, Alpaca, prompt and completion, message trees.

Tables made of them have the columns "messages" (the dialogue, its last message the assistant's), "prompt" (str: what
stands before that message, in words) and "references" (its text, in a list).
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.instructions import trees
from ffnkit.tasks.instructions.chat import Messages, answered
from ffnkit.tasks.rows.files import check_columns, csv_rows, open_arrow
from ffnkit.tasks.rows.splitting import Table, size

ROLES = ("system", "user", "assistant")
FORMS = "messages; instruction, input and output; prompt and completion; or message trees"


def form_of(columns: list[str]) -> str | None:
    """Which form of dialogues columns of these names make: "messages", "alpaca", "completion", "trees"; else None."""
    if "messages" in columns:
        return "messages"
    if "instruction" in columns and ("output" in columns or "instances" in columns):
        return "alpaca"
    if "completion" in columns and "prompt" in columns:
        return "completion"
    return "trees" if trees.is_tree(columns) else None


def columns_at(path: str | Path) -> list[str]:
    """The columns of a file as its first row tells them; [] where it cannot be read."""
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    if not os.path.isfile(path):
        return []
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        if kind in (".arrow", ".feather"):
            import pyarrow

            with pyarrow.memory_map(str(path)) as source:
                return list(open_arrow(source).schema.names)
        with path.open(encoding="utf-8-sig") as file:
            if kind in (".csv", ".tsv"):
                return list(next(csv_rows(file, path), []))
            text = file.read() if kind == ".json" else next((line for line in file if line.strip()), "")
        row = (
            json.JSONDecoder().raw_decode(text.lstrip(" \t\r\n["))[0] if kind in (".json", ".jsonl", ".ndjson") else {}
        )
        return list(row) if isinstance(row, dict) else []
    except (OSError, ValueError, csv.Error):
        return []


def dialogues(table: Table, where: str) -> tuple[Table, int]:
    """The table of the dialogues in rows of any of the forms, and the number of rows without an answer, left out.

    Raises:
        FfnkitError: other columns, or rows that are no dialogues.
    """
    form = form_of(list(table))
    if form is None:
        check_columns(table, ("messages",), f"{where}: dialogues ({FORMS})")
    if form == "trees":
        rows: list[Any] = trees.best_paths(table, ())
    else:
        make = {"messages": _from_messages, "alpaca": _from_alpaca, "completion": _from_completion}[str(form)]
        rows = [make({name: table[name][row] for name in table}) for row in range(size(table))]
    bad = [row for row, each in enumerate(rows) if not _sound(each)]
    if bad:
        found = f"{len(bad)} of {len(rows)} rows are no dialogues, row {bad[0] + 1} first"
        do = f"Give every message a role ({', '.join(ROLES)}) and a text, every instruction and output a string"
        raise FfnkitError(where, found, do)
    return table_of(rows)


def table_of(rows: list[Messages]) -> tuple[Table, int]:
    """Dialogues as a table, and the number of those without an answer, which are left out."""
    cleaned = [messages for messages in map(_cleaned, rows) if messages]
    made: Table = {
        "messages": cleaned,
        "prompt": [in_words(messages[:-1]) for messages in cleaned],
        "references": [[messages[-1]["content"]] for messages in cleaned],
    }
    return made, len(rows) - len(cleaned)


def in_words(messages: Messages) -> str:
    """The text of a single message; of several, each after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{each['role']}: {each['content']}" for each in messages)


def _from_messages(row: dict[str, Any]) -> Any:
    return row["messages"]


def _from_alpaca(row: dict[str, Any]) -> Any:
    first = (row.get("instances") or [{}])[0]
    given = row.get("input", first.get("input")) or ""
    output = row.get("output", first.get("output"))
    if not all(isinstance(each, str) for each in (row["instruction"], given)):
        return None
    asked = f"{row['instruction'].strip()}\n\n{given.strip()}" if given.strip() else row["instruction"]
    system = [_message("system", row["system"])] if row.get("system") else []
    return [*system, _message("user", asked), _message("assistant", "" if output is None else output)]


def _from_completion(row: dict[str, Any]) -> Any:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    return [_message("user", prompt), _message("assistant", "" if completion is None else completion)]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _sound(messages: Any) -> bool:
    def good(each: Any) -> bool:
        return isinstance(each, dict) and each.get("role") in ROLES and isinstance(each.get("content"), str)

    return isinstance(messages, list) and all(map(good, messages))


def _cleaned(messages: Messages) -> Messages | None:
    """Stripped, without empty system messages, up to the last answer before an empty message; None without any."""
    whole: Messages = []
    for each in messages:
        content = each["content"].strip()
        if not content and each["role"] != "system":
            break
        whole += [{"role": each["role"], "content": content}] if content else []
    places = answered(whole)
    return whole[: places[-1] + 1] if places else None
