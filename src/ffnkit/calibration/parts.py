"""Which part of a text is fitted, which decides between fits, and which is only reported on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Part = Literal["fit", "decide", "report"]

PIECE = 2000  # characters; so much of a file goes to one part at a time
FEWEST = 100  # of a piece; a file of fewer than ten such pieces is fitted whole
RUN, MOST = 64, 500_000  # characters that are compared at a time, and of how many places of what is fitted
SHARED = 0.1  # of a piece: phrases that come again are no repetition


def texts_of(texts: Sequence[str], part: Part) -> list[str]:
    """What belongs to a part of the texts of one file (:func:`parts_of`)."""
    return parts_of([texts], part)[0]


def parts_of(files: Sequence[Sequence[str]], part: Part) -> list[list[str]]:
    """What belongs to a part of the texts of each file: of ten pieces in a row eight are fitted, one decides, one is
    reported.

    Pieces count characters over all texts of a file, so that parts are alike however long a text is; a text is cut
    where it reaches into another part, between words where there are some. Texts of a few lines are fitted whole. A
    text that comes again, in whatever file and however its lines are broken, counts once, and what stands in the fit
    word for word is in no other part (:func:`apart_from`).
    """
    seen: set[str] = set()
    cuts = [_cut([text for text in texts if _is_new(text, seen)]) for texts in files]
    if part == "fit":
        return [cut["fit"] for cut in cuts]
    fitted = [text for cut in cuts for text in cut["fit"]]
    return [apart_from(cut[part], fitted) for cut in cuts]


def apart_from(texts: Sequence[str], fitted: Sequence[str]) -> list[str]:
    """The texts of which less than ``SHARED`` stands in the fitted ones word for word, in runs of two ``RUN``; where
    lines are broken does not count."""
    if not texts:
        return []
    whole = set(map(_words, fitted))
    step = max(RUN, sum(map(len, whole)) // MOST)
    runs = {hash(text[at : at + RUN]) for text in whole for at in range(0, len(text) - RUN + 1, step)}

    def shared(text: str) -> float:
        at = found = 0
        while at + RUN <= len(text):
            known = hash(text[at : at + RUN]) in runs
            found += known * step
            at += RUN if known else 1
        return found / max(len(text), 1)

    words = [(text, _words(text)) for text in texts]
    return [text for text, plain in words if plain not in whole and shared(plain) < SHARED]


def _words(text: str) -> str:
    return " ".join(text.split())


def _is_new(text: str, seen: set[str]) -> bool:
    """Whether a text has not come before; short ones, such as answers, may come again."""
    new = len(text) < FEWEST or _words(text) not in seen
    seen.add(_words(text))
    return new


def _cut(texts: Sequence[str]) -> dict[Part, list[str]]:
    found: dict[Part, list[str]] = {"fit": [], "decide": [], "report": []}
    piece = min(PIECE, sum(map(len, texts)) // 10)
    if piece < FEWEST:
        return found | {"fit": list(texts)}
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
    return found


def _part_at(place: int, piece: int) -> Part:
    return {4: "decide", 9: "report"}.get(place // piece % 10, "fit")  # type: ignore[return-value]


def _between_words(text: str, end: int) -> int:
    """The end moved on to behind the next space, or to the end of the text, where one is near."""
    near = range(end, min(end + FEWEST, len(text)))
    space = next((place + 1 for place in near if text[place].isspace()), None)
    return space or (len(text) if len(near) < FEWEST else end)
