"""What a study of merging shows: the metric before tuning, the layers chosen, what was saved; the axis of its plot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from test_generation import byte_level
from test_recipe_run import folder, recipe_of, run  # noqa: F401 (a fixture)
from test_report import info
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import ffnkit as fk
from ffnkit.recipe.schema import recipe_from
from ffnkit.recipe.sources import Source
from ffnkit.report.across import across
from ffnkit.report.columns import blocks, cells
from ffnkit.report.formats import to_csv, to_markdown
from ffnkit.report.page import page
from ffnkit.report.plot import AXES, against, drawn, heading
from ffnkit.report.table import Summary, summarize

BOTH = [{"method": "ffn-drop", "layers": "0"}, {"method": "fusion", "layers": "1", "width": 0.5}]
SIZES = {"ffn_parameters": 100.0, "parameters": 200.0, "flops_per_token": 400.0, "trainable_parameters": 50.0}


def row(arm: str, seed: int, before: float | None, after: float, **more: Any) -> dict[str, Any]:
    found = {"arm": arm, "seed": seed, "metrics": {"perplexity": after}, **SIZES, **more}
    return found if before is None else {**found, "metrics_before": {"perplexity": before}}


def study() -> list[dict[str, Any]]:
    rows = [row("whole", seed, 4.0, 4.0 + seed) for seed in range(2)]
    for removed in (1, 2, 3):
        saved = {"parameters": 200.0 - 40 * removed, "ffn_parameters": 100.0 - 20 * removed}
        saved |= {"parameters_removed": 0.2 * removed}
        rows += [
            row(f"{name}-{removed}", seed, 10.0**removed + seed, 5.0 + removed, layers=f"{seed}-{seed + removed}")
            | saved
            for name in ("merged", "vanilla")
            for seed in range(2)
        ]
    return rows


def summary(rows: list[dict[str, Any]]) -> Summary:
    return summarize(rows, "perplexity")


def test_all_three_are_in_table_csv_and_page() -> None:
    found = summary(study())
    header, lines = cells(found)
    assert header[:5] == ["arm", "seeds", "layers", "perplexity before", "perplexity"] and "saved" in header
    whole, first = (dict(zip(header, line, strict=True)) for line in lines[:2])
    assert (first["layers"], first["saved"]) == ("0-1 (1), 1-2 (1)", "20.0%")
    assert first["perplexity before"] == "10.5000 ± 0.7071" and whole["perplexity before"] == "4.0000 ± 0.0000"
    assert (whole["layers"], whole["saved"]) == ("–", "–")
    assert "| perplexity before |" in to_markdown(found)
    by_arm = {line["arm"]: line for line in csv.DictReader(io.StringIO(to_csv(found)))}
    assert float(by_arm["merged-1"]["perplexity_before"]) == 10.5 and by_arm["whole"]["layers"] == ""
    assert by_arm["merged-1"]["layers"].startswith("0-1") and float(by_arm["merged-1"]["parameters_removed"]) == 0.2
    text = page(info(rows=study(), arms={}, metric="perplexity"))
    for told in ("perplexity before", "layers", "saved", "20.0%", "before tuning", "perplexity against parameters"):
        assert told in text, told
    plain = [row("a", 0, None, 1.0), row("b", 0, None, 2.0)]  # no column where nothing was measured
    assert not {"layers", "saved", "perplexity before"} & set(cells(summary(plain))[0])


@pytest.mark.parametrize("key", AXES)
def test_the_axis_is_one_that_the_arms_differ_in(key: str) -> None:
    """Arms that differ in one figure alone stand against it, whatever it is."""
    rows = [row(f"arm{n}", 0, None, 1.0 + n, **{key: 10.0 + n}) for n in range(4)]
    assert against(summary(rows)) == key
    axes = drawn(summary(rows)).axes[0]
    marks = {round(float(line.get_xdata()[0]), 9) for line in axes.lines if line.get_marker() in "osD^"}
    assert len(marks) == 4


def test_equal_arms_have_places_of_their_own() -> None:
    rows = [row(f"arm{n}", 0, None, 1.0 + n) for n in range(3)]
    found = summary(rows)
    assert against(found) is None and heading(found) == "perplexity"
    assert list(drawn(found).axes[0].get_xticks()) == []


def test_a_mark_stands_where_its_figure_is() -> None:
    """Drawn, not only in data: arms of one size, alone or on a line, before tuning and after; none hides another."""
    import numpy as np

    more = [row(name, 0, 8.0, 7.0, parameters=160.0, ffn_parameters=80.0) for name in ("corrected", "anchor", "random")]
    figure = drawn(summary([*study(), *more]))
    figure.draw_without_rendering()
    for axes in figure.axes:
        marks = [line for line in axes.lines if line.get_marker() not in (None, "None", "_", "|", 1, 2, "")]
        assert len(marks) == 10
        for mark in marks:
            place = np.column_stack(mark.get_data()).astype(float)
            at = mark.get_transform().transform(place)
            assert np.allclose(axes.transData.transform(place), at)
            assert at[0, 0] + 8 * figure.dpi / 72 < axes.get_window_extent().x1  # its seeds beside it are inside too
        assert len({mark.get_markersize() for mark in marks[-3:]}) == 3


def test_panels_lines_and_scales() -> None:
    figure = drawn(summary(study()))
    before, after = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["before tuning", "after tuning"]
    assert before.get_yscale() == "log" and after.get_yscale() == "linear"
    lines = [line for line in after.lines if len(line.get_xdata()) == 3]
    assert len(lines) == 2  # merged and vanilla, three sizes each
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["whole (n = 2)", "merged", "vanilla"]
    single = drawn(summary([row(name, 0, None, 1.0) for name in ("merged-a", "merged-b", "x")]))
    labels = [text.get_text() for text in single.legends[0].get_texts()]
    assert labels == ["merged-a (n = 1)", "merged-b (n = 1)", "x (n = 1)"]


@pytest.mark.slow
def test_a_run_tells_them(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Through the recipe: windows that were searched, layers that were named, several methods in one plan."""
    arms: dict[str, Any] = {
        "whole": {},
        "searched": {"method": "layer-drop", "window": 1},
        "named": {"method": "merging", "layers": "0-1"},
        "both": {"method": "combined", "methods": BOTH},
    }
    more: dict[str, Any] = {"evaluate_before": True, "measure": {"latency": False}, "export": "none"}
    recipe = recipe_of(folder, arms=arms, stages=["compress", "tune", "evaluate"], **more)
    results = run(recipe, tmp_path / "out")
    assert results.ok, results.rows
    rows = {each["arm"]: each for each in results.rows}
    assert rows["searched"]["layers"] in ("0", "1") and rows["named"]["layers"] == "0-1"
    assert rows["both"]["layers"] == "0" and "layers" not in rows["whole"]
    whole = rows["whole"]["parameters"]
    for name in ("searched", "named", "both"):
        assert rows[name]["parameters_removed"] == pytest.approx(1 - rows[name]["parameters"] / whole)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "accuracy before" in text and "saved" in text and "before tuning" in text
    assert "layers" in (tmp_path / "out" / "results.csv").read_text().splitlines()[0].split(",")


