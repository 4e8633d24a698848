"""Rows of CSV, JSON-lines, JSON, parquet and Arrow files as columns, with errors that name file and line."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError, FfnkitWarning
from ffnkit.tasks.rows.splitting import Table, size

_FORMATS = "Give a .csv, .tsv, .jsonl, .json (a list of objects), .parquet or .arrow file"


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
        ".arrow": _arrow,
        ".feather": _arrow,
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


def named(
    train: str | Path | None, validation: str | Path | None, test: str | Path | None, name: str = "files"
) -> dict[str, Path]:
    """The files of a task by split ("train", "report", "test"), those that are given.

    Raises:
        FfnkitError: neither a file to train on nor one to report on.
    """
    given = {"train": train, "report": validation, "test": test}
    found = {split: Path(path) for split, path in given.items() if path is not None}
    if not {"train", "report"} & found.keys():
        raise FfnkitError(f"task {name}", "no file is named", "Name one to train on, or one to evaluate")
    return found


def in_words(files: Mapping[str, Path]) -> str:
    """Where the rows of :func:`named` files come from."""
    return ", ".join(f"{split} {path}" for split, path in files.items())


def csv_rows(file: Iterable[str], path: Path) -> Any:
    """A reader of CSV, or of TSV by the path's ending; cells may be as long as they like."""
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default; a C long, which has 32 bits on Windows
    return csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)


def _csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv_rows(file, path)
        try:
            header: list[str] = next(reader, [])
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
    return columns_of(_whole(rows, path))


def _object(line: str, asked: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FfnkitError(asked, f"this is not JSON ({error})", "Repair or remove the line") from error
    if not isinstance(row, dict):
        raise FfnkitError(asked, "it holds no object", "Write one object a line")
    return row


def _json(path: Path) -> Table:
    asked = f"data file {path}"
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        found = f"this is not JSON ({error.msg})"
        raise FfnkitError(f"{asked}, line {error.lineno}", found, "Repair it, or name it .jsonl") from error
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]  # as CoQA and SQuAD are released, beside a version
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FfnkitError(asked, "it is not a list of objects", _FORMATS)
    return columns_of(_whole(rows, path))


def _whole(rows: list[Any], path: Path) -> list[Any]:
    """Rows with U+FFFD for each half of a surrogate pair, which JSON can write and no encoding of text can hold."""
    found = [_mended(row) for row in rows]
    changed = [number for number, (before, after) in enumerate(zip(rows, found, strict=True), 1) if before != after]
    if changed:
        line = f"data file {path}: {len(changed)} rows have half of a surrogate pair, row {changed[0]} first"
        warnings.warn(f"{line}; it is read as U+FFFD", FfnkitWarning, stacklevel=2)
    return found


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(each) for each in value]
    return {_mended(key): _mended(each) for key, each in value.items()} if isinstance(value, dict) else value


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


def _arrow(path: Path) -> Table:
    """An Arrow file or stream; ``datasets`` writes streams."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            return dict(open_arrow(source).read_all().to_pydict())
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise FfnkitError(f"data file {path}", f"it is not a whole Arrow file ({reason})", "Write it again") from error


def open_arrow(source: Any) -> Any:
    """A reader of an Arrow file or stream, with its ``schema``."""
    import pyarrow

    try:
        return pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_stream(source)
