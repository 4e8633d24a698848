"""What is tried: Optuna's TPE, some candidates at a time, of what the folder holds alone.

A generation is asked for when all before it are measured, whoever measured them. So the candidates are the same with
one process, with several, on a cluster and after a kill.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json
from ffnkit.recipe.state import write_json
from ffnkit.search import candidates as ways
from ffnkit.search.candidates import Candidate
from ffnkit.search.settings import SearchSettings
from ffnkit.search.state import Folder

GENERATION = 4  # candidates that are proposed together, after the opening
FAILS = 3  # as many times the candidates are proposed at most, those that fail with them
PROPOSED = "proposed.json"
Params = dict[str, Any]


@dataclass(frozen=True)
class Proposals:
    """What a search tries, by number.

    Attributes:
        layers: of the model.
    """

    folder: Folder
    settings: SearchSettings
    layers: int

    def open(self) -> list[int]:
        """Numbers that nobody has tried yet, of the newest generation; none where there are enough.

        Raises:
            FfnkitError: nothing could be measured at all.
        """
        with self.folder.turn("asking"):
            while True:
                known = self._known()
                if left := [number for number in range(len(known)) if not self.folder.tried(number)]:
                    return left
                done = len(self.folder.candidates())
                wanted = self.settings.candidates - done
                room = FAILS * self.settings.candidates + len(self._opening) - len(known)
                new = self._next(known, min(wanted, room)) if min(wanted, room) > 0 else []
                if not new:
                    if not done:
                        raise FfnkitError("searching", "no candidate fits the model", "Allow other methods")
                    return []
                write_json(self.folder.out / PROPOSED, {"candidates": [*known, *new]})

    def candidate(self, number: int) -> Candidate:
        """One that was proposed."""
        return self._asked(self._study(self._known()[number : number + 1], seed=0))[1]

    def _known(self) -> list[Params]:
        return list((read_json(self.folder.out / PROPOSED) or {}).get("candidates", []))

    @cached_property
    def _opening(self) -> list[Params]:
        return ways.first_ones(self.settings, self.layers)

    def _next(self, known: list[Params], count: int) -> list[Params]:
        """Up to ``count`` new ones: the opening first, then what TPE makes of all that are measured."""
        if not known:
            return self._opening[:count]
        study = self._study(known, self.settings.seed + len(known))
        values: dict[Candidate, list[float] | None] = {}
        for number in range(len(known)):
            trial, candidate = self._asked(study)
            found = self.folder.candidate(number)
            values[candidate] = None if found is None else [found["size"], found["loss"]]
            study.tell(trial, values[candidate], state=None if found is not None else _failed())
        new: list[Params] = []
        for _ in range(FAILS * self.settings.candidates):
            if len(new) == min(count, GENERATION):
                break
            trial, candidate = self._asked(study)
            if candidate in values:  # it is told what is known, and asked again
                if (past := values[candidate]) is not None:
                    study.tell(trial, past)
                continue
            values[candidate] = None
            new.append(trial.params)
        return new

    def _study(self, given: list[Params], seed: int) -> Any:
        """A study of its own, whose first trials are the given ones."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # trials at work count as bad ones, so that a generation is not all alike
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(self._opening), constant_liar=True)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for params in given:
            study.enqueue_trial(params)
        return study

    def _asked(self, study: Any) -> tuple[Any, Candidate]:
        trial = study.ask()
        return trial, ways.proposed(trial, self.settings, self.layers)


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL
