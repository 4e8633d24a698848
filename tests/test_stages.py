"""Recipes of three stages: tune, prune, recover; what they leave, what kills change (nothing), what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipe_run import Killed, accuracy, recipe_of, run, tiny
from test_recipe_run import outcome as plain_outcome

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.recipe.preflight import preflight
from ffnkit.recipe.schema import Recipe
from ffnkit.recipe.state import Unit, unit_of
from ffnkit.report.sparsity import sparsity
from ffnkit.tune import train

STAGES = ["tune", "prune", "recover", "evaluate", "export"]
DSEE = {"name": "dsee", "rank": 2, "nonzeros": 4}
ENTRIES = {"name": "sparsegrad", "density": 0.05, "basis": "none", "batches": 2}
HALF = {"method": "prune", "sparsity": 0.5}
HEADS = {"method": "heads", "remove": 1}
ARMS: dict[str, Any] = {
    "whole": {},
    "half": {"prune": HALF},
    "heads": {"prune": {**HEADS, "by": "update"}, "recover": {"steps": 4}},
    "entries": {"tuner": ENTRIES, "prune": [HEADS, {**HALF, "mode": "WABS"}]},
    "both": {
        "tuner": {"name": "combined", "parts": [ENTRIES, DSEE], "keep_zeros": True},
        "prune": {**HALF, "mode": "W"},
    },
    "lora": {"tuner": {"name": "lora", "rank": 2, "keep_zeros": True}, "prune": {"method": "prune", "pattern": "2:4"}},
    "full": {"tuner": "full", "prune": [HEADS, {"method": "importance", "width": 0.5}]},
}
SLOW = pytest.mark.slow
APART = ("half", "heads", "entries", "both")  # arms whose updates stay apart until the end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("stages"))


def staged(folder: Path, *arms: str, **changes: Any) -> Recipe:
    chosen = {name: ARMS[name] for name in arms}
    given = {"stages": STAGES, "tuner": DSEE, "recover": {"learning_rate": 1e-3}, "arms": chosen}
    return recipe_of(folder, **given | changes)


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on interruptions: metrics, the figures of pruning, and the very bytes of the weights."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    return plain_outcome(out) | {"pruning": [row.get("pruning") for row in rows]}


def of(finished: Path, arm: str) -> dict[str, Any]:
    """The outcome of one arm of several."""
    whole = outcome(finished)
    place = [row[0] for row in whole["figures"]].index(arm)
    weights = {name: value for name, value in whole["weights"].items() if f"/{arm}/" in name}
    return {"figures": [whole["figures"][place]], "pruning": [whole["pruning"][place]], "weights": weights}


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    results = run(staged(folder, *ARMS, measure={"latency": False}), out)
    assert results.ok, [row.get("error") for row in results.rows]
    return out


# What a run leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_say_what_the_stages_did(finished: Path) -> None:
    rows = {row["arm"]: row for row in json.loads((finished / "results.json").read_text())["rows"]}
    assert "pruning" not in rows["whole"] and set(rows["whole"]["seconds"]) == {"tune", "evaluate", "export"}
    for arm in set(ARMS) - {"whole"}:
        row = rows[arm]
        assert set(row["seconds"]) == set(STAGES)
        assert row["pruning"]["recover_steps"] == (4 if arm == "heads" else 6)
        assert ("merging" in row["pruning"]) == (arm in APART and arm != "heads"), arm
    for arm in ("half", "both"):
        pruning = rows[arm]["pruning"]
        assert pruning["sparsity"]["zeros"] == pytest.approx(0.5, abs=1e-3) == pruning["sparsity"]["masked"]
        assert pruning["sparsity"]["merged"] < 0.45  # merging fills them
        assert {"apart", "merged", "masked"} <= set(pruning["merging"])
    assert rows["lora"]["pruning"]["sparsity"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert rows["heads"]["pruning"]["kept"]["parameters"] < 1 == rows["half"]["pruning"]["kept"]["parameters"]
    assert rows["full"]["parameters"] < rows["heads"]["parameters"] < rows["whole"]["parameters"]
    assert rows["full"]["flops_per_token"] < rows["heads"]["flops_per_token"] < rows["half"]["flops_per_token"]
    trained = {arm: row["trainable_parameters"] for arm, row in rows.items()}
    assert trained["half"] == trained["whole"] < trained["both"] < trained["full"]


@pytest.mark.slow
def test_checkpoints_hold_what_is_left(folder: Path, finished: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    rows = {row["arm"]: row for row in json.loads((finished / "results.json").read_text())["rows"]}
    ids = torch.tensor([[2, 5, 9, 12, 3]])
    for arm, row in rows.items():
        outputs = []
        for form in ("compact", "standard"):
            model = AutoModelForSequenceClassification.from_pretrained(finished / row["checkpoints"][form]).eval()
            with torch.no_grad():
                outputs.append(model(input_ids=ids).logits)
        assert torch.allclose(*outputs, atol=1e-5), arm
        assert row["metrics"]["accuracy"] == pytest.approx(accuracy(model, folder), abs=1e-9), arm
        card = (finished / row["checkpoints"]["compact"] / "README.md").read_text()
        assert ("pruned afterwards by" in card) == ("steps of recovery" in card) == (arm != "whole")
        zeros = sparsity(model).share()
        if arm in ("both", "lora"):  # keep_zeros
            assert zeros == pytest.approx(0.5, abs=1e-3), arm
        if arm == "half":
            assert zeros == pytest.approx(row["pruning"]["sparsity"]["merged"], abs=1e-6)


@pytest.mark.slow
def test_tables_show_zeros_where_an_arm_has_some(finished: Path) -> None:
    table = (finished / "table.md").read_text()
    assert "zeros (merged)" in table and "50.0% (" in table
    assert "50.0% (50.0%)" in table  # keep_zeros
    page = (finished / "report.html").read_text()
    assert "zeros (merged)" in page and "method importance, width 0.5" in page


@pytest.mark.slow
def test_run_again_computes_nothing(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "units").rglob("*.json")}
    run(staged(folder, *ARMS, measure={"latency": False}), out)
    assert {p: p.stat().st_mtime_ns for p in (out / "units").rglob("*.json")} == before
    assert outcome(out) == outcome(finished)


# Kills ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["both", *(pytest.param(a, marks=SLOW) for a in ("half", "entries", "lora", "full"))])
def test_killed_at_every_marker(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    mark, out = Unit.mark, tmp_path / "out"
    seen: list[str] = []

    def dying(unit: Unit, stage: str, figures: dict[str, Any]) -> None:
        if stage not in seen:
            seen.append(stage)
            raise Killed
        mark(unit, stage, figures)

    monkeypatch.setattr(Unit, "mark", dying)
    for _ in range(20):
        try:
            run(staged(folder, arm, measure={"latency": False}), out)
            break
        except Killed:
            continue
    assert seen == ["unit", *STAGES, "end", "done"]
    assert outcome(out) == of(finished, arm)
    assert json.loads((out / f"units/{arm}/seed-0/recover.json").read_text())["attempts"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9, *(pytest.param(step, marks=SLOW) for step in (1, 5, 7, 11))])
def test_killed_within_a_training(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Steps 1 to 6 are of the tuning, 7 to 12 of the recovery."""
    from ffnkit.tune.loop import Saving

    out, on_step_end, count = tmp_path / "out", Saving.on_step_end, [0]

    def dying(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] == step:
            raise Killed
        on_step_end(self, args, state, control, **more)

    monkeypatch.setattr(Saving, "on_step_end", dying)
    with pytest.raises(Killed):
        run(staged(folder, "half", measure={"latency": False}), out)
    assert (out / "units/half/seed-0/prune.json").exists() == (step > 6)
    assert run(staged(folder, "half", measure={"latency": False}), out).ok
    assert outcome(out) == of(finished, "half")


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(0, marks=SLOW), 1])
@pytest.mark.parametrize("late", [False, True], ids=["before its plan is on disk", "behind it"])
def test_killed_within_pruning(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, late: bool
) -> None:
    out, save = tmp_path / "out", fk.Plan.save

    def dying(self: Any, path: Any) -> None:
        if Path(path).name == f"pruned-{number}":
            if late:
                save(self, path)
            raise Killed
        save(self, path)

    monkeypatch.setattr(fk.Plan, "save", dying)
    with pytest.raises(Killed):
        run(staged(folder, "entries", measure={"latency": False}), out)
    monkeypatch.setattr(fk.Plan, "save", save)
    assert run(staged(folder, "entries", measure={"latency": False}), out).ok
    assert outcome(out) == of(finished, "entries")


