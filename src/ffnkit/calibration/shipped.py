"""The text of many kinds that comes with ffnkit (``texts/``), for calibration that carries over to other text."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

SEPARATOR = "\n%\n"
APART = {"decide": ("essays", "reviews"), "report": ("letters", "news")}  # kinds that nothing is fitted to


def pieces() -> dict[str, list[str]]:
    """Pieces of text by kind (code, stories, ...), kinds by name."""
    found = {each.name: each for each in files("ffnkit.calibration").joinpath("texts").iterdir()}
    return {
        name.removesuffix(".txt"): found[name].read_text(encoding="utf-8").strip("\n").split(SEPARATOR)
        for name in sorted(found)
        if name.endswith(".txt")
    }


def kinds(part: str = "fit") -> list[str]:
    """The kinds of a part: "fit", or what is kept apart from it: "decide" is for choices, "report" for what is told."""
    apart = {name for names in APART.values() for name in names}
    return [name for name in pieces() if (name in APART[part] if part in APART else name not in apart)]


def texts(of: Iterable[str] | None = None) -> list[str]:
    """All pieces of some kinds (None: that may be fitted), in turn, so that blocks of a row of them mix kinds."""
    every = pieces()
    chosen = [every[name] for name in (kinds() if of is None else of)]
    longest = max(map(len, chosen))
    # a kind of few pieces is spread over the whole row
    placed = [
        ((number + 0.5) / len(kind) * longest, order, text)
        for order, kind in enumerate(chosen)
        for number, text in enumerate(kind)
    ]
    return [text for *_, text in sorted(placed, key=lambda each: each[:2])]
