"""A search from end to end: the original, proposals before tuning, tuning by successive halving, the choice.

Every process that works on a folder does the same and takes what nobody else holds, so that a second one helps, and one
that is killed leaves nothing undone.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ffnkit
from ffnkit.calibration.drift import comparable
from ffnkit.errors import FfnkitError, WritingError
from ffnkit.io.files import disk_errors, read_json, replacing
from ffnkit.io.progress import phase
from ffnkit.recipe.shares import Shares
from ffnkit.recipe.state import digest, folder_digest, write_json
from ffnkit.search import candidates as ways
from ffnkit.search.chances import kept_share, least_kept
from ffnkit.search.ground import Ground, ground_of
from ffnkit.search.halving import promoted, spread
from ffnkit.search.proposing import Proposals
from ffnkit.search.settings import COUNTED, SearchRecipe, check_optuna
from ffnkit.search.state import FACTS, FIRST, FORMAT, POLL, Folder, Task, read_rows, recipe_in, spec_of, write_rows

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What a search came to: everything in ``out``, and as ``results.json`` holds it."""

    out: Path
    results: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0, or 1 where no smaller model keeps enough."""
        return 0 if self.results["chosen"] is not None else 1


def search(
    recipe: SearchRecipe,
    out: str | Path,
    say: Say = lambda line: None,
    *,
    jobs: int = 1,
    threads: int | None = None,
    ray: str | None = None,
) -> Found:
    """The smallest or fastest model that keeps a share of the metric, as ``recipe.search`` says.

    Candidates (widths, layers, FFNs, sharing, heads and mixtures) are proposed by Optuna's multi-objective TPE and
    measured before tuning: what they cost, and how far they are from the original on held-out data. The best of both
    heal with growing budgets. Models are chosen on dev, by paired rows, and the chosen one is reported once on the
    split kept for that. Killed and called again it goes on; called twice at once, both work on it. What is tried
    does not hang on who works on it, and its figures are the same but for rounding.

    Args:
        out: gets ``model`` (compact and standard), ``front.md``, ``front.svg``, ``report.html`` and ``results.json``.
        say: takes lines of progress.
        jobs: processes on this machine, each with its share of the threads.
        threads: of each process; None: all of this machine's cores where one is at work, else its share of them.
        ray: work on the Ray cluster at this address ("auto": the one at hand); ``out`` is then a folder that all of its
            nodes see.

    Raises:
        FfnkitError: settings, data or the folder do not fit, or nothing could be proposed.
    """
    check_optuna()
    shares = Shares(jobs, threads, ray)
    with disk_errors(Path(out)), shares.here():
        run = Run(recipe, Path(out), say)
        if ray is not None:
            from ffnkit.search.cluster import search_on

            search_on(run, shares)
            return run.finish()  # which reads what was written there
        with run.folder.begun(run.facts()):
            run.prepare()
            if run.open():
                with helpers(Path(out), shares):
                    run.work()
            return run.finish()


class Run:
    """One process at work on a search."""

    def __init__(self, recipe: SearchRecipe, out: Path, say: Say) -> None:
        self.recipe, self.settings, self.say = recipe, recipe.search, say
        self.folder = Folder(out)
        self.ground: Ground = ground_of(recipe)
        self.floor = self.settings.floor(self.ground.more)

    def facts(self) -> dict[str, Any]:
        """What the figures depend on, by field of the recipe."""
        plain = self.recipe.model_dump(mode="json", exclude={"name", "notes"})
        folder = Path(self.ground.name)
        own = folder_digest(folder) if folder.is_dir() else self.ground.name
        return {**plain, "weights": own, "data": digest(self.ground.facts()), "format": FORMAT}

    # --- the original

    def prepare(self) -> None:
        """The original, its figures and the statistics of one pass, by whoever comes first."""
        folder = self.folder
        with phase("the original"), folder.turn("original"):
            if (folder.out / FIRST).exists():
                return
            begin = time.perf_counter()
            folder.begin(self.facts())  # again: who had the turn before may have failed and taken it away
            self.ground.check()
            model = self.ground.original(folder.original)
            found = self.ground.scored(model, "dev")
            if not (found.value > 0 and found.value < float("inf")):
                what = f"the original has {self.ground.metric} {found.value:g} on dev, of which no share can be kept"
                raise FfnkitError(f"searching on {self.ground.where}", what, "Tune it longer, or name another metric")
            write_rows(folder.out / "original-dev.npz", found.rows)
            ffnkit.calibrate(model, self.ground.calibration(model), folder.out / "statistics.safetensors")
            figures = {"value": found.value, "costs": ways.costs(model), "layers": ways.depth(model)}
            write_json(folder.out / FIRST, figures | {"seconds": time.perf_counter() - begin})
            self.say(f"original: {self.ground.metric} {found.value:.4f} on dev ({time.perf_counter() - begin:.0f} s)")

    @cached_property
    def original(self) -> Any:
        """The model that all are compared with."""
        return self.ground.original(self.folder.original)

    @cached_property
    def first(self) -> dict[str, Any]:
        """Its figures."""
        found = read_json(self.folder.out / FIRST)
        assert found is not None
        return found

    @cached_property
    def statistics(self) -> Any:
        """What its FFNs do on the calibration data."""
        from ffnkit.calibration.stored import StatisticsFile

        return StatisticsFile.load(self.folder.out / "statistics.safetensors", self.original)

    @cached_property
    def batches(self) -> list[Any]:
        """The calibration data."""
        return self.ground.calibration(self.original)

    @cached_property
    def costs(self) -> dict[str, Any]:
        """What the narrowing of its FFNs costs, measured once, by whoever needs it first."""
        from safetensors.torch import load_file, save_file

        from ffnkit.budget.allocation import narrowing_costs

        file = self.folder.out / "costs.safetensors"
        with self.folder.turn("costs"):
            if not file.exists():
                with replacing(file) as new:
                    save_file(narrowing_costs(self.original, self.statistics), new)
            return load_file(file)

    def size(self, costs: dict[str, int]) -> float:
        """What is to be small, to the original's; of time the FLOPs foresee it."""
        kind = "flops" if self.settings.objective == "latency" else self.settings.objective
        return costs[kind] / self.first["costs"][kind]

    # --- the work

    def work(self) -> None:
        """Do what is left, beside whoever else works on the folder."""
        while tasks := self.open():
            if not any(self.taken(task) for task in tasks):
                time.sleep(POLL)

    def open(self) -> list[Task]:
        """What can be done now and is not done, in its order; nothing at the end of the work.

        Candidates come first, then rung by rung what is left of them.

        Raises:
            FfnkitError: nothing fits the model, or the folder went away.
        """
        self.folder.check_there()
        if left := self.proposals.open():
            return [Task(number) for number in left]
        for rung in range(self.settings.rungs):
            if left := [number for number in self.reached(rung) if self.folder.rung(number, rung) is None]:
                return [Task(number, rung) for number in left]
        return []

    @cached_property
    def proposals(self) -> Proposals:
        """What is tried."""
        return Proposals(self.folder, self.settings, self.first["layers"])

    def taken(self, task: Task) -> bool:
        """Whether nobody else was at work on it, and it is done now."""
        with self.folder.claimed(f"candidate-{task.number}") as ours:
            if ours and not self.folder.over(task):
                with phase(f"candidate {task.number}" + ("" if task.rung is None else f", rung {task.rung + 1}")):
                    self.do(task)
            return ours

    def do(self, task: Task) -> None:
        """Measure a candidate before tuning, or tune it in a rung."""
        if task.rung is None:
            self._measure(task.number)
        else:
            self._tune(task.number, task.rung)

    def _measure(self, number: int) -> None:
        begin, candidate, place = time.perf_counter(), self.proposals.candidate(number), self.folder.place(number)
        try:
            figures = self._measured(candidate, place)
        except WritingError:  # tells nothing of the candidate
            raise
        except FfnkitError as error:
            self.say(f"{candidate}: {error}")
            write_json(place / "failed.json", {"candidate": candidate.to_dict(), "error": str(error)})
            return
        write_json(place / "candidate.json", figures)
        count, what = len(self.folder.candidates()), COUNTED[self.settings.objective]
        self.say(
            f"[{count}/{self.settings.candidates}] {candidate}: {figures['size']:.1%} of the {what},"
            f" loss {figures['loss']:.4g} before tuning ({time.perf_counter() - begin:.0f} s)"
        )

    def _measured(self, candidate: ways.Candidate, place: Path) -> dict[str, Any]:
        """What a candidate costs, and its loss before tuning; its plans are kept."""
        place.mkdir(parents=True, exist_ok=True)
        model = copy.deepcopy(self.original)
        plans = ways.apply_to(
            model,
            candidate,
            self.settings.objective,
            self.statistics,
            self.batches,
            self.settings.seed,
            lambda: self.costs,
        )
        for number, plan in enumerate(plans):
            plan.save(place / f"plan-{number}")
        costs = ways.costs(model)
        return {
            "candidate": candidate.to_dict(),
            "plans": len(plans),
            "costs": costs,
            "size": self.size(costs),
            "loss": self.loss(model),
        }

    def loss(self, model: Any) -> float:
        """How far a model's answers are from the original's on held-out data, its mean over their kinds."""
        import torch

        from ffnkit.tune.answers import kind_of
        from ffnkit.tune.healing.loss import whole_loss

        kind = kind_of(self.original, next(iter(self.held.values()))[0])
        with torch.no_grad():
            found = [
                sum(whole_loss(model, self.original, batch, kind).item() for batch in batches) / len(batches)
                for batches in self.held.values()
            ]
        return comparable(sum(found) / len(found))

    @cached_property
    def held(self) -> dict[str, list[Any]]:
        """Data that no fit sees, by their kind."""
        least = self.recipe.heal.model_copy(update={"tokens": 1})  # of what is learned from nothing is wanted
        return dict(self.ground.healing(self.original, least, self.settings.seed)[1])

    # --- tuning

    def reached(self, rung: int) -> list[int]:
        """Which candidates are tuned in a rung: the same for every process that asks."""
        measured = {number: (each["size"], each["loss"]) for number, each in self.folder.candidates().items()}
        left = spread({number: each for number, each in measured.items() if each[0] < 1}, self.settings.tuned)
        for earlier in range(rung):
            points = {n: (measured[n][0], 1 - (self.folder.rung(n, earlier) or {})["kept"]) for n in left}
            count = max(2, -(-len(left) // self.settings.factor))
            left = promoted(points, 1 - self.floor, count)
        return left

    def _tune(self, number: int, rung: int) -> None:
        """Let a candidate go on learning from the original, from where the rung before left it."""
        from ffnkit.tune.healing.heal import heal

        begin, folder, place = time.perf_counter(), self.folder, self.folder.place(number)
        found = folder.candidate(number)
        assert found is not None
        if rung:
            model = self.ground.open(folder.model(number, rung - 1))
        else:
            model = copy.deepcopy(self.original)
            ways.apply_plans(model, [ffnkit.Plan.load(place / f"plan-{plan}") for plan in range(found["plans"])])
        tokens = self.settings.tokens * self.settings.factor**rung
        settings = self.recipe.heal.model_copy(update={"tokens": tokens})
        seed = self.settings.seed + rung
        parts, held = self.ground.healing(model, settings, seed)
        healed = heal(model, self.original, parts, settings, held=held, seed=seed)
        model.eval()
        scored = self.ground.scored(model, "dev")
        write_rows(place / f"rung-{rung}.npz", scored.rows)
        ffnkit.save(model, folder.model(number, rung), tokenizer=self.ground.tokenizer)
        kept, low = self.kept(scored.value, scored.rows, "dev", self.first["value"])
        write_json(
            place / f"rung-{rung}.json",
            {
                "rung": rung,
                "tokens": tokens,
                "value": scored.value,
                "kept": kept,
                "low": low,
                "loss": self.loss(model),
                "healed": healed.kept_at,
                "seconds": time.perf_counter() - begin,
            },
        )
        self.say(
            f"rung {rung + 1} of {self.settings.rungs}, {spec_of(found)}: {found['size']:.1%} of "
            f"the {COUNTED[self.settings.objective]}, keeps {kept:.2%} of {self.ground.metric} "
            f"({time.perf_counter() - begin:.0f} s)"
        )
        del model
        gc.collect()

    def kept(self, value: float, rows: Any, part: Any, whole: float) -> tuple[float, float | None]:
        """The share of the original's metric that is kept, and what it is at least, but for one time in ten.

        Args:
            value, rows: of the model. part: "dev" or "report". whole: the original's metric on it.
        """
        more, first = self.ground.more, self.folder.out / f"original-{part}.npz"
        low = least_kept(rows, read_rows(first), self.ground.of_rows(part), more, seed=self.settings.seed)
        return kept_share(value, whole, more), low

    # --- the choice

    def enough(self, figures: dict[str, Any]) -> bool:
        """Whether a tuned candidate keeps what is asked, and surely twice the loss that is allowed at most."""
        return figures["kept"] >= self.floor and (figures["low"] is None or figures["low"] >= 2 * self.floor - 1)

    def finish(self) -> Found:
        """Choose on dev, report once, write everything."""
        from ffnkit.search import choice, pages

        with phase("the choice"), self.folder.turn("finish"):
            if (done := read_json(self.folder.out / "results.json")) is None:
                done = choice.results(self)
                pages.write(self, done)
            return Found(self.folder.out, done)


# --- other processes


@contextmanager
def helpers(out: Path, shares: Shares) -> Iterator[None]:
    """Further processes that work on the folder while the block runs; one that is killed is not missed."""
    from ffnkit.search.helper import Helper

    started = [Helper(out, shares.environment(slot)) for slot in range(1, shares.jobs)]
    try:
        yield
    finally:
        for each in started:
            each.stop()


def run_of(out: Path, say: Say) -> Run:
    """The search that another process began in a folder."""
    facts = read_json(out / FACTS)
    if facts is None:
        raise FfnkitError(f"searching into {out}", "there is no search to be seen from here", "Use a shared folder")
    return Run(recipe_in(facts), out, say)
