"""Which part of a text is fitted, which decides between fits, and which is only reported on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Part = Literal["fit", "decide", "report"]

PIECE = 2000  # characters; so much of a file goes to one part at a time
FEWEST = 100  # of a piece; a file of fewer than ten such pieces is fitted whole


def texts_of(texts: Sequence[str], part: Part) -> list[str]:
    """What belongs to a part of these texts: of ten pieces in a row eight are fitted, one decides, one is reported.

    Pieces count characters over all texts, so that parts are alike however long a text is; a text is cut where it
    reaches into another part, between words where there are some. What is in the fit word for word is in no other part.
    Texts of a few lines are fitted whole.
    """
    total = sum(map(len, texts))
    piece = min(PIECE, total // 10)
    if piece < FEWEST:
        return list(texts) if part == "fit" else []
    found: dict[Part, list[str]] = {"fit": [], "decide": [], "report": []}
    place = 0
    for text in texts:
        start = 0
        while start < len(text):
            own = _part_at(place + start, piece)
            end = start
            while end < len(text) and _part_at(place + end, piece) == own:
                end += piece - (place + end) % piece
            end = _between_words(text, min(end, len(text)))
            if (cut := text[start:end]).strip():
                found[own].append(cut)
            start = end
        place += len(text)
    fitted = set(found["fit"])
    return found["fit"] if part == "fit" else [text for text in found[part] if text not in fitted]


def _part_at(place: int, piece: int) -> Part:
    return {4: "decide", 9: "report"}.get(place // piece % 10, "fit")  # type: ignore[return-value]


def _between_words(text: str, end: int) -> int:
    """The end moved on to behind the next space, or to the end of the text, where one is near."""
    near = range(end, min(end + FEWEST, len(text)))
    space = next((place + 1 for place in near if text[place].isspace()), None)
    return space or (len(text) if len(near) < FEWEST else end)
