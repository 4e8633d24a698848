"""Options that ``ffnkit tune`` and ``eval`` share: the task, the data, and how text is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DATA = "Task and data"

TaskName = Annotated[str | None, typer.Option("--task", "-t", help="One of 'ffnkit tasks'.", rich_help_panel=DATA)]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="FFNKIT_DATA", help="Folder with TASK/train.jsonl ...", rich_help_panel=DATA),
]
TrainFile = Annotated[
    Path | None,
    typer.Option(
        "--train-file",
        help="Your own csv, jsonl, json, parquet, txt; a folder, tar, zip of images.",
        rich_help_panel=DATA,
    ),
]
ValidationFile = Annotated[
    Path | None, typer.Option("--validation-file", help="Your own file for the reported figure.", rich_help_panel=DATA)
]
InputColumn = Annotated[
    list[str] | None,
    typer.Option("--input-column", help="A column that the prompt is made of; repeatable.", rich_help_panel=DATA),
]
TargetColumn = Annotated[
    str | None, typer.Option("--target-column", help="The column of texts to generate.", rich_help_panel=DATA)
]
Template = Annotated[
    str | None,
    typer.Option("--template", help="The prompt, with input columns in braces; a chat template.", rich_help_panel=DATA),
]
Kind = Annotated[
    Literal["language-modelling", "image-classification", "instruction"] | None,
    typer.Option("--kind", help="For a column of plain text; images; dialogues.", rich_help_panel=DATA),
]
Head = Annotated[
    Literal["class", "words"] | None,
    typer.Option("--head", help="words: classify by label words, with a model that writes.", rich_help_panel=DATA),
]
Stride = Annotated[
    int | None, typer.Option("--stride", min=1, help="Of the perplexity; half of --max-length.", rich_help_panel=DATA)
]
Generation = Annotated[
    list[str] | None,
    typer.Option(
        "--generation-set", help="A setting of decoding; repeatable.", metavar="NAME=VALUE", rich_help_panel=DATA
    ),
]
TextColumn = Annotated[
    list[str] | None, typer.Option("--text-column", help="A column of text; give two for pairs.", rich_help_panel=DATA)
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="The column of labels.", rich_help_panel=DATA)]
Metric = Annotated[
    str | None,
    typer.Option("--metric", help="The main metric; several of text parted by commas.", rich_help_panel=DATA),
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Tokens a text.", rich_help_panel=DATA)]

Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Model or folder of the tokenizer, if not MODEL.", rich_help_panel=DATA),
]
