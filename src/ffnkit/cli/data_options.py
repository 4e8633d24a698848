"""Options on data: what ``tune`` and ``eval`` share, and what ``compress`` and ``calibrate`` do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnkit.cli import training_options
from ffnkit.errors import FfnkitError
from ffnkit.settings import settings_of
from ffnkit.settings.calibration import MIX, TEXT_COLUMN, TOKENS
from ffnkit.tasks.fields import Head, Kind, LabelKind, TaskFields

DATA = "Task and data"
TEXTS = {each.name: each.doc.text for each in settings_of(TaskFields)}
OPTIONS: dict[str, str] = {}  # what the fields of a task are called here


def of(name: str, flag: str, *short: str, **more: Any) -> Any:
    """An option that stands for a field of :class:`TaskFields`, with its text."""
    OPTIONS[name] = flag
    return typer.Option(flag, *short, help=TEXTS[name], rich_help_panel=DATA, **more)


TaskName = Annotated[str | None, of("name", "--task", "-t")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="FFNKIT_DATA", help="Folder with TASK/train.jsonl ...", rich_help_panel=DATA),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Model or folder of the tokenizer, if not MODEL.", rich_help_panel=DATA),
]

TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        help=f"Its column, where a text is a table. \\[default: {TEXT_COLUMN}]",
        rich_help_panel=DATA,
    ),
]
Mix = Annotated[
    float | None,
    typer.Option(
        "--mix",
        min=0,
        max=1,
        help=f"With --text: share of the calibration that is ffnkit's own text of many kinds. \\[default: {MIX}]",
        rich_help_panel=DATA,
    ),
]


def check_there(asked: str, file: Path, do: str) -> None:
    """Raises FfnkitError where there is no file."""
    file = file.expanduser()
    if not file.is_file():
        raise FfnkitError(asked, "it is a folder" if file.is_dir() else "there is no such file", do)


@dataclass(frozen=True)
class CalibrationData:
    """What ``compress`` and ``calibrate`` are told of calibration data; its fields are the options."""

    task: TaskName = None
    data_dir: DataDir = None
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE[=SHARE]",
            help="Calibration text: txt, jsonl, csv, parquet, rows of messages too; repeatable, with shares or equal.",
            rich_help_panel=DATA,
        ),
    ] = None
    text_column: TextColumn = None
    mix: Mix = None
    tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens",
            "--tokens",
            min=1,
            help=f"Of calibration data. \\[default: {TOKENS}]",
            rich_help_panel=DATA,
        ),
    ] = None
    tokenizer: Tokenizer = None


@dataclass(frozen=True)
class Data:
    """What the shared options say; its fields are the options, in their order."""

    name: TaskName = None
    data_dir: DataDir = None
    train: Annotated[Path | None, of("train", "--train-file")] = None
    validation: Annotated[Path | None, of("validation", "--validation-file")] = None
    text: Annotated[list[str] | None, of("text", "--text-column")] = None
    label: Annotated[str | None, of("label", "--label-column")] = None
    label_kind: Annotated[LabelKind | None, of("label_kind", "--label-kind")] = None
    inputs: Annotated[list[str] | None, of("inputs", "--input-column")] = None
    target: Annotated[str | None, of("target", "--target-column")] = None
    template: Annotated[str | None, of("template", "--template")] = None
    kind: Annotated[Kind | None, of("kind", "--kind")] = None
    head: Annotated[Head | None, of("head", "--head")] = None
    metric: Annotated[str | None, of("metric", "--metric")] = None
    stride: Annotated[int | None, of("stride", "--stride", min=1)] = None
    generation_set: Annotated[
        list[str] | None,
        typer.Option(
            "--generation-set", help="A setting of decoding; repeatable.", metavar="NAME=VALUE", rich_help_panel=DATA
        ),
    ] = None
    max_length: Annotated[int | None, training_options.of("max_length", "--max-length", DATA, min=1)] = None
    tokenizer: Tokenizer = None

    @property
    def lone(self) -> bool:
        """Whether one file is named, which is not a set of the hub with splits of its own."""
        files = [str(path) for path in (self.train, self.validation) if path is not None]
        return self.name is None and len(files) == 1 and not files[0].startswith("hub:")

    def task(self) -> Any:
        """The task that is meant, to train on it.

        Raises:
            FfnkitError: neither or both are given, a file or column is missing, no such task.
        """
        if self.name is None and self.train is None and self.validation is not None:
            do = "Add --train-file with the rows to train on"
            raise FfnkitError(f"--validation-file {self.validation}", "there is nothing to train on", do)
        return self._chosen()

    def evaluated(self, model: str, split: str) -> Any:
        """The task that is meant, to evaluate ``model``. With the split "all" every row of a lone file is reported, and
        its classes are the model's.

        Raises:
            FfnkitError: as :meth:`task`, or a split that the data do not have.
        """
        from ffnkit.io.architectures import read_config

        if split == "all" and not self.lone:
            raise FfnkitError("--split all", "it is for one file of your own", "Use report or dev, or leave it out")
        if split != "all" and self.name is None and self.train is None and self.validation is not None:
            do = "Give the training file as --train-file, or leave --split out"
            raise FfnkitError(f"--split {split}", "there is no training file that tells it", do)
        if split != "all":
            return self._chosen()
        config = read_config(model)
        numbers = self.label is not None and getattr(config, "problem_type", None) == "regression"
        names = tuple(name for _, name in sorted((getattr(config, "id2label", None) or {}).items()))
        kind = self.label_kind or ("number" if numbers else None)
        return replace(self, label_kind=kind)._chosen(whole=True, label_names=names)

    def _chosen(self, **how: Any) -> Any:
        from ffnkit import tasks

        if self.name is None and self.train is None and self.validation is None:
            do = f"Choose a --task among {', '.join(tasks.names())}, or give --train-file with its columns"
            raise FfnkitError("the data", "neither --task nor --train-file is given", do)
        given = {name: getattr(self, name) for name in OPTIONS}
        return tasks.choose(OPTIONS, **how, **given | {name: tuple(given[name] or ()) for name in ("text", "inputs")})
