"""Columns of what trains and what it costs, and one table over several runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_tune import bert, fit
from torch import nn
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit.cli.program import app
from ffnkit.errors import FfnkitError
from ffnkit.model.trainable import head_parameters
from ffnkit.report import formats
from ffnkit.report.across import across
from ffnkit.report.sparsity import units_removed
from ffnkit.report.table import summarize
from ffnkit.tune.allocations import Allocations, size


def run_of(folder: Path, task: str, rows: list[dict[str, Any]], metric: str = "accuracy") -> Path:
    folder.mkdir()
    arms = dict.fromkeys(row["arm"] for row in rows)
    content = {"metric": metric, "recipe": {"model": "m", "task": {"name": task}, "arms": {arm: {} for arm in arms}}}
    (folder / "results.json").write_text(json.dumps(content | {"rows": [{"status": "done"} | row for row in rows]}))
    return folder


def row(arm: str, seed: int, value: float, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "metrics": {metric: value}, **more}


def test_the_average_is_over_tasks_seed_by_seed(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", "sst2", [row("full", 0, 0.9), row("full", 1, 0.8), row("lora", 0, 0.7)])
    more = run_of(tmp_path / "b", "sst2", [row("lora", 1, 0.5), row("lora", 0, 0.1)])  # a seed that ran apart
    two = [row("full", 0, 0.5, "matthews"), row("full", 1, 0.2, "matthews"), row("lora", 0, 0.1, "matthews")]
    other = run_of(tmp_path / "c", "cola", [*two, row("head", 0, 0.3, "matthews")], "matthews")
    found = across([one, more, other])
    arms = {arm.name: arm for arm in found.summary().arms}
    assert found.metric == "average" and found.tasks == ("sst2", "cola")
    assert arms["full"].metrics["average"].mean == pytest.approx((0.7 + 0.5) / 2)
    assert arms["full"].by_seed == {0: pytest.approx(0.7), 1: pytest.approx(0.5)}
    assert arms["lora"].by_seed == {0: pytest.approx(0.4)}, "seed 1 has no cola, and its average is not of sst2 alone"
    assert arms["lora"].metrics["accuracy (sst2)"].mean == pytest.approx(0.6)
    assert "average" not in arms["head"].metrics and any("head: no average" in note for note in found.notes)
    difference = arms["lora"].difference
    assert difference is not None and difference.mean == pytest.approx(-0.3)


def test_rows_that_are_there_twice_are_told_and_never_of_two_models(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", "sst2", [row("full", 0, 0.9), row("full", 1, 0.8)])
    two = run_of(tmp_path / "b", "sst2", [row("full", 1, 0.1), row("lora", 0, 0.7)])
    notes = across([one, two]).notes
    assert [note for note in notes if "left out" in note] == [
        f"sst2: 1 of the rows of {two} are left out, for {one} has the same arms and seeds."
    ]
    content = json.loads((two / "results.json").read_text())
    content["recipe"]["model"] = "other"
    (two / "results.json").write_text(json.dumps(content))
    with pytest.raises(FfnkitError, match="full with seed 1 on sst2 is there of m and of other"):
        across([one, two])
    content["rows"] = content["rows"][1:]  # an arm of its own, say from a model that was made for it
    (two / "results.json").write_text(json.dumps(content))
    assert {each["arm"] for each in across([one, two]).rows} == {"full", "lora"}


def test_metrics_of_two_directions_have_no_average(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", "sst2", [row("full", 0, 0.9)])
    two = run_of(tmp_path / "b", "wikitext2", [row("full", 0, 9.0, "perplexity")], "perplexity")
    found = across([one, two])
    assert found.metric == "accuracy (sst2)" and "average" not in found.rows[0]["metrics"]
    assert "No average" in found.notes[0]


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"sst2": "accuracy", "multi30k": "bleu"}, "accuracy (sst2) goes up to 1 and bleu (multi30k) goes up to 100"),
        ({"e2e": "bleu", "webnlg": "meteor"}, "bleu (e2e) goes up to 100 and meteor (webnlg) goes up to 1"),
        ({"e2e": "rougeL", "dart": "cider"}, "cider (dart) goes up to 10"),
        ({"e2e": "nist", "dart": "bleu"}, "nist (e2e) has no greatest value"),
        ({"mrpc": "accuracy", "stsb": "mse"}, "less is better of mse (stsb)"),
        ({"wikitext2": "loss", "tinystories": "perplexity"}, "less is better of loss (wikitext2)"),
        ({"sst2": "accuracy", "own": "of_somebody"}, "of_somebody (own) has no greatest value"),
        ({"cola": "matthews", "stsb": "pearson", "cifar10": "top5"}, ""),  # all up to one
        ({"e2e": "bleu", "coqa": "coqa_f1"}, ""),
        ({"e2e": "nist", "dart": "nist"}, ""),  # one metric is one scale
        ({"wikitext2": "perplexity", "tinystories": "perplexity"}, ""),
    ],
)
def test_metrics_of_different_scales_have_no_average(tmp_path: Path, metrics: dict[str, str], why: str) -> None:
    runs = [
        run_of(tmp_path / task, task, [row("full", seed, 0.5, metric) for seed in (0, 1)], metric)
        for task, metric in metrics.items()
    ]
    found = across(runs)
    assert ("average" in found.rows[0]["metrics"]) == (not why)
    assert found.notes[0] == "The average is over the tasks, seed by seed." if not why else why in found.notes[0]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": 3, "recipe": {}, "metric": "a"}'])
def test_what_is_no_run_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(app, ["report", str(tmp_path)], standalone_mode=False)
    assert isinstance(result.exception, FfnkitError) and "results.json" in str(result.exception)


def test_a_table_of_nothing_finished_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", "sst2", [row("full", 0, 0.9) | {"status": "failed"}])
    with pytest.raises(FfnkitError, match="finished"):
        across([run])


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    costs = {"trainable_parameters": 100, "updated_parameters": 10, "trainable_share": 0.0123, "samples_per_second": 5}
    runs = [run_of(tmp_path / t, t, [row("full", 0, 0.9), row("step", 0, 0.8, **costs)]) for t in ("rte", "sst2")]
    out = tmp_path / "all"
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(out)], standalone_mode=False)
    assert result.exit_code == 0 and "average" in result.output
    table = (out / "table.md").read_text()
    assert "accuracy (rte)" in table and "1.23%" in table and "samples/s" in table and "a step" in table
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert float(lines[1]["updated_parameters"]) == 10 and float(lines[1]["average"]) == pytest.approx(0.8)
    assert "average" in (out / "report.html").read_text()
    told = CliRunner().invoke(app, ["report", *map(str, runs), "--json"], standalone_mode=False)
    assert json.loads(told.output)["metric"] == "average"


def test_what_a_step_changes_is_shown_where_it_is_not_what_trains() -> None:
    same = [row("full", 0, 0.9, trainable_parameters=100, updated_parameters=100)]
    other = [*same, row("step", 0, 0.9, trainable_parameters=100, updated_parameters=10)]
    assert "a step" not in formats.to_markdown(summarize(same, "accuracy"))
    assert "| a step |" in formats.to_markdown(summarize(other, "accuracy"))


# --- what they are measured from


TUNERS: dict[str, Any] = {
    "full": "full",
    "head": "head",
    "lora": {"name": "lora", "rank": 2},
    "fixed": {"name": "sparsegrad", "count": 7, "batches": 2},
    "step": {"name": "sparsegrad", "count": 7, "batches": 2, "selection": "step"},
    "masked": {"name": "sparsegrad", "count": 7, "batches": 2, "selection": "masked-gradient"},
}


@pytest.mark.parametrize("name", TUNERS)
def test_a_run_tells_what_trains_and_what_a_step_changes(name: str, tmp_path: Path) -> None:
    model = bert()
    head = sum(p.numel() for p in head_parameters(model))
    body = sum(p.numel() for p in model.parameters()) - head
    linears = 2 * sum(1 for _ in fk.inspect(model).rows)
    found = fit(model, tmp_path, steps=2, tuner=TUNERS[name])
    updates = {"full": body, "head": 0, "fixed": 7 * linears}
    if name in updates:
        assert found.trainable_body == updates[name]
    assert found.trainable_parameters == found.trainable_body + head
    assert found.trainable_share == pytest.approx(found.trainable_body / body)
    assert found.updated_parameters == (7 * linears + head if name == "step" else found.trainable_parameters)
    assert found.steps_per_second > 0 and found.samples_per_second == pytest.approx(found.steps_per_second * 8)
    assert found.peak_tensors is not None and found.peak_tensors > size(model.parameters())


def test_the_peak_is_of_tensors_and_tells_arms_apart(tmp_path: Path) -> None:
    """Of full tuning: weights, gradients and two moments at once; of the head alone hardly more than the weights."""
    weights = size(bert().parameters())
    full = fit(bert(), tmp_path / "full", steps=3, tuner="full").peak_tensors
    head = fit(bert(), tmp_path / "head", steps=3, tuner="head").peak_tensors
    assert full > 4 * weights and head < full - 2 * weights


def test_allocations_of_known_size_are_measured() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1 << 20))

    measured, model = Allocations(), Holds()
    for number in range(3):
        measured.on_step_begin(None, None, None, model=model, optimizer=None)
        kept = torch.ones(1 << 20)
        more = kept * 2 if number == 1 else None
        del kept, more
        measured.on_step_end()
    assert measured.peak == pytest.approx(3 << 22, rel=0.01)
    with torch.profiler.profile() as outer:  # somebody else's goes on
        measured = Allocations()
        measured.on_step_begin(None, None, None, model=model, optimizer=None)
        measured.on_step_end()
    assert measured.peak == 0 and outer.events() is not None


def test_heads_and_neurons_that_went_are_told() -> None:
    model = FAMILIES["bert"].model()
    whole = FAMILIES["bert"].model()
    assert units_removed(model, whole) == {"heads_removed": 0.0, "neurons_removed": 0.0}
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fk.apply(model, fk.plan(model, fk.RemoveHeads(remove=0.5)))
    assert units_removed(model, whole) == {"heads_removed": 0.5, "neurons_removed": 0.5}
    text = formats.to_markdown(summarize([row("half", 0, 0.9, heads_removed=0.5, neurons_removed=0.25)], "accuracy"))
    assert "heads gone" in text and "50.0%" in text and "25.0%" in text
