"""Plain text for language modelling: wikitext2, tinystories, and files of the user's own."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.rows.files import check_columns, in_words, named, read
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Source, Splits, divide, once, size

TEXT = ("text",)
# A title stands between blank lines; formulas of the form "= ... =" do not.
_TITLE = re.compile(r"(?:(?<=\n)|\A)(?:[ \t]*\n|\A)[ \t]*= (?!=)[^\n]*[^=\s][ \t]*=[ \t]*(?=\n[ \t]*(?:\n|\Z)|\Z)")
_BLANK = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")


@dataclass(frozen=True)
class LanguageData:
    """Texts by name.

    Attributes:
        name: "wikitext2", "tinystories", or the user's.
        source: where the texts come from, in words.
        notes: a line on them.
        hub: name and configuration on the hub; () for other data.
        metrics: what is reported.
        load: reads the texts; takes the data folder or None.
    """

    name: str
    source: str = ""
    notes: str = ""
    hub: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("perplexity",)
    load: Callable[[Path | None], Source] = field(repr=False, compare=False, kw_only=True)

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits[list[str]]:
        """Reads the texts and splits them; arguments and errors as of :meth:`ffnkit.tasks.Task.splits`."""
        asked = f"data of task {self.name}"
        source = self.load(Path(data_dir) if data_dir is not None else None)
        source = once(source, TEXT, "", "texts")
        tables = divide(source, same=TEXT, asked=asked, what="texts", label="text", stratify=False, **limits)
        return tables.map(lambda table: table["text"])


def names() -> list[str]:
    """The texts that :func:`get` knows, in the order of the documentation."""
    return list(DATA)


def get(name: str) -> LanguageData:
    """The texts called ``name``; nothing is read before :meth:`LanguageData.splits`.

    Raises:
        FfnkitError: there are none of this name.
    """
    if name not in DATA:
        do = f"Choose one of {', '.join(DATA)}, or use file_data for files of your own"
        raise FfnkitError(f"language modelling task {name!r}", "there is no such task", do)
    return DATA[name]


def file_data(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    column: str = "text",
    name: str = "files",
    test: str | Path | None = None,
) -> LanguageData:
    """Texts from .txt, CSV, JSON-lines, JSON or parquet files, which are read and checked at once.

    Args:
        train: texts to train on; ``dev`` is carved out of them. None: ``validation`` is reported whole.
        validation: texts for the reported figure; by default a tenth of train is carved out, the same for every seed.
        column: the column of the text; a .txt file has none.
        name: the task's name.
        test: further texts to report on.

    Raises:
        FfnkitError: files that cannot be read, no such column, rows that are no text.
    """
    files = named(train, validation, test, name)
    source = source_of({split: read_texts(path, column) for split, path in files.items()}, in_words(files))
    return LanguageData(name, source=source.where, notes="text files", load=lambda _: source)


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    """The documents of a file, none of them blank.

    A .txt file that begins with a ``= Title =`` line is cut before each of these, and its documents put together are
    the file. Of another .txt file, blank lines part the documents. Of other files: the rows of ``column``.

    Raises:
        FfnkitError: the file cannot be read, has no such column, no text, or rows that are no strings.
    """
    path = Path(path).expanduser()
    asked = f"data file {path}"
    if path.suffix.lower() in (".txt", ".text", ".tokens", ".md") and os.path.isfile(path):
        try:
            texts = documents(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            found = f"it is not UTF-8 text (byte {error.start})"
            raise FfnkitError(asked, found, "Save it as UTF-8") from error
        except OSError as error:
            raise FfnkitError(asked, f"it cannot be read ({error.strerror or error})", "Check the file") from error
    else:
        table = read(path)
        check_columns(table, [column], asked)
        other = [row for row, value in enumerate(table[column]) if value is not None and not isinstance(value, str)]
        if other:
            found = f"{len(other)} of {size(table)} rows have no string in {column!r}, row {other[0] + 1} first"
            raise FfnkitError(asked, found, "Give every row a text there")
        texts = [value for value in table[column] if value and value.strip()]
    if not texts:
        raise FfnkitError(asked, "it has no text", "Give a file with at least one document")
    return texts


def documents(text: str) -> list[str]:
    """The documents of plain text; see :func:`read_texts`."""
    first = _TITLE.search(text)
    if first is None or text[: first.start()].strip():
        return [part.strip("\n") for part in _BLANK.split(text) if part.strip()]
    starts = [0, *(match.start() for match in _TITLE.finditer(text))][1:]
    starts[0] = 0
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def source_of(texts: Mapping[str, list[str]], where: str, notes: tuple[str, ...] = ()) -> Source:
    """Texts of the splits "train", "report" and "test", those that there are."""
    tables = {split: {"text": list(each)} for split, each in texts.items()}
    extra = {"test": tables["test"]} if "test" in tables else {}
    return Source(tables.get("train"), tables.get("report"), where, extra, notes)


def _load(name: str, hub: tuple[str, ...], end: str, data_dir: Path | None) -> Source:
    """Train, validation and test of a data folder (``end`` is the kind of its files) or of the hub."""
    wanted = [f"{split}{end}" for split in (("validation", "test") if end == ".txt" else ("train", "validation"))]
    folder = data_folder(name, data_dir, wanted)
    if folder:
        paths = {split: folder / f"{split}{end}" for split in ("train", "validation", "test")}
        texts = {split: read_texts(path) for split, path in paths.items() if path.is_file()}
        where = f"folder {folder}"
    else:
        texts = {}
        for split, rows in from_hub(name, hub, wanted).items():
            lines = list(rows["text"])
            texts[str(split)] = documents("".join(lines)) if end == ".txt" else [each for each in lines if each.strip()]
        where = f"hub {', '.join(hub)}"
    if "validation" not in texts:
        raise FfnkitError(f"data of task {name}", f"{where} has no validation{end}", "Put the official one there")
    if "train" in texts:
        named_so = {"train": texts["train"], "report": texts["validation"]}
        return source_of({**named_so, **({"test": texts["test"]} if "test" in texts else {})}, where)
    note = "there is no train split: train and dev are carved out of validation"
    if "test" in texts:
        return source_of({"train": texts["validation"], "report": texts["test"]}, where, (f"{note}, report is test",))
    return source_of({"train": texts["validation"]}, where, (f"{note}, report too",))


def _data(name: str, hub: tuple[str, ...], end: str, notes: str) -> LanguageData:
    source = f"<data folder>/{name}, else {hub[0]} on the hub"
    return LanguageData(name, source, notes, hub, load=functools.partial(_load, name, hub, end))


DATA: dict[str, LanguageData] = {
    "wikitext2": _data(
        "wikitext2",
        ("Salesforce/wikitext", "wikitext-2-v1"),
        ".txt",
        "articles of Wikipedia, in words parted by spaces with <unk>; a document is an article",
    ),
    "wikitext103": _data(
        "wikitext103",
        ("Salesforce/wikitext", "wikitext-103-v1"),
        ".txt",
        "articles of Wikipedia, in words parted by spaces with <unk>; a document is an article",
    ),
    "tinystories": _data(
        "tinystories", ("roneneldan/TinyStories",), ".jsonl", "short stories in a child's words; a document is a story"
    ),
}
