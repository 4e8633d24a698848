"""The main job: every unit of a recipe, then the latencies, the table and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import disk_errors
from ffnkit.io.progress import shown
from ffnkit.io.workspace import held, made
from ffnkit.recipe import cluster, launching, pool
from ffnkit.recipe import results as written
from ffnkit.recipe.board import Board
from ffnkit.recipe.results import Results
from ffnkit.recipe.schema import Recipe
from ffnkit.recipe.searching import found_of
from ffnkit.recipe.shares import Shares
from ffnkit.recipe.state import Unit, base_facts, check_out, check_same, clear_out, unit_facts, unit_of, write_json
from ffnkit.recipe.worker import run_here

Say = Callable[[str], None]


def run(
    recipe: Recipe,
    out: str | Path,
    progress: bool = True,
    *,
    restart: bool = False,
    remeasure: bool = False,
    isolate: bool = True,
    jobs: int = 1,
    threads: int | None = None,
    ray: str | None = None,
) -> Results:
    """Run what is missing of a recipe in ``out`` and write its results.

    Killed at any moment and called again it goes on, with the same final figures. A unit that fails is recorded and
    the others are run; ``Results.exit_code`` is then 1.

    Args:
        recipe: as ``load_recipe`` gives it.
        out: folder of the run; an earlier run of the same recipe is continued, with new arms and seeds added to it.
        progress: print lines of progress on stderr.
        restart: delete what an earlier run left in ``out``.
        remeasure: measure the latencies again.
        isolate: give each unit a process of its own, which makes its peak memory its own.
        jobs: units that run at once on this machine, each with its share of threads and one GPU. Figures are those of
            one after the other, to the bit where a unit has as many ``threads``; latencies are measured after all.
        threads: of each unit; None: all cores, or with ``jobs`` its share of them.
        ray: run units as tasks of the Ray cluster at this address ("auto": the one at hand); ``out`` is then a folder
            that all of its nodes see.

    Raises:
        FfnkitError: something is wrong with the recipe, its model, its data or ``out``; nothing was trained then.
        KeyboardInterrupt: after Ctrl-C; what is finished is kept.
    """
    from ffnkit.io.architectures import widened
    from ffnkit.recipe.preflight import preflight
    from ffnkit.recipe.sources import model_name

    out, say = Path(out), sayer(progress)
    shares = Shares(jobs, threads, ray)
    check_shares(shares, isolate)
    launching.check(recipe.launch, shares, recipe.tune.device)
    check_out(out)
    say(f"{recipe.name}: {len(recipe.arms)} arms x {len(recipe.seeds)} seeds in {out}")
    with shown("looking at the model and the data", quiet=not progress):
        model, data = preflight(recipe, say)
    if (told := widened(model_name(recipe))) is not None:
        say(told)
    base = base_facts(recipe, model, data)
    units = {unit_of(out, *pair): unit_facts(recipe, base, *pair) for pair in recipe.units()}
    with _alone(out):
        if restart:
            clear_out(out)
        check_same(out, units.items())
        stored = {f"{unit.arm}/{unit.seed}": facts for unit, facts in units.items()}
        write_json(out / "run.json", {"recipe": recipe.to_dict(), "units": stored})
        metric = _metric(recipe)
        try:
            _run_units(recipe, out, units, metric, isolate, progress, shares)
            with shown("after the units", quiet=not progress):
                _measure(recipe, out, remeasure, say)
                unjudged = _judge(recipe, out, say)
        except KeyboardInterrupt:
            written.write(recipe, written.collect(recipe, out, metric), pages=False)
            say("Stopped. What is finished is kept; run the same command to continue.")
            raise
        results = replace(written.collect(recipe, out, metric), unjudged=unjudged)
        written.write(recipe, results, pages=True)
    for row in results.failed:
        say(f"failed: {row['arm']}, seed {row['seed']}: {row['error']}")
    return results


def _metric(recipe: Recipe) -> str:
    from ffnkit.recipe.sources import task_of

    task = task_of(recipe)
    return recipe.task.metric if recipe.task.metric in task.metrics else task.main_metric


def _run_units(
    recipe: Recipe,
    out: Path,
    units: dict[Unit, dict[str, Any]],
    metric: str,
    isolate: bool,
    progress: bool,
    shares: Shares,
) -> None:
    searches: dict[str, Unit] = {}  # who finds the rate of an arm
    if recipe.search is not None:
        searches = {unit.arm: unit for unit in reversed(units) if not found_of(unit)}

    def first(unit: Unit) -> Unit | None:
        finder = searches.get(unit.arm)
        return None if finder == unit else finder

    def over(*_: Any) -> None:
        written.write(recipe, written.collect(recipe, out, metric), pages=False)

    with Board(len(units), shown=progress, side_by_side=shares.jobs > 1 or shares.ray is not None) as board:
        left = []
        for unit in units:
            if unit.done:
                board.before(unit.name)
            else:
                unit.unmark("failed")
                left.append(unit)
        if shares.ray is not None:
            cluster.run_units(out, left, shares, board, over, first)
        elif isolate:
            pool.run_units(out, left, shares, board, over, lambda unit: (before := first(unit)) is None or before.over)
        else:
            for unit in left:
                board.begins(unit.name)
                with shown(unit.name, quiet=not progress):
                    good = run_here(recipe, unit, units[unit], board.say, progress)
                board.ends(unit.name, good, unit.error)
                over()


def check_shares(shares: Shares, isolate: bool = True) -> None:
    """Raises FfnkitError where units cannot be shared out so."""
    if not isolate and (shares.jobs > 1 or shares.ray is not None):
        raise FfnkitError("isolate=False", "units side by side need processes of their own", "Leave it out")
    if shares.ray is not None:
        cluster.installed()


def _measure(recipe: Recipe, out: Path, again: bool, say: Say) -> None:
    from ffnkit.recipe.timing import measure_latency

    begin = time.perf_counter()
    try:
        if measure_latency(recipe, out, again=again):
            say(f"latencies of all arms in alternation: {time.perf_counter() - begin:.1f} s")
    except FfnkitError as error:
        say(f"latency was not measured: {error}")


def _judge(recipe: Recipe, out: Path, say: Say) -> str:
    """Why the answers were not judged; "" where they were, or no judge is named."""
    if recipe.judge is None:
        return ""
    from ffnkit.recipe.judging import judge

    say(f"judging the answers by {recipe.judge.model}")
    problem = judge(recipe, out, say)
    if problem:
        say(f"the answers were not judged to the end: {problem}")
    return problem


def sayer(progress: bool) -> Say:
    """What prints a line of progress on stderr, or nothing."""
    if not progress:
        return lambda line: None
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return lambda line: console.print(line, markup=False, soft_wrap=True)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder: two runs at once would write over each other. A run that never began leaves nothing."""
    with disk_errors(out), made(out), held(out, f"running into {out}"):
        try:
            yield
        except BaseException:
            if not (out / "run.json").exists():
                (out / ".lock").unlink(missing_ok=True)
            raise
