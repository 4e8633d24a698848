"""Readers of E2E, WebNLG 2017 and DART: structured data to be told in words."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.generation.sets import TextData, merged
from ffnkit.tasks.rows.files import check_columns, read
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Source, Table, size, take

Segments = list[tuple[str, str]]

BOS, SUBJECT, PROPERTY, OBJECT, TARGET, EOS = (
    "<bos_webnlg>",
    "<subject>",
    "<property>",
    "<object>",
    "<target_webnlg>",
    "<eos_webnlg>",
)
END = "||"
"""Ends the prompts of E2E and DART."""

_FILES = ("train.jsonl", "validation.jsonl")
_ATTRIBUTE = re.compile(r"\s*([^\[\],][^\[\]]*)\[([^\[\]]*)\]\s*(?:,|$)")


@dataclass(frozen=True)
class _Reader:
    """How the rows of one data set are read.

    Attributes:
        columns: (meaning, references) in the files of a data folder.
        hub_columns: the same on the hub.
        segments: the prompt of a meaning.
        extra: splits to report on beside, if there.
        join: rows of one prompt become one in the reported splits too, as the field scores them.
        category: the column that tells seen and unseen rows of the test split apart, by whether train has it; "" for
            none.
        notes: what a reader of the figures must know.
    """

    columns: tuple[str, str]
    hub_columns: tuple[str, str]
    segments: Callable[[Any, str], Segments]
    extra: tuple[str, ...]
    join: bool = False
    category: str = ""
    notes: tuple[str, ...] = ()


def e2e_segments(meaning: Any, where: str) -> Segments:
    """The attributes as "name: value | name: value ||"; ``meaning`` is "name[value], name[value]"."""
    found = _ATTRIBUTE.findall(meaning) if isinstance(meaning, str) else []
    if not found or _ATTRIBUTE.sub("", meaning).strip():
        raise FfnkitError(where, f"{meaning!r} is no meaning representation", "Write name[value], name[value]")
    return [(" | ".join(f"{name.strip()}: {value.strip()}" for name, value in found) + f" {END}", "")]


def webnlg_segments(triples: Any, where: str) -> Segments:
    """``<bos_webnlg> (<subject> s <property> p <object> o)* <target_webnlg>``, each part with its token type.

    The type of a part is its own special token. The target's type is ``<target_webnlg>``.

    Source: the paper's linearisation of WebNLG.
    Differs: underscores become spaces and quotes around a value go, as is usual in the field; the authors' released
        code leaves both.
    """
    parts: Segments = [(BOS, BOS)]
    for triple in _triples(triples, where):
        named = zip((SUBJECT, PROPERTY, OBJECT), triple, strict=True)
        parts += [(f"{token} {clean(text)}", token) for token, text in named]
    return [*parts, (TARGET, TARGET)]


def dart_segments(triples: Any, where: str) -> Segments:
    """The triples as "subject : relation : object | subject : relation : object ||"."""
    return [(" | ".join(" : ".join(map(clean, triple)) for triple in _triples(triples, where)) + f" {END}", "")]


def clean(text: str) -> str:
    """Underscores as spaces, without quotes around the whole, with single spaces."""
    text = " ".join(text.replace("_", " ").split())
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _triples(value: Any, where: str) -> list[Sequence[str]]:
    """Triples of strings from a list of triples, or of strings "subject | property | object"."""
    rows = value if isinstance(value, list | tuple) else []
    triples = [row.split(" | ") if isinstance(row, str) else row for row in rows]
    if not triples or not all(len(each) == 3 and all(isinstance(part, str) for part in each) for each in triples):
        raise FfnkitError(where, f"{str(value)[:80]!r} are no triples", "Give lists of three strings")
    return triples


def _load(name: str, data_dir: Path | None) -> Source:
    reader = _READERS[name]
    folder = data_folder(name, data_dir, _FILES)
    tables, where = _folder(folder, ("train", "validation", *reader.extra)) if folder else _hub(name)
    columns = reader.columns if folder else reader.hub_columns
    if "validation" not in tables:
        raise FfnkitError(f"data of task {name}", f"{where} has no validation split", "Put the official one there")
    notes = list(reader.notes)
    read_in = {}
    tables |= _seen_apart(tables, reader.category)
    splits = [*dict.fromkeys(("train", "validation", *reader.extra, *tables))]
    for split in splits:
        if split not in tables:
            continue
        table, dropped = _rows(tables[split], columns, reader, f"{where}, {split}")
        if dropped:
            notes.append(f"{split}: {dropped} empty references left out")
        if not size(table):
            notes.append(f"{split}: left out, it has no references")
            continue
        read_in[split] = merged(table)[0] if reader.join else table
    report: Table | None = read_in.pop("validation")
    train = read_in.pop("train", None)
    if train is None:
        notes.append("there is no train split: train, dev and report are carved out of validation")
        train, report = report, None
    assert train is not None
    return Source(train, report, where, extra=read_in, notes=tuple(notes), report_share=0.2)


def _seen_apart(tables: dict[str, Table], category: str) -> dict[str, Table]:
    """The test rows of categories that train has, and, unless they have a file of their own, those of the others."""
    known = tables.get("train") or tables["validation"]
    test = tables.get("test", {})
    if not category or category not in known or category not in test:
        return {}
    seen = set(known[category])
    rows: dict[str, list[int]] = {"test_seen": [], "test_unseen": []}
    for row, value in enumerate(test[category]):
        rows["test_seen" if value in seen else "test_unseen"].append(row)
    return {name: take(test, found) for name, found in rows.items() if found and name not in tables}


def _folder(folder: Path, splits: Sequence[str]) -> tuple[dict[str, Table], str]:
    paths = {split: folder / f"{split}.jsonl" for split in splits}
    return {split: read(path) for split, path in paths.items() if path.is_file()}, f"folder {folder}"


def _hub(name: str) -> tuple[dict[str, Table], str]:
    """From the hub's own parquet copy: the data sets there are scripts, which ``datasets`` no longer runs."""
    hub = HUB[name]
    loaded = from_hub(name, hub, _FILES, revision="refs/convert/parquet")
    tables = {str(split).replace("dev", "validation"): dict(rows.to_dict()) for split, rows in loaded.items()}
    return tables, f"hub {', '.join(hub)}"


