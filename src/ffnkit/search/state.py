"""What a search leaves on disk: candidates, their tuning rung by rung, and claims by which processes share it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json, replacing
from ffnkit.io.folders import check_target
from ffnkit.io.workspace import held
from ffnkit.recipe.state import write_json
from ffnkit.search.candidates import Candidate
from ffnkit.search.chances import Rows

FACTS, POLL = "search.json", 0.5
OURS = ("candidates", "original", "model", "claims", "front.md", "front.svg", "report.html", "results.json", FACTS)


@dataclass(frozen=True)
class Task:
    """A candidate to be measured before tuning (``rung`` None), or to be tuned in a rung."""

    number: int
    rung: int | None = None


@dataclass(frozen=True)
class Folder:
    """The folder of a search."""

    out: Path

    def begin(self, facts: dict[str, Any]) -> None:
        """Make it, or see that it holds this search. Raises FfnkitError where it holds something else."""
        found = read_json(self.out / FACTS)
        if found is None:
            check_target(self.out, "run")
            if taken := [name for name in OURS if (self.out / name).exists()]:
                what = f"it holds {', '.join(taken)}, which no search wrote"
                raise FfnkitError(f"output folder '{self.out}'", what, "Give another folder")
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / FACTS, facts)
        elif differ := [name for name in facts if found.get(name) != facts[name]]:
            asked = f"searching into {self.out}"
            raise FfnkitError(asked, f"it holds a search with another {differ[0]}", "Give another --out")

    @contextmanager
    def claimed(self, task: str) -> Iterator[bool]:
        """Whether a task is ours alone inside the block; the system lets go of it however we end."""
        place = self.out / "claims" / task
        place.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(held(place, task))
                ours = True
            except FfnkitError:
                ours = False
            yield ours

    @contextmanager
    def turn(self, task: str) -> Iterator[None]:
        """Wait until a task is nobody else's, and hold it."""
        while True:
            with self.claimed(task) as ours:
                if ours:
                    yield
                    return
            time.sleep(POLL)

    @property
    def original(self) -> Path:
        """The checkpoint of the original, where it was tuned here."""
        return self.out / "original"

    def place(self, number: int) -> Path:
        """Of a candidate."""
        return self.out / "candidates" / f"{number:03}"

    def candidate(self, number: int) -> dict[str, Any] | None:
        """What was measured of a candidate before tuning; None where that is not done."""
        return read_json(self.place(number) / "candidate.json")

    def tried(self, number: int) -> bool:
        """Whether a candidate was measured, or could not be."""
        return self.candidate(number) is not None or (self.place(number) / "failed.json").exists()

    def over(self, task: Task) -> bool:
        """Whether somebody did it."""
        return self.tried(task.number) if task.rung is None else self.rung(task.number, task.rung) is not None

    def candidates(self) -> dict[int, dict[str, Any]]:
        """All that were measured, by number."""
        places = sorted((self.out / "candidates").glob("[0-9]*")) if (self.out / "candidates").is_dir() else []
        found = {int(place.name): read_json(place / "candidate.json") for place in places}
        return {number: each for number, each in found.items() if each is not None}

    def rung(self, number: int, rung: int) -> dict[str, Any] | None:
        """What a candidate came to in a rung; None where that is not done."""
        return read_json(self.place(number) / f"rung-{rung}.json")

    def newest(self, number: int, rungs: int) -> dict[str, Any] | None:
        """What it came to in the last rung that it reached."""
        found = (self.rung(number, rung) for rung in range(rungs - 1, -1, -1))
        return next((each for each in found if each is not None), None)

    def model(self, number: int, rung: int) -> Path:
        """The checkpoint of a candidate after a rung."""
        return self.place(number) / f"rung-{rung}"


def spec_of(found: dict[str, Any]) -> Candidate:
    """The candidate of a file."""
    return Candidate(**found["candidate"])


def write_rows(path: Path, rows: Rows) -> None:
    """What a model gave for each row, in one piece."""
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, **cast(Any, {name: np.asarray(value) for name, value in rows.items()}))


def read_rows(path: Path) -> Rows:
    """The same read."""
    if not path.is_file():
        return {}
    with np.load(path) as found:
        return {name: found[name] for name in found.files}
