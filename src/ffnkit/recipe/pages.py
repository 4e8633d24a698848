"""The table and the report of a run, as files for people."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from ffnkit.io.files import write_text
from ffnkit.io.markdown import one_line, paragraphs
from ffnkit.recipe import judging
from ffnkit.recipe.results import Results, reported, tuner_told
from ffnkit.recipe.schema import Recipe, arm_dict
from ffnkit.recipe.state import OURS, distilled
from ffnkit.report import formats
from ffnkit.report import judging as compared
from ffnkit.report.page import PageInfo, write_page

RECIPE = "recipe.yaml"
TUNED = "checkpoints chosen on a part of the training data; reported once on the split kept for it"
UNTUNED = "nothing is trained; reported once on the split kept for it"


def write_pages(recipe: Recipe, results: Results) -> None:
    """table.md, results.csv, report.html and the recipe, as it stands, in the folder of the run."""
    notes = [recipe.notes] if recipe.notes else []
    opening = f"# {one_line(recipe.name)}\n\n" + "".join(map(paragraphs, notes))
    found = judging.found_in(recipe, results.out)
    verdicts, said = compared.lines(found.get("arms", {})), compared.notes(found) if found else []
    summary = results.summary()
    table = opening + formats.to_markdown(summary)
    if found:
        shown = formats.markdown_table(compared.HEADER, verdicts) + "\n" if verdicts else ""
        table += f"\n## Answers compared\n\n{shown}{formats.markdown_notes(said)}"
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=100)
    write_text(results.out / "table.md", table)
    write_text(results.out / "results.csv", formats.to_csv(summary))
    write_text(results.out / RECIPE, text)
    last: dict[str, Any] = next((row for row in reversed(results.rows) if row["status"] == "done"), {})
    there = shlex.quote(str(results.out))
    info = PageInfo(
        title=recipe.name,
        model=recipe.model,
        task=recipe.task.where,
        metric=results.metric,
        split_policy=TUNED if "tune" in recipe.stages else UNTUNED,
        rows=reported(results.rows),
        arms={name: said_of(recipe, name) for name in recipe.arms},
        settings=_settings(recipe, last),
        seeds=recipe.seeds,
        versions=last.get("versions", {}),
        machine=last.get("machine", {}),
        notes=notes,
        command=f"ffnkit run {there}/{RECIPE} --out {there}",
        recipe=text,
        links={name: name for name in OURS if name != "report.html" and (results.out / name).is_file()},
        verdicts=[list(compared.HEADER), *verdicts] if verdicts else [],
        verdict_notes=said,
        answers=judging.side_by_side(recipe, results.out),
    )
    write_page(results.out / "report.html", info)


def said_of(recipe: Recipe, name: str) -> dict[str, Any]:
    """What the page says of an arm: how it is compressed, its own tuner, and nothing of stages that it does not see."""
    arm = recipe.arms[name]
    whole = {key: value for key, value in arm_dict(arm).items() if key not in ("distil", "tuner")}
    if not arm.compressed:
        whole = {key: value for key, value in whole.items() if key in ("tune", "prune", "recover", "tickets", "search")}
    unseen = {"tune": "tune", "tickets": "tune", "prune": "prune", "recover": "recover"}
    whole = {key: value for key, value in whole.items() if unseen.get(key, "evaluate") in {*recipe.stages, "evaluate"}}
    if not recipe.recovers(name):
        whole.pop("recover", None)
    if distilled(recipe, name):
        whole["distilled"] = f"by {recipe.distil.objective}"
    return whole | ({"tuner": tuner_told(recipe, name)} if "tune" in recipe.stages else {})


def _settings(recipe: Recipe, last: dict[str, Any]) -> dict[str, Any]:
    """What all arms share: stages, rows, and the training, where there is one; of what arms differ in, each arm's."""
    told: dict[str, Any] = {"stages": recipe.stages}
    if rows := last.get("rows"):
        told["rows"] = {split: f"{count:,}" for split, count in rows.items()}
    if "tune" not in recipe.stages:
        return told
    for key, value in recipe.tune.model_dump().items():
        own = {name: getattr(recipe.tune_of(name), key) for name in recipe.arms}
        told[f"tune {key}"] = own if any(other != value for other in own.values()) else value
    if recipe.search is not None:
        told["tune learning_rate"] = "searched for each arm"
    return told
