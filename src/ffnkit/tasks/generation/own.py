"""Rows of the user's own files as prompts and targets: summaries, answers, translations."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.rows.files import check_columns, in_words, named, read
from ffnkit.tasks.rows.splitting import Source, Table


def read_own(
    train: str | Path | None,
    validation: str | Path | None,
    test: str | Path | None,
    *,
    inputs: Sequence[str],
    target: str,
    template: str | None,
    name: str,
) -> tuple[Source, str]:
    """The checked rows, and the template that made the prompts; see :func:`ffnkit.tasks.generation.sets.file_data`."""
    inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if not inputs or len({*inputs, target}) != len(inputs) + 1:
        found = f"inputs {', '.join(inputs) or 'none'} and target {target}"
        raise FfnkitError(f"task {name}", found, "Name one or more input columns, and another for the target")
    parts = template_parts(template, inputs) if template is not None else _default(inputs, target)
    files = named(train, validation, test, name)
    tables = {key: _table(path, inputs, target, parts) for key, path in files.items()}
    source = Source(
        train=tables.get("train"),
        report=tables.get("report"),
        extra={"test": tables["test"]} if "test" in tables else {},
        where=in_words(files),
    )
    return source, "".join(text + (f"{{{column}}}" if column else "") for text, column in parts)


def _default(inputs: tuple[str, ...], target: str) -> list[tuple[str, str]]:
    """As of "question: {question} context: {context} answer:"."""
    starts = [f"{'' if rank == 0 else ' '}{column}: " for rank, column in enumerate(inputs)]
    return [*zip(starts, inputs, strict=True), (f" {target}:", "")]


def template_parts(template: str, inputs: Sequence[str]) -> list[tuple[str, str]]:
    """(text, column after it) pairs of a template; the last may have no column.

    Raises:
        FfnkitError: braces that do not match or hold something else than a column, a column that is none of
            ``inputs``, or one of them left out.
    """
    asked = f"template {template!r}"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FfnkitError(asked, f"its braces do not match ({error})", "Write a brace itself as {{ or }}") from error
    parts = [(text, column or "") for text, column, _, _ in parsed]
    if any(column == "" or form or conversion for _, column, form, conversion in parsed if column is not None):
        raise FfnkitError(asked, "a pair of braces holds something else than a column", "Write {column} only")
    used = [column for _, column in parts if column]
    unknown = [column for column in used if column not in inputs]
    unused = [column for column in inputs if column not in used]
    if unknown or unused:
        found = f"it names {', '.join(unknown)}" if unknown else f"it leaves out {', '.join(unused)}"
        raise FfnkitError(asked, found, f"Use each of the input columns {', '.join(inputs)}, and no other")
    return parts


def filled_in(parts: list[tuple[str, str]], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The texts that a template makes of the rows of ``columns``."""
    count = len(next(iter(columns.values())))
    return [
        "".join(text + (columns[column][row].strip() if column else "") for text, column in parts)
        for row in range(count)
    ]


def _table(path: Path, inputs: tuple[str, ...], target: str, parts: list[tuple[str, str]]) -> Table:
    where = f"data file {path}"
    rows = read(path)
    columns = {column: _column(rows, column, where) for column in (*inputs, target)}
    for column in inputs:
        values = columns[column]
        other = [row for row, value in enumerate(values) if not isinstance(value, str)]
        # One of several inputs may be empty (no context); a prompt may not.
        empty = [row for row in range(len(values)) if not any(str(columns[each][row]).strip() for each in inputs)]
        for bad, what in ((other, f"no string in {column!r}"), (empty, f"no text in {', '.join(map(repr, inputs))}")):
            if bad:
                found = f"{len(bad)} of {len(values)} rows have {what}, row {bad[0] + 1} first"
                raise FfnkitError(where, found, "Fill or remove these rows")
    prompts = filled_in(parts, columns)
    return {
        "prompt": prompts,
        "references": _references(columns[target], target, where),
        "segments": [[(prompt, "")] for prompt in prompts],
    }


def _column(rows: Table, name: str, where: str) -> list[Any]:
    """A column, or for "a.b" key b of the objects in column a."""
    outer, _, inner = name.partition(".")
    if name in rows or not inner or outer not in rows:
        check_columns(rows, [name], where)
        return rows[name]
    return [value.get(inner) if isinstance(value, dict) else None for value in rows[outer]]


def _references(values: list[Any], target: str, where: str) -> list[list[str]]:
    """Lists of stripped targets, from strings, lists of strings, or SQuAD's {"text": [...]}."""
    plain = [value.get("text") if isinstance(value, dict) else value for value in values]
    lists: list[Any] = [[value] if isinstance(value, str) else value for value in plain]

    def good(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(one, str) and one.strip() for one in value)

    bad = [row for row, several in enumerate(lists) if not good(several)]
    if bad:
        found = f"{len(bad)} of {len(values)} rows have no text in {target!r}, row {bad[0] + 1} first"
        raise FfnkitError(where, found, "Give every row a string there, or a list of strings, none of them empty")
    return [[one.strip() for one in value] for value in lists]
