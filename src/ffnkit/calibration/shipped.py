"""The text of many kinds that comes with ffnkit (``texts/``), for calibration that carries over to other text."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

SEPARATOR = "\n%\n"


def pieces() -> dict[str, list[str]]:
    """Pieces of text by kind (code, stories, ...), kinds by name."""
    found = {each.name: each for each in files("ffnkit.calibration").joinpath("texts").iterdir()}
    return {
        name.removesuffix(".txt"): found[name].read_text(encoding="utf-8").strip("\n").split(SEPARATOR)
        for name in sorted(found)
        if name.endswith(".txt")
    }


def texts(of: Iterable[str] | None = None) -> list[str]:
    """All pieces, or those of some kinds, the kinds in turn, so that blocks cut out of a row of them mix kinds."""
    every = pieces()
    kinds = [every[name] for name in (every if of is None else of)]
    longest = max(map(len, kinds))
    # a kind of few pieces is spread over the whole row
    placed = [
        ((number + 0.5) / len(kind) * longest, order, text)
        for order, kind in enumerate(kinds)
        for number, text in enumerate(kind)
    ]
    return [text for *_, text in sorted(placed, key=lambda each: each[:2])]
