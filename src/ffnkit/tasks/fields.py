"""What can be said of a task, declared once for Python, the command line and recipes; light to import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ffnkit.settings import Doc

Kind = Literal["language-modelling", "image-classification", "instruction"]
Head = Literal["class", "words", "cosine"]
LabelKind = Literal["class", "number"]


@dataclass(frozen=True)
class TaskFields:
    """A task by name, or files with the names of their columns; most is left out."""

    name: Annotated[str | None, Doc("One of 'ffnkit tasks'.")] = None
    train: Annotated[
        str | Path | None, Doc("Your own csv, jsonl, json, parquet, txt; a folder, tar, zip of images.")
    ] = None
    validation: Annotated[str | Path | None, Doc("Your own file for the reported figure.")] = None
    test: Annotated[str | Path | None, Doc("Your own file of further rows to report on.")] = None
    text: Annotated[Sequence[str], Doc("A column of text; 2 for pairs, 3 for triplets. Of images the image's.")] = ()
    label: Annotated[str | None, Doc("The column of labels.")] = None
    inputs: Annotated[Sequence[str], Doc("A column that the prompt is made of; repeatable.")] = ()
    target: Annotated[str | None, Doc("The column of texts to generate.")] = None
    template: Annotated[str | None, Doc("The prompt, with columns of text in braces; a chat template.")] = None
    metric: Annotated[str | None, Doc("The main metric; several of text parted by commas.")] = None
    label_kind: Annotated[LabelKind | None, Doc("What labels are, where they do not say so: class, number.")] = None
    kind: Annotated[Kind | None, Doc("For a column of plain text; images; dialogues.")] = None
    stride: Annotated[int | None, Doc("Of the perplexity; half of max_length by default.", at_least=1)] = None
    head: Annotated[Head | None, Doc("words: by label words, with a model that writes; cosine: of embeddings.")] = None