@pytest.mark.slow
def test_another_recovery_has_another_outcome(folder: Path, finished: Path, tmp_path: Path) -> None:
    """The control of the tests above: equal outcomes are no matter of course."""
    run(staged(folder, "half", recover={"learning_rate": 2e-3}, measure={"latency": False}), tmp_path / "out")
    other, same = outcome(tmp_path / "out"), of(finished, "half")
    assert not set(other["weights"].values()) & set(same["weights"].values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tune", "recover"])
def test_sigkill_in_a_process_of_its_own(folder: Path, finished: Path, tmp_path: Path, stage: str) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.json"
    recipe.write_text(json.dumps(staged(folder, "half", measure={"latency": False}).to_dict()))
    code = (
        "import json, sys; from pathlib import Path; from ffnkit.recipe import run; from ffnkit.recipe.schema import "
        "recipe_from; import torch; run(recipe_from(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2], False)"
    )
    command = [sys.executable, "-c", code, str(recipe), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    unit, deadline = unit_of(out, "half", 0), time.monotonic() + 240
    while not list(unit.work.glob(f"{stage}/checkpoint-*")) and not unit.done:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    stopped = unit.done
    time.sleep(1.0)  # the child sees that its parent is gone
    assert unit.done == stopped
    subprocess.run(command, env=environment, check=True)
    assert outcome(out) == of(finished, "half")


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": ["tune", "evaluate"]}, ["stages", "arm half has pruning", "prune is needed"]),
        ({"stages": ["tune", "recover", "evaluate"]}, ["arm half has pruning"]),
        ({"stages": ["tune", "recover"], "arms": {"whole": {}}}, ["recover needs prune"]),
        ({"stages": ["prune", "evaluate"]}, ["prune needs tune"]),
        ({"stages": ["prune", "tune"]}, ["out of order"]),
        ({"arms": {"half": {"prune": {"method": "prun"}}}}, ["arms.half.prune", "unknown method 'prun'", "prune"]),
        ({"arms": {"half": {"prune": {"sparsity": 0.5}}}}, ["arms.half.prune", "method", "missing"]),
        ({"arms": {"half": {"prune": {**HALF, "ration": 1}}}}, ["ration", "unknown"]),
        ({"arms": {"half": {"prune": {"method": "prune", "sparsity": "much"}}}}, ["sparsity"]),
        ({"arms": {"half": {"prune": [HALF, {"method": "importance", "width": 1.5}]}}}, ["width", "1.5"]),
        ({"arms": {"half": {"prune": HALF, "recover": {"step": 3}}}}, ["arms.half.recover.step"]),
        ({"recover": {"learning_rate": -1}}, ["recover.learning_rate"]),
        ({"tuner": {"name": "combined", "parts": [DSEE]}}, ["tuner.parts", "two tuners or more"]),
        ({"tuner": {"name": "combined", "parts": [DSEE, {"name": "lora"}]}}, ["tuner.parts", "lora"]),
    ],
)
def test_wrong_recipes_are_one_line(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(FfnkitError) as error:
        staged(folder, "half", **changes)
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line, line


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ({**HALF, "targets": "nowhere"}, ["nowhere"]),
        ({**HALF, "sparsity": 1.0}, ["sparsity"]),
        ({**HALF, "layers": "last:3"}, ["last:3"]),
        ({"method": "heads", "remove": 2}, ["one has to stay"]),
        ({"method": "heads", "by": "size"}, ["size"]),
        ({"method": "importance", "width": 25}, ["25", "24"]),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_anything_starts(
    folder: Path, tmp_path: Path, prune: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(FfnkitError) as error:
        run(staged(folder, "half", arms={"half": {"prune": prune}}), tmp_path / "out")
    line = str(error.value)
    assert all(word in line for word in ["arms.half", *words]) and "\n" not in line, line
    assert not (tmp_path / "out").exists()


NARROW = {"method": "importance", "width": 0.5}
NEURONS = {"method": "structured", "remove_neurons": 0.5}


@pytest.mark.parametrize(
    ("tuner", "prune", "words"),
    [
        ("full", {**HEADS, "by": "update"}, ["by update", "tuner full", "query and value"]),
        ({"name": "lora", "rank": 2}, {**HEADS, "by": "update"}, ["tuner lora", "query and value"]),
        (ENTRIES, {**HEADS, "by": "update"}, ["tuner sparsegrad", "query and value"]),  # it has them on FFNs
        (ENTRIES, {**HEADS, "by": "coefficients"}, ["coefficients", "the heads of"]),
        (DSEE, {**NEURONS, "remove_heads": 0, "by": "update"}, ["tuner dsee", "no update"]),  # it has them on attention
        (DSEE, {**NEURONS, "remove_heads": 0.5, "by": "update"}, ["tuner dsee", "no update"]),
        (DSEE, {**NEURONS, "remove_heads": 0, "neurons_by": "coefficients"}, ["neurons_by", "no coefficients"]),
        ("ffn", {**HALF, "mode": "ABS"}, ["mode ABS", "tuner ffn"]),
        (DSEE, {**HALF, "mode": "WAB", "targets": "ffn"}, ["mode WAB", "targets ffn"]),
        ("full", {**HALF, "adapted_sparsity": 0.9}, ["adapted_sparsity", "tuner full"]),
        ("full", [HALF, {**HEADS, "by": "update"}], ["by update"]),
        (None, {**HEADS, "by": "update"}, ["the model has no update on query and value"]),
        (None, {**HALF, "mode": "NAB"}, ["mode NAB", "the model has no update"]),
        (DSEE, {"method": "combined", "methods": [{**HEADS, "by": "coefficients"}, NARROW]}, ["by coefficients"]),
        # what is there, and what nobody asked for
        (DSEE, {"method": "combined", "methods": [{**HEADS, "by": "update"}, NARROW]}, []),
        (None, HALF, []),
        (DSEE, {**HEADS, "by": "update"}, []),
        ({**DSEE, "targets": "all"}, {**NEURONS, "remove_heads": 0.5, "by": "update"}, []),
        ({"name": "combined", "parts": [ENTRIES, DSEE]}, {**NEURONS, "remove_heads": 0.5, "by": "update"}, []),
        ({**ENTRIES, "coefficients": 0.1}, {**HEADS, "by": "coefficients"}, []),
        (DSEE, {**HALF, "mode": "WAB"}, []),
        ("full", HALF, []),
        ("full", {**HALF, "mode": "W"}, []),
    ],
)
def test_pruning_by_what_no_tuning_leaves_is_refused_before_anything_runs(
    folder: Path, tuner: Any, prune: Any, words: list[str]
) -> None:
    compressed = {} if tuner is not None else {"half": {**prune}}  # by a method before all tuning
    recipe = staged(folder, stages=["compress", *STAGES], arms=compressed or {"half": {"tuner": tuner, "prune": prune}})
    if not words:
        preflight(recipe)
        return
    with pytest.raises(FfnkitError) as error:
        preflight(recipe)
    line = str(error.value)
    assert all(word in line for word in ["arms.half", *words]) and "\n" not in line, line


def test_healing_by_adapters_of_what_would_be_parted_is_refused_before_anything_runs(folder: Path) -> None:
    shared = {"method": "calibrated-merging", "layers": "0-1"}
    for more, wrong in (({}, True), ({"extras": False}, False)):
        recipe = staged(folder, stages=["compress", "heal"], heal={"trains": "lora"}, arms={"tied": shared | more})
        if wrong:
            with pytest.raises(FfnkitError, match=r"arms\.tied: healing with trains=lora"):
                preflight(recipe)
        else:
            preflight(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"recover": {"learning_rate": 5e-4}}, "recover.learning_rate was 0.001, is 0.0005"),
        ({"arms": {"half": {"prune": {**HALF, "sparsity": 0.25}}}}, "arm.prune"),
        ({"arms": {"half": {"prune": HALF, "recover": {"steps": 3}}}}, "recover"),
        ({"arms": {"half": {}}}, "arm.prune"),
        ({"tuner": {**DSEE, "keep_zeros": True}}, "tuner.keep_zeros"),
    ],
)
def test_a_changed_stage_is_another_recipe(
    folder: Path, finished: Path, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with pytest.raises(FfnkitError, match="of another recipe") as error:
        run(staged(folder, "half", measure={"latency": False}, **changes), out)
    assert field in str(error.value) and "--restart" in str(error.value)
    assert outcome(out) == outcome(finished)


@pytest.mark.slow
def test_a_changed_recovery_is_no_matter_to_arms_without_pruning(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    changed = staged(folder, "whole", recover={"learning_rate": 5e-4}, measure={"latency": False})
    assert run(changed, out).ok
    assert json.loads((out / "results.json").read_text())["rows"][0]["status"] == "done"


def test_pruning_without_recovery(folder: Path, tmp_path: Path) -> None:
    recipe = staged(folder, "half", stages=["tune", "prune", "evaluate", "export"], measure={"latency": False})
    assert run(recipe, tmp_path / "out").ok
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    assert row["pruning"]["sparsity"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert set(row["seconds"]) == {"tune", "prune", "evaluate", "export"}


def test_coefficients_are_drawn_until_they_have_chosen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulls: list[set[float]] = []

    def watched(model: Any, *given: Any, **named: Any) -> Any:
        result = train(model, *given, **named)
        pulls.append({layer.l1 for layer in adapter_layers(model).values() if layer.coefficients is not None})
        return result

    monkeypatch.setattr("ffnkit.tune.train", watched)
    tuner = {**DSEE, "coefficients": 0.3}
    arm = {
        "tuner": tuner,
        "prune": {"method": "structured", "by": "coefficients", "remove_neurons": 0, "remove_heads": 1},
    }
    recipe = staged(folder, arms={"drawn": arm}, measure={"latency": False})
    results = run(recipe, tmp_path / "out")
    assert results.ok, [row.get("error") for row in results.rows]
    assert pulls == [{0.3}, {0.0}]


@pytest.mark.slow
def test_zeros_from_before_tuning_are_told_too(folder: Path, tmp_path: Path) -> None:
    arms = {"early": {"method": "prune", "sparsity": 0.5}, "whole": {}}
    recipe = staged(
        folder, stages=["compress", "tune", "evaluate"], arms=arms, export="none", measure={"latency": False}
    )
    results = run(recipe, tmp_path / "out")
    assert results.ok, [row.get("error") for row in results.rows]
    early, whole = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert early["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert early["zeros_merged"] == early["zeros"]  # the masks were put back where updates had gone into the weights
    assert "zeros" not in whole
