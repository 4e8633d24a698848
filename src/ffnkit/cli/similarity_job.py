"""The work behind ``ffnkit analyze --similarity``: which layers of a model do alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffnkit.analysis.similarity import similarity
from ffnkit.cli import console
from ffnkit.cli.analyze_job import Texts, hand_over


def compare(
    name: str, texts: tuple[Any, ...], layers: str, rbf: bool, device: Any, out: Path | None, as_json: bool
) -> None:
    """Compare the layers of one model, print the matrices, write similarity.json and similarity.png."""
    source = Texts(*texts)
    console.quieten()
    models, tokenizer = source.open([name])
    first, second = source.batches(models[0].to(device), tokenizer)
    found = similarity(models[0], [*first, *second], layers=layers, tokens=source.tokens, rbf=rbf)
    report = {"name": name, **console.plain(found.to_dict())}
    hand_over("similarity", found, report, out, as_json)
