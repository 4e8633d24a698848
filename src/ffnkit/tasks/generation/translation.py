"""Translation: Multi30k, from a folder of JSON-lines files or from the hub.

Source: Elliott et al., Multi30K: Multilingual English-German Image Descriptions, VL 2016.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.generation.sets import TextData
from ffnkit.tasks.rows.files import check_columns, read
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Source, Table, size

LANGUAGES = {"en": "English", "de": "German"}
HUB = ("bentrevett/multi30k",)
_FILES = ("train.jsonl", "validation.jsonl")
_SPLITS = ("train", "validation", "test")


def frames(source: str, target: str) -> dict[str, str]:
    """How a sentence is put to each kind of model: with T5's prefix, as it is, or with a cue to go on.

    Source: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, JMLR
        2020, appendix D, for the prefix.
    """
    first, second = LANGUAGES[source], LANGUAGES[target]
    return {
        "t5": f"translate {first} to {second}: {{}}",
        "seq2seq": "{}",
        "decoder": f"{first}: {{}} {second}:",
    }


def multi30k(source: str, target: str, name: str) -> TextData:
    """Descriptions of pictures from one language into the other ("en", "de")."""
    return TextData(
        name,
        ("bleu", "chrf"),
        source=f"<data folder>/multi30k, else {HUB[0]} on the hub",
        notes=f"descriptions of pictures from {LANGUAGES[source]} into {LANGUAGES[target]}",
        hub=HUB,
        max_new_tokens=64,
        frames=frames(source, target),
        load=functools.partial(_load, source, target),
    )


def _load(source: str, target: str, data_dir: Path | None) -> Source:
    folder = data_folder("multi30k", data_dir, _FILES)
    if folder:
        paths = {split: folder / f"{split}.jsonl" for split in _SPLITS}
        tables, where = {split: read(path) for split, path in paths.items() if path.is_file()}, f"folder {folder}"
    else:
        loaded = from_hub("multi30k", HUB, _FILES)
        tables, where = {split: dict(loaded[split].to_dict()) for split in _SPLITS if split in loaded}, f"hub {HUB[0]}"
    absent = next((split for split in ("train", "validation") if split not in tables), None)
    if absent is not None:
        raise FfnkitError("data of task multi30k", f"{where} has no {absent}.jsonl", "Put the official one there")
    found = {split: sentences(table, source, target, f"{where}, {split}") for split, table in tables.items()}
    extra = {"test": found["test"]} if "test" in found else {}
    return Source(found["train"], found["validation"], where, extra)


def sentences(table: Table, source: str, target: str, where: str) -> Table:
    """Prompts and references from rows {"translation": {"en": ..., "de": ...}}, or with a column for each language.

    Raises:
        FfnkitError: no such columns, or rows without a text in one of the languages.
    """
    if "translation" in table:
        pairs = [row if isinstance(row, dict) else {} for row in table["translation"]]
        columns: dict[str, list[Any]] = {each: [row.get(each) for row in pairs] for each in (source, target)}
    else:
        check_columns(table, (source, target), where)
        columns = {each: table[each] for each in (source, target)}
    for language, values in columns.items():
        bad = [row for row, text in enumerate(values) if not isinstance(text, str) or not text.strip()]
        if bad:
            found = f"{len(bad)} of {size(table)} rows have no text in {language!r}, row {bad[0] + 1} first"
            raise FfnkitError(where, found, "Give every row a string there")
    prompts = [text.strip() for text in columns[source]]
    return {
        "prompt": prompts,
        "references": [[text.strip()] for text in columns[target]],
        "segments": [[(prompt, "")] for prompt in prompts],
    }


DATA: dict[str, TextData] = {
    "multi30k": multi30k("en", "de", "multi30k"),
    "multi30k-de-en": multi30k("de", "en", "multi30k-de-en"),
}
