"""What a search leaves on disk: candidates, their tuning rung by rung, and claims by which processes share it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json, replacing
from ffnkit.io.folders import check_target
from ffnkit.io.workspace import claimed
from ffnkit.recipe.state import SEARCH, check_there, difference, write_json
from ffnkit.search.candidates import Candidate
from ffnkit.search.chances import Rows
from ffnkit.search.settings import SearchRecipe, search_from

FACTS, FIRST, POLL = SEARCH, "original.json", 0.5
FORMAT = 1  # of the folder; raised when an older one can no longer be continued
BESIDE = ("weights", "data", "format")  # of the facts, what is no field of the recipe
OURS = (
    *("candidates", "original", "model", "claims", "front.md", "front.svg", "report.html", "results.json"),
    *("proposed.json", FIRST, "original-dev.npz", "original-report.npz", "statistics.safetensors"),
    *("costs.safetensors", ".original.tuning", FACTS),
)


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
        check_target(self.out, "run")
        self.out.mkdir(parents=True, exist_ok=True)
        with self.turn():  # of two that begin at once the second sees the first
            found = read_json(self.out / FACTS)
            if found is None:
                if taken := [name for name in OURS if (self.out / name).exists()]:
                    (self.out / ".lock").unlink(missing_ok=True)
                    what = f"it holds {', '.join(taken)}, which no search wrote"
                    raise FfnkitError(f"output folder '{self.out}'", what, "Give another folder")
                write_json(self.out / FACTS, facts)
            elif (then := _today(found)) != (now := _today(facts)):
                field, old, new = difference(then, now)
                what = f"it holds another search ({field} was {old}, is {new})"
                raise FfnkitError(f"searching into {self.out}", what, "Give another --out")

    @contextmanager
    def begun(self, facts: dict[str, Any]) -> Iterator[None]:
        """The folder with this search in the block; where the block fails before anything is found, nothing is left."""
        made = [each for each in (self.out, *self.out.parents) if not each.exists()]
        try:
            self.begin(facts)
            yield
        except BaseException:
            if (self.out / FACTS).is_file() and not self.found:
                with self.claimed("original") as ours:
                    if ours:  # else another process is at it
                        self.clear()
            for each in made:
                with suppress(OSError):  # it holds something
                    each.rmdir()
            raise

    @property
    def found(self) -> bool:
        """Whether it holds something that takes time to find again."""
        return (self.out / FIRST).exists() or any((self.out / ".original.tuning").glob("checkpoint-*"))

    def clear(self) -> None:
        """Take away what a search wrote that has found nothing."""
        for name in reversed((*OURS, ".lock")):
            path = self.out / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def check_there(self) -> None:
        """Raises FfnkitError where it was removed while a search is at work; what was written since goes as well."""
        check_there(self.out, FACTS, ("candidates", "claims"), "search")

    @contextmanager
    def claimed(self, task: str) -> Iterator[bool]:
        """Whether a task is ours alone inside the block; the system lets go of it however we end."""
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(self.out / "claims" / task, task, "another process does it"))
                ours = True
            except FfnkitError:
                ours = False
            yield ours

    def turn(self, task: str = "") -> AbstractContextManager[None]:
        """Wait until a task, or the folder, is nobody else's, and hold it."""
        place = self.out / "claims" / task if task else self.out
        return claimed(place, task, "another process does it", wait=math.inf)

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


def _today(facts: dict[str, Any]) -> dict[str, Any]:
    """What a search depends on, in the fields of today: one that an earlier version did not know has its default."""
    beside = {name: facts[name] for name in BESIDE if name in facts}
    return recipe_in(facts).model_dump(mode="json", exclude={"name", "notes"}) | {"format": FORMAT} | beside


def recipe_in(facts: dict[str, Any]) -> SearchRecipe:
    """The search of a file. Raises FfnkitError where this version does not know its fields."""
    return search_from({name: value for name, value in facts.items() if name not in BESIDE}, FACTS)


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
