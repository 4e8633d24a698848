"""Instructions and dialogues by name, and in files of the user's own; tables are those of :mod:`.forms`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.instructions import trees
from ffnkit.tasks.instructions.forms import dialogues, form_of, table_of
from ffnkit.tasks.rows.files import in_words, named, read
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Source, Splits, Table, divide, once, size

PROMPT = ("prompt",)
_DEMO = "alpaca_en_demo.json"
_DEMO_HUB = ("llamafactory/demo_data",)


@dataclass(frozen=True)
class InstructionData:
    """Dialogues, and what a task needs to know of them.

    Attributes:
        name: "alpaca_demo", "oasst1", or the user's.
        source: where the rows come from, in words.
        notes: a line on what the task asks.
        hub: name on the hub; () for other data.
        max_new_tokens: how many tokens to generate at most.
        load: reads the rows; takes the data folder or None.
    """

    name: str
    source: str = ""
    notes: str = ""
    hub: tuple[str, ...] = ()
    max_new_tokens: int = 128
    load: Callable[[Path | None], Source] = field(repr=False, compare=False, kw_only=True)

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits[Table]:
        """Reads the dialogues and splits them; arguments and errors as of :meth:`ffnkit.tasks.Task.splits`.

        Dialogues with one prompt count as repeated, whatever their answers.
        """
        asked = f"data of task {self.name}"
        source = self.load(Path(data_dir) if data_dir is not None else None)
        source = once(source, PROMPT, "", "prompts")
        return divide(source, same=PROMPT, asked=asked, what="dialogues", label="prompt", stratify=False, **limits)


def names() -> list[str]:
    """The data that :func:`get` knows, in the order of the documentation."""
    return ["alpaca_demo", trees.NAME]


def known(name: str) -> bool:
    """Whether :func:`get` knows the name; "oasst1:de,es" are dialogues in these languages."""
    return name in names() or name.startswith(f"{trees.NAME}:")


def get(name: str) -> InstructionData:
    """The data called ``name``; nothing is read before :meth:`InstructionData.splits`.

    Raises:
        FfnkitError: there is no such data.
    """
    if name == "alpaca_demo":
        notes = "instructions of many kinds, answered by a model"
        source = f"<data folder>/alpaca_demo, else {_DEMO_HUB[0]} on the hub"
        return InstructionData(name, source, notes, _DEMO_HUB, load=_demo)
    if known(name):
        languages = trees.languages(name)

        def load(data_dir: Path | None) -> Source:
            return _oasst(name, languages, data_dir)

        notes = f"dialogues written by people, the best-ranked of each tree ({', '.join(languages) or 'all languages'})"
        source = f"<data folder>/{trees.NAME}, else {trees.HUB[0]} on the hub"
        return InstructionData(name, source, notes, trees.HUB, load=load)
    do = f"Choose one of {', '.join(names())}, or use instruction_task for files of your own"
    raise FfnkitError(f"instruction task {name!r}", "there is no such task", do)


def file_data(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    name: str = "files",
    test: str | Path | None = None,
    max_new_tokens: int = 128,
) -> InstructionData:
    """Dialogues from JSON-lines, JSON, CSV or parquet files, which are read and checked at once.

    Args:
        train: rows to train on; ``dev`` is carved out of them. None: ``validation`` is reported whole. The columns
            tell the form.
        validation: rows for the reported figure; by default a tenth of train is carved out, the same for every seed.
        name: the task's name.
        test: further rows to report on.
        max_new_tokens: how many tokens to generate at most.

    Raises:
        FfnkitError: files that cannot be read, other columns, rows that are no dialogues.
    """
    files = named(train, validation, test, name)
    tables = {split: read(path) for split, path in files.items()}
    source = _source(tables, in_words(files))
    forms = form_of(list(next(iter(tables.values()))))
    return InstructionData(name, source.where, f"{forms} rows", max_new_tokens=max_new_tokens, load=lambda _: source)


def _source(tables: dict[str, Table], where: str, notes: tuple[str, ...] = ()) -> Source:
    """Train, report and what else there is, in the form of :func:`dialogues`."""
    said, found = list(notes), {}
    for name, table in tables.items():
        found[name], dropped = dialogues(table, f"{where}, {name}" if len(tables) > 1 else where)
        said += [f"{name}: {dropped} rows without an answer left out"] if dropped else []
    train, report = found.pop("train", None), found.pop("report", None)
    return Source(train, report, where, found, tuple(said))


def _demo(data_dir: Path | None) -> Source:
    folder = data_folder("alpaca_demo", data_dir, (_DEMO,))
    if folder is None:
        loaded = from_hub("alpaca_demo", _DEMO_HUB, (_DEMO,), data_files=_DEMO)
        return _source({"train": dict(loaded["train"].to_dict())}, f"hub {_DEMO_HUB[0]}")
    tables = {"train": read(folder / _DEMO)}
    seeds = folder / "seed_tasks.jsonl"
    return _source({**tables, **({"seed_tasks": read(seeds)} if seeds.is_file() else {})}, f"folder {folder}")


def _oasst(name: str, languages: tuple[str, ...], data_dir: Path | None) -> Source:
    files = ("train.jsonl", "validation.jsonl")
    folder = data_folder(trees.NAME, data_dir, files)
    if folder:
        tables = {file.removesuffix(".jsonl"): read(folder / file) for file in files if (folder / file).is_file()}
        where = f"folder {folder}"
    else:
        loaded = from_hub(trees.NAME, trees.HUB, files)
        tables, where = {str(split): dict(rows.to_dict()) for split, rows in loaded.items()}, f"hub {trees.HUB[0]}"
    if "train" not in tables:
        raise FfnkitError(f"data of task {name}", f"{where} has no train.jsonl", "Put the official one there")
    found, notes = {}, []
    for split, table in tables.items():
        found[split], dropped = table_of(trees.best_paths(table, languages))
        notes += [f"{split}: {dropped} trees without an answer left out"] if dropped else []
        if not size(found[split]):
            at = f"{where}, {split}: languages {', '.join(languages) or 'all'}"
            raise FfnkitError(f"data of task {name}", f"no dialogue ({at})", "Name other languages")
    return Source(found["train"], found.get("validation"), where, notes=tuple(notes))
