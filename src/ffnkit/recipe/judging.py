"""The stage after all units: the answers of the arms, and a judge that compares them where the recipe names one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json
from ffnkit.recipe.schema import Recipe
from ffnkit.recipe.state import folder_digest, unit_of, write_json
from ffnkit.report.judging import Judge, Kept, Outcome, Pair, Tally, judged, pairs_of
from ffnkit.tasks.settings import JudgeSettings

ANSWERS, KEPT, FOUND = "predictions-report.jsonl", "judgements.jsonl", "judging.json"
SHOWN = 20  # prompts whose answers stand side by side in the report


def answers(recipe: Recipe, out: Path) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """By seed and arm what finished units wrote for the report split: {"prompt", "prediction", "references"}."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for seed in recipe.seeds:
        for arm in recipe.arms:
            unit = unit_of(out, arm, seed)
            path = unit.folder / ANSWERS
            if unit.done and path.is_file():
                with path.open(encoding="utf-8") as lines:  # texts may hold what str.splitlines takes for an end
                    found.setdefault(seed, {})[arm] = [json.loads(line) for line in lines]
    return found


def judge(recipe: Recipe, out: Path, say: Callable[[str], None]) -> str:
    """Have the pairs judged and write judging.json; why it could not be done, "" where it was.

    Verdicts are kept one by one, so the same command goes on where it stopped.
    """
    assert recipe.judge is not None
    first = next(iter(recipe.arms))
    settings = recipe.judge
    known: dict[str, Any] = {"model": settings.model, "url": settings.url, "against": first}
    try:
        pairs = pairs_of(answers(recipe, out), first, settings.prompts)
        outcomes = judged(pairs, _judge_of(recipe, settings), Kept(out / KEPT), _every_tenth(say))
    except FfnkitError as error:
        write_json(out / FOUND, known | {"error": str(error)})
        return str(error)
    write_json(out / FOUND, known | _counted(pairs, outcomes))
    return ""


def _judge_of(recipe: Recipe, settings: JudgeSettings) -> Judge:
    from ffnkit.io.loading import check_name
    from ffnkit.recipe.sources import Source, expand_model
    from ffnkit.report.judges import judge_of

    if settings.url is not None:
        return judge_of(settings)
    name = check_name(expand_model(settings.model))
    digest = folder_digest(Path(name)) if os.path.isdir(name) else ""
    return judge_of(settings.model_copy(update={"model": name}), Source(recipe).device, digest)


def _counted(pairs: list[Pair], outcomes: list[Outcome]) -> dict[str, Any]:
    by_arm: dict[str, list[Outcome]] = {}
    rows = []
    for pair, outcome in zip(pairs, outcomes, strict=True):
        by_arm.setdefault(pair.arm, []).append(outcome)
        told = {1: "better", 0: "tie", -1: "worse"}[outcome.value]
        rows.append(
            {"arm": pair.arm, "seed": pair.seed, "row": pair.row, "verdict": told, "disagree": outcome.disagree}
        )
    return {"arms": {arm: Tally.of(each).to_dict() for arm, each in by_arm.items()}, "pairs": rows}


def _every_tenth(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Tells of progress ten times at most."""

    def told(done: int, whole: int) -> None:
        if whole and done and (done == whole or done * 10 // whole != (done - 1) * 10 // whole):
            say(f"  judged {done} of {whole} pairs")

    return told


def found_in(recipe: Recipe, out: Path) -> dict[str, Any]:
    """What judging.json holds; nothing where the recipe names no judge."""
    return (read_json(out / FOUND) or {}) if recipe.judge is not None else {}


def side_by_side(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """The first prompts of the first seed with each arm's answer: {"prompt", "references", "answers", "verdicts"}."""
    seed = recipe.seeds[0]
    arms = answers(recipe, out).get(seed, {})
    found = found_in(recipe, out).get("pairs", ())
    verdicts = {(row["arm"], row["row"]): row["verdict"] for row in found if row["seed"] == seed}
    rows = []
    for number in range(min(SHOWN, *(len(each) for each in arms.values()))) if arms else ():
        one = next(iter(arms.values()))[number]
        rows.append(
            {
                "prompt": one["prompt"],
                "references": one.get("references", []),
                "answers": {arm: each[number]["prediction"] for arm, each in arms.items()},
                "verdicts": {arm: verdicts[arm, number] for arm in arms if (arm, number) in verdicts},
            }
        )
    return rows