def _rows(table: Table, columns: tuple[str, str], reader: _Reader, where: str) -> tuple[Table, int]:
    """Prompts and references, and how many references were blank; rows that have no other are left out."""
    check_columns(table, columns, where)
    out: Table = {"prompt": [], "references": [], "segments": []}
    blank = 0
    for number, (meaning, given) in enumerate(zip(*(table[column] for column in columns), strict=True), start=1):
        at = f"{where}, row {number}"
        references = _references(given, at)
        kept = [one.strip() for one in references if isinstance(one, str) and one.strip()]
        blank += len(references) - len(kept)
        if not kept:
            continue
        segments = reader.segments(_unwrapped(meaning), at)
        out["segments"].append(segments)
        out["prompt"].append(" ".join(text for text, _ in segments))
        out["references"].append(kept)
    return out, blank


def _references(given: Any, where: str) -> list[Any]:
    """A list of texts, one text, or the hub's {"text": [...]} (of WebNLG the texts that were judged good)."""
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        verdicts = given.get("comment") or ["good"] * len(given["text"])
        given = [text for text, verdict in zip(given["text"], verdicts, strict=True) if verdict == "good"]
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(one is None or isinstance(one, str) for one in given):
        raise FfnkitError(where, f"{str(given)[:80]!r} are no references", "Give a list of strings")
    return given


def _unwrapped(meaning: Any) -> Any:
    """The triples out of the hub's {"mtriple_set": [[...]]}."""
    if isinstance(meaning, dict) and "mtriple_set" in meaning:
        return next(iter(meaning["mtriple_set"]), [])
    return meaning


HUB: dict[str, tuple[str, ...]] = {
    "e2e": ("tuetschek/e2e_nlg",),
    "webnlg": ("webnlg-challenge/web_nlg", "webnlg_challenge_2017"),
    "dart": ("Yale-LILY/dart",),
}

_READERS = {
    "e2e": _Reader(
        columns=("meaning_representation", "references"),
        hub_columns=("meaning_representation", "human_reference"),
        segments=e2e_segments,
        extra=("test",),
        join=True,
    ),
    "webnlg": _Reader(
        columns=("triples", "refs"),
        hub_columns=("modified_triple_sets", "lex"),
        segments=webnlg_segments,
        extra=("test", "test_unseen"),
        category="category",
        notes=("test: all categories (A); test_seen: those that train has (S); test_unseen: the others (U)",),
    ),
    "dart": _Reader(
        columns=("tripleset", "references"),
        hub_columns=("tripleset", "annotations"),
        segments=dart_segments,
        extra=("test",),
        notes=("test holds some sets of triples in more than one row; each row counts",),
    ),
}


def _data(name: str, metrics: tuple[str, ...], notes: str, **settings: Any) -> TextData:
    source = f"<data folder>/{name}, else {HUB[name][0]} on the hub"
    load = functools.partial(_load, name)
    return TextData(name, metrics, source=source, notes=notes, hub=HUB[name], load=load, **settings)


DATA: dict[str, TextData] = {
    "e2e": _data("e2e", ("bleu", "nist", "meteor", "rougeL", "cider"), "describe a restaurant by its attributes"),
    "webnlg": _data(
        "webnlg",
        ("bleu", "meteor", "chrf", "ter"),
        "tell one to seven triples of DBpedia in words",
        special_tokens=(BOS, EOS, SUBJECT, PROPERTY, OBJECT, TARGET),
        eos=EOS,
        target_type=TARGET,
    ),
    "dart": _data("dart", ("bleu", "meteor", "ter"), "tell triples of tables and of WebNLG and E2E in words"),
}
