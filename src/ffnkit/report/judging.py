"""Free answers compared pair by pair: both orders are asked, and a win is what both orders say.

Source: Zheng et al., Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, NeurIPS 2023, section 3.4 (positions
swapped; what the orders do not agree on is a tie).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted

Verdict = Literal["A", "B", "C", ""]
"""The first answer, the second, neither; "" where the judge said none of these."""


class Judge(Protocol):
    """Who is asked. ``facts`` are what its verdicts depend on, as plain data."""

    @property
    def facts(self) -> dict[str, Any]: ...

    def ask(self, prompt: str, first: str, second: str) -> tuple[Verdict, str]:
        """The verdict, and what it said."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt: an arm's, and that of the arm that it is compared with."""

    arm: str
    seed: int
    row: int
    prompt: str
    answer: str
    other: str


@dataclass(frozen=True)
class Outcome:
    """What came of a pair: 1 the arm's answer is better, -1 the other one, 0 neither; the orders may have differed."""

    value: int
    disagree: bool = False
    unclear: bool = False


@dataclass(frozen=True)
class Tally:
    """The outcomes of an arm: numbers of pairs. ``disagree``: the two orders gave different verdicts, which is a tie;
    ``unclear``: a verdict was none of the three, which counts as a tie in that order."""

    wins: int
    ties: int
    losses: int
    disagree: int
    unclear: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Tally:
        """Counted."""
        values = [each.value for each in outcomes]
        odd = (sum(each.disagree for each in outcomes), sum(each.unclear for each in outcomes))
        return cls(values.count(1), values.count(0), values.count(-1), *odd)

    @property
    def pairs(self) -> int:
        """How many pairs."""
        return self.wins + self.ties + self.losses

    def to_dict(self) -> dict[str, Any]:
        """The counts, their sum, and the share won, a tie counting half."""
        share = (self.wins + self.ties / 2) / self.pairs if self.pairs else None
        return {"pairs": self.pairs, **asdict(self), "won": share}


class Kept:
    """Verdicts in a file, a line each, so that none is asked for twice; a line that was cut off is asked anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        whole = 0
        content = path.read_bytes() if path.is_file() else b""
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict) or not {"key", "verdict"} <= row.keys():
                break
            self.rows[row["key"]] = row
            whole += len(line)
        if whole < len(content):
            os.truncate(path, whole)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a verdict, on disk at once."""
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a pair of surrogates
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[row["key"]] = row


def judged(
    pairs: Sequence[Pair], judge: Judge, kept: Kept, told: Callable[[int, int], None] = lambda done, all: None
) -> list[Outcome]:
    """The outcome of each pair, in their order; what is kept is not asked again.

    Answers that are equal, white space aside, are a tie that nobody is asked about.

    Args:
        told: is told how many pairs are done.

    Raises:
        FfnkitError: the judge cannot be asked; the verdicts until then are kept.
    """
    found = []
    for number, pair in enumerate(counted(pairs, "judging")):
        told(number, len(pairs))
        if pair.answer.split() == pair.other.split():
            found.append(Outcome(0))
            continue
        verdicts = [_verdict(pair, turned, judge, kept) for turned in (False, True)]
        for_arm = {"A": 1, "B": -1, "C": 0, "": 0}
        first, second = for_arm[verdicts[0]], -for_arm[verdicts[1]]
        found.append(Outcome(first if first == second else 0, first != second, "" in verdicts))
    told(len(pairs), len(pairs))
    return found


def _verdict(pair: Pair, turned: bool, judge: Judge, kept: Kept) -> Verdict:
    answers = (pair.other, pair.answer) if turned else (pair.answer, pair.other)
    text = json.dumps([judge.facts, pair.prompt, *answers], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    if key not in kept.rows:
        verdict, said = judge.ask(pair.prompt, *answers)
        where = {"arm": pair.arm, "seed": pair.seed, "row": pair.row, "order": "other first" if turned else "arm first"}
        kept.add({"key": key, **where, "verdict": verdict, "said": said[:2000]})
    found: Verdict = kept.rows[key]["verdict"]
    return found


def pairs_of(
    answers: Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]], first: str, most: int | None
) -> list[Pair]:
    """Each arm's answers beside those of the first arm: seed by seed, arm by arm, row by row.

    Args:
        answers: by seed and arm the rows of predictions ("prompt", "prediction").
        most: prompts of a split at most; None: all.

    Raises:
        FfnkitError: two arms answered other prompts.
    """
    found = []
    for seed, arms in answers.items():
        base = arms.get(first, ())
        for arm, rows in arms.items():
            if arm == first or not base:
                continue
            if [row["prompt"] for row in rows] != [row["prompt"] for row in base]:
                asked = f"judging {arm} against {first}"
                raise FfnkitError(asked, f"with seed {seed} they answered other prompts", "Run both in one recipe")
            both = enumerate(zip(rows[:most], base[:most], strict=True))
            found += [Pair(arm, seed, i, a["prompt"], a["prediction"], b["prediction"]) for i, (a, b) in both]
    return found


HEADER = ("arm", "pairs", "wins", "ties", "losses", "won", "orders disagree", "unclear")


def lines(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The verdict table, a line an arm, from :meth:`Tally.to_dict`."""

    def share(part: Any, whole: int) -> str:
        return f"{part / whole:.1%}" if whole and part is not None else "–"

    return [
        [arm, *(str(row[name]) for name in ("pairs", "wins", "ties", "losses")), share(row["won"], 1)]
        + [share(row["disagree"], row["pairs"]), str(row["unclear"])]
        for arm, row in found.items()
    ]


def notes(judging: Mapping[str, Any]) -> list[str]:
    """What the table needs to be read with."""
    if judging.get("error"):
        return [f"The answers were not judged to the end: {judging['error']}"]
    if not judging.get("arms"):
        return ["No answers could be compared: two arms have to be finished with one seed."]
    where = f" at {judging['url']}" if judging.get("url") else ""
    return [
        f"Judged by {judging['model']}{where}, against {judging['against']}; each pair in both orders.",
        "A win is what both orders say; where they disagree it is a tie. Won: a tie counts half.",
    ]
