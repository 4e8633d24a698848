"""Options that ``ffnkit tune`` and ``eval`` share: the task, the data, and how text is decoded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ffnkit.errors import FfnkitError
from ffnkit.settings import settings_of
from ffnkit.tasks.fields import Head, Kind, TaskFields

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


@dataclass(frozen=True)
class Data:
    """What the shared options say; its fields are the options, in their order."""

    name: TaskName = None
    data_dir: DataDir = None
    train: Annotated[Path | None, of("train", "--train-file")] = None
    validation: Annotated[Path | None, of("validation", "--validation-file")] = None
    text: Annotated[list[str] | None, of("text", "--text-column")] = None
    label: Annotated[str | None, of("label", "--label-column")] = None
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
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Tokens a text.", rich_help_panel=DATA)
    ] = None
    tokenizer: Tokenizer = None

    def task(self) -> Any:
        """The task that is meant.

        Raises:
            FfnkitError: neither or both are given, a file or column is missing, no such task.
        """
        from ffnkit import tasks

        if self.name is None and self.train is None:
            do = f"Choose a --task among {', '.join(tasks.names())}, or give --train-file with its columns"
            raise FfnkitError("the data", "neither --task nor --train-file is given", do)
        given = {name: getattr(self, name) for name in OPTIONS}
        return tasks.choose(OPTIONS, **given | {name: tuple(given[name] or ()) for name in ("text", "inputs")})


def with_data(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter ``data`` is made of the shared options, which stand in its place."""
    own, hints = inspect.signature(command).parameters, get_type_hints(command, include_extras=True)
    shared, kind = get_type_hints(Data, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    made: list[inspect.Parameter] = []
    for name, parameter in own.items():
        if name != "data":
            made.append(parameter.replace(annotation=hints[name], kind=kind))
            continue
        options = [(each.name, each.default) for each in fields(Data)]
        made += [inspect.Parameter(name, kind, default=d, annotation=shared[name]) for name, d in options]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(data=Data(**{name: given.pop(name) for name in shared}), **given)

    run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
    del run.__wrapped__
    return run