@pytest.mark.parametrize("task", ["sst2", "mnli", "stsb", "webnlg", "e2e", "apart"])
def test_what_is_saved_is_counted_from_the_model_with_the_tasks_head_and_tokens(
    task: str,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """An arm that is not compressed saves nothing: three classes, one number, tokens of the task, updates beside it."""
    where: Path = folder / "model"
    if task in ("webnlg", "e2e"):
        where, tokenizer = tmp_path / "gpt2", byte_level()
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(where)
        tokenizer.save_pretrained(where)
    elif task == "apart":
        model = AutoModelForSequenceClassification.from_pretrained(where)
        fk.apply(model, fk.plan(model, fk.DSEE(rank=2, nonzeros=3)))
        where = fk.save_apart(model, tmp_path / "apart", tokenizer=AutoTokenizer.from_pretrained(where))
    known = {"apart": "sst2"}.get(task, task)
    source = Source(recipe_from({"name": "x", "model": str(where), "task": known, "arms": {"a": {}}}))
    empty, whole = ({n: p.shape for n, p in each.named_parameters()} for each in (source.empty(), source.model(0)))
    assert empty == whole


def test_further_splits_are_tables_of_their_own() -> None:
    """Five splits of six metrics fit no terminal; metrics named after tasks, which stand alone, stay in one table."""
    names = [f"{metric}{split}" for split in ("", " (test)", " (test_seen)") for metric in ("bleu", "ter")]
    rows = [{"arm": arm, "seed": 0, "metrics": dict.fromkeys(names, 0.5), **SIZES} for arm in ("whole", "half")]
    heads = [header for header, _ in blocks(summarize(rows, "bleu"))]
    assert heads[0][:4] == ["arm", "seeds", "bleu", "ter"] and "parameters" in heads[0]
    assert heads[1:3] == [["arm", "bleu (test)", "ter (test)"], ["arm", "bleu (test_seen)", "ter (test_seen)"]]
    assert [head for header in heads for head in header if head in names] == names
    tasks = {"average": 0.5, "accuracy (sst2)": 0.4, "accuracy (rte)": 0.6}
    heads = [header for header, _ in blocks(summarize([{"arm": "a", "seed": 0, "metrics": tasks}], "average"))]
    assert heads[0][:5] == ["arm", "seeds", *tasks]


def test_over_tasks_and_runs(tmp_path: Path) -> None:
    """The metric before tuning and the layers go into tables over runs too; one that lacks a task has no average."""
    for task, layers in (("sst2", "0-1"), ("rte", "1-2")):
        rows = [
            {
                "arm": "merged", "seed": 0, "status": "done", "metrics": {"accuracy": 0.8}, "layers": layers,
                "metrics_before": {"accuracy": 0.5 if task == "sst2" else 0.7}, "parameters_removed": 0.25,
            }
        ]  # fmt: skip
        (tmp_path / task).mkdir()
        content = {"rows": rows, "metric": "accuracy", "recipe": {"task": task, "model": "m", "arms": {"merged": {}}}}
        (tmp_path / task / "results.json").write_text(json.dumps(content))
    both = across([tmp_path / "sst2", tmp_path / "rte"])
    text = to_markdown(both.summary())
    assert "average before" in text and "0.6000" in text and "sst2: 0-1; rte: 1-2" in text and "25.0%" in text
    one = to_markdown(across([tmp_path / "sst2"]).summary())
    assert "accuracy (sst2) before" in one and "| 0-1 |" in one
