"""Rows of CSV, JSON-lines, JSON and parquet files as columns, with errors that name file and line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.splitting import Table, size

_FORMATS = "Give a .csv, .tsv, .jsonl, .json (a list of objects) or .parquet file"


def read(path: str | Path) -> Table:
    """The columns of a file. Values of CSV files are strings; of the others what the file says.

    Raises:
        FfnkitError: no such file, another format, no rows, or a line that cannot be read.
    """
    path = Path(path).expanduser()
    readers: dict[str, Callable[[Path], Table]] = {
        ".csv": _csv,
        ".tsv": _csv,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".parquet": _parquet,
    }
    asked = f"data file {path}"
    if not os.path.isfile(path):
        found = "this is a folder" if os.path.isdir(path) else "there is no such file"
        raise FfnkitError(asked, found, _FORMATS)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise FfnkitError(asked, f"unknown kind of file {path.suffix!r}", _FORMATS)
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        found = f"it is not UTF-8 text (byte {error.start})"
        raise FfnkitError(asked, found, "Save it as UTF-8") from error
    except OSError as error:
        raise FfnkitError(asked, f"it cannot be read ({error.strerror or error})", "Check the file") from error
    if not size(table):
        raise FfnkitError(asked, "it has no rows", "Give a file with at least one row")
    return table


def check_columns(table: Table, columns: Iterable[str], where: str) -> None:
    """Raises FfnkitError, listing the columns there are, unless every one of ``columns`` is there."""
    missing = [column for column in columns if column not in table]
    if missing:
        found = f"no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, table)) or 'none'}"
        raise FfnkitError(where, found, "Name columns that are there")


def columns_of(rows: list[dict[str, Any]]) -> Table:
    """Rows as columns; None where a row lacks a column that another has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise FfnkitError(f"data file {path}, line 1", "two columns have one name", "Rename one of them")
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    found = f"{len(row)} fields where the header has {len(header)}"
                    raise FfnkitError(f"data file {path}, line {reader.line_num}", found, "Quote fields with commas")
                if row:
                    rows.append(row)
        except csv.Error as error:
            asked = f"data file {path}, line {reader.line_num}"
            raise FfnkitError(asked, f"this is not CSV ({error})", "Repair the line") from error
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    return {name: list(column) for name, column in zip(header, columns, strict=True)}


def _json_lines(path: Path) -> Table:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_object(line, f"data file {path}, line {number}"))
    return columns_of(rows)


def _object(line: str, asked: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FfnkitError(asked, f"this is not JSON ({error})", "Repair or remove the line") from error
    if not isinstance(row, dict):
        raise FfnkitError(asked, f"a JSON {type(row).__name__} where an object is wanted", "Write one object a line")
    return row


def _json(path: Path) -> Table:
    asked = f"data file {path}"
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        found = f"this is not JSON ({error.msg})"
        raise FfnkitError(f"{asked}, line {error.lineno}", found, "Repair it, or name it .jsonl") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FfnkitError(asked, "it is not a list of objects", _FORMATS)
    return columns_of(rows)


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        return dict(pyarrow.parquet.ParquetFile(path).read().to_pydict())
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise FfnkitError(
            f"data file {path}", f"it is not a whole parquet file ({reason})", "Write it again"
        ) from error
