"""Running recipes: what is left on disk, what is computed again, and that a killed run ends with the same figures."""

from __future__ import annotations

import hashlib
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

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.recipe import run as run_recipe
from ffnkit.recipe.results import collect
from ffnkit.recipe.schema import Recipe, recipe_from
from ffnkit.recipe.state import Unit, unit_of

MOODS = ["good", "great", "fine", "nice", "warm", "bad", "awful", "poor", "cold", "sad"]
THINGS = ["film", "plot", "cast", "scene", "music", "the", "a", "was", "very", "quite"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("recipe"))


def tiny(base: Path) -> Path:
    """A tiny BERT with a tokenizer of its own, and two files of sentences that tell good from bad."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *MOODS, *THINGS]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=25, max_position_embeddings=32, **sizes)).save_pretrained(base / "model")
    BertTokenizer(str(base / "vocab.txt")).save_pretrained(base / "model")
    draw = np.random.default_rng(0)
    for name, rows in (("train", 120), ("validation", 30)):
        lines = ["text,label"]
        for _ in range(rows):
            label = int(draw.integers(2))
            mood = draw.choice(MOODS[:5] if label else MOODS[5:], 2)
            lines.append(f"{' '.join(draw.permutation([*mood, *draw.choice(THINGS, 6)]))},{label}")
        (base / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return base


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "tiny",
        "model": str(folder / "model"),
        "task": {
            "train": str(folder / "train.csv"),
            "validation": str(folder / "validation.csv"),
            "text": "text",
            "label": "label",
        },
        "seeds": [0],
        "stages": ["compress", "distil", "tune", "evaluate", "export"],
        "arms": {"whole": {}, "half": {"method": "fusion", "width": 0.5}},
        "tune": {"learning_rate": 3e-3, "steps": 6, "batch_size": 8, "max_length": 16, "eval_every": 2},
        "distil": {"steps": 3, "batch_size": 8, "max_length": 16, "save_every": 1},
        "measure": {"batch_size": 2, "length": 8, "repeats": 2},
    }
    return recipe_from(data | changes)


def run(recipe: Recipe, out: Path, **options: Any) -> Any:
    return run_recipe(recipe, out, progress=False, isolate=False, **options)


def accuracy(model: Any, folder: Path) -> float:
    """What a plain loop over the sentences of validation.csv gets right."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, right = AutoTokenizer.from_pretrained(folder / "model"), []
    for line in (folder / "validation.csv").read_text().splitlines()[1:]:
        text, label = line.rsplit(",", 1)
        with torch.no_grad():
            right.append(int(model.eval()(**tokenizer(text, return_tensors="pt")).logits.argmax()) == int(label))
    return sum(right) / len(right)


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on interruptions: metrics, steps, and the very bytes of the weights."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    names = ("arm", "seed", "metrics", "dev_metric", "best_step", "parameters")
    weights = sorted(out.glob("units/*/*/*/model.safetensors"))
    return {
        "figures": [[row[name] for name in names] for row in rows],
        "weights": {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights},
    }


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    results = run(recipe_of(folder), out)
    assert results.ok and results.exit_code == 0, results.rows
    return out


def test_what_a_run_leaves(folder: Path, finished: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    content = json.loads((finished / "results.json").read_text())
    whole, half = content["rows"]
    assert (whole["arm"], half["arm"], half["seed"], half["status"]) == ("whole", "half", 0, "done")
    assert set(whole["seconds"]) == {"tune", "evaluate", "export"}
    assert set(half["seconds"]) == {"compress", "distil", "tune", "evaluate", "export"}
    for row in (whole, half):
        costs = ("samples_per_second", "steps_per_second", "peak_memory_bytes", "process_memory_bytes")
        for name in ("flops_per_token", "trainable_parameters", "bytes_on_disk_compact", "trainable_share", *costs):
            assert row[name] > 0, name
        assert row["peak_memory_bytes"] < row["process_memory_bytes"]
        assert row["latency_s"] > 0 and row["latency_ratio"] > 0 and row["bytes_on_disk_standard"] > 0
        assert row["versions"]["torch"] and row["settings"]["tuner"] == {"name": "full"}
    assert half["neurons_removed"] == 0.5 and "heads_removed" not in half
    saved = 2 * 12 * (2 * 16 + 1)  # two layers, half of 24 neurons, each a row of up, its bias and a column of down
    assert whole["parameters"] - half["parameters"] == whole["ffn_parameters"] - half["ffn_parameters"] == saved
    for name in ("table.md", "report.html", "results.csv"):
        assert "half" in (finished / name).read_text()
    assert not list(finished.rglob("work")) and not list(finished.rglob("*checkpoint-*"))
    for form in ("compact", "standard"):
        for row, width in ((whole, 24), (half, 12)):
            checkpoint = finished / row["checkpoints"][form]
            model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
            assert model.bert.encoder.layer[0].intermediate.dense.out_features == width
            assert row["metrics"]["accuracy"] == pytest.approx(accuracy(model, folder), abs=1e-9)
            assert ("fusion" in (checkpoint / "README.md").read_text()) == (row is half)


def test_settings_of_a_preset_are_in_the_rows(folder: Path, tmp_path: Path) -> None:
    """Tables have a column of widths: an arm that takes its own from a preset is no arm without one."""
    fusion = {"method": "fusion", "preset": "paper"}
    arms = {"whole": {}, "theirs": fusion, "ours": {**fusion, "width": 0.5}}
    rows = {row["arm"]: row["settings"] for row in collect(recipe_of(folder, arms=arms), tmp_path, "accuracy").rows}
    preset = fk.Fusion.presets["paper"].values
    assert rows["theirs"].items() >= preset.items() and rows["ours"].items() >= {**preset, "width": 0.5}.items()
    assert not set(preset) & set(rows["whole"])


def test_run_again_computes_nothing_and_writes_the_same(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "units").rglob("*.json")}
    run(recipe_of(folder), out)
    assert {p: p.stat().st_mtime_ns for p in (out / "units").rglob("*.json")} == before
    assert outcome(out) == outcome(finished)
    measured = (out / "latency.json").stat().st_mtime_ns
    run(recipe_of(folder), out, remeasure=True)
    assert (out / "latency.json").stat().st_mtime_ns > measured


@pytest.mark.slow
def test_arms_and_seeds_may_be_added(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "units").rglob("done.json")}
    arms = {"whole": {}, "half": {"method": "fusion", "width": 0.5}, "lora": {"tuner": {"name": "lora", "rank": 2}}}
    results = run(recipe_of(folder, seeds=[0, 1], arms=arms), out)
    assert [row["status"] for row in results.rows] == ["done"] * 6
    assert {p: p.stat().st_mtime_ns for p in before} == before
    rows = {(row["arm"], row["seed"]): row for row in results.rows}
    assert rows["lora", 0]["trainable_parameters"] < rows["whole", 0]["trainable_parameters"]
    # only the first seed's checkpoints are kept; the others' sizes are known all the same
    assert rows["half", 0]["checkpoints"] and not rows["half", 1]["checkpoints"]
    assert rows["half", 1]["bytes_on_disk_compact"] == rows["half", 0]["bytes_on_disk_compact"]
    assert rows["half", 1]["metrics"] != {} and "±" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"arms": {"whole": {}, "half": {"method": "fusion", "width": 0.25}}}, "arm.width was 0.5, is 0.25"),
        ({"tune": {"learning_rate": 1e-3}}, "tune.learning_rate was 0.003, is 0.001"),
        ({"limits": {"train": 50}}, "limits.train"),
        ({"tuner": "ffn"}, "tuner.name"),
    ],
)
def test_another_recipe_is_refused(folder: Path, finished: Path, changes: dict[str, Any], field: str) -> None:
    before = outcome(finished)
    with pytest.raises(FfnkitError) as error:
        run(recipe_of(folder, **changes), finished)
    assert field in str(error.value) and "--restart" in str(error.value) and "\n" not in str(error.value)
    assert outcome(finished) == before


def test_changed_data_are_another_recipe(folder: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    with (tmp_path / "data" / "train.csv").open("a") as file:
        file.write("the film was very warm,1\n")
    recipe = recipe_of(tmp_path / "data")
    with pytest.raises(FfnkitError, match="of another recipe"):
        run(recipe, finished)


def test_restart_begins_anew(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    recipe = recipe_of(folder, arms={"whole": {}}, stages=["tune", "evaluate"], tune={"steps": 1, "batch_size": 8})
    assert run(recipe, out, restart=True).ok
    assert not (out / "units" / "half").exists() and (out / "notes.txt").read_text() == "mine"
    row = json.loads((out / "results.json").read_text())["rows"][0]
    assert row["latency_s"] is None and row["bytes_on_disk_compact"] is None  # not exported: not measured


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the run catches it."""


def test_killed_at_every_marker(folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, out, kills = Unit.mark, tmp_path / "out", 0
    recipe = recipe_of(folder)

    def dying(unit: Unit, stage: str, figures: dict[str, Any]) -> None:
        name = (unit.name, stage)
        if name not in seen:
            seen.add(name)
            raise Killed
        mark(unit, stage, figures)

    seen: set[Any] = set()
    monkeypatch.setattr(Unit, "mark", dying)
    for _ in range(40):
        try:
            run(recipe, out)
            break
        except Killed:
            kills += 1
    assert (
        kills == len(seen) == 3 + 3 + 3 + 5
    )  # unit, end and done of both units, three stages of one and five of the other
    assert outcome(out) == outcome(finished)
    # taken up again in the stage that was cut off, not from the start
    assert json.loads((out / "units/half/seed-0/tune.json").read_text())["attempts"] == 2


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5))])
def test_killed_within_tuning(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from ffnkit.tune.loop import Saving

    out, on_step_end = tmp_path / "out", Saving.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step:
            raise Killed
        on_step_end(self, args, state, control, **more)

    for _ in range(2):  # each arm once
        monkeypatch.setattr(Saving, "on_step_end", dying)
        with pytest.raises(Killed):
            run(recipe_of(folder), out)
        monkeypatch.setattr(Saving, "on_step_end", on_step_end)
    assert run(recipe_of(folder), out).ok
    assert outcome(out) == outcome(finished)


@pytest.mark.slow
def test_another_seed_has_another_outcome(folder: Path, finished: Path, tmp_path: Path) -> None:
    """The control of the tests above: equal outcomes are no matter of course."""
    run(recipe_of(folder, seeds=[1]), tmp_path / "out")
    other = sorted(outcome(tmp_path / "out")["weights"].values())
    assert not set(other) & set(outcome(finished)["weights"].values())


def test_a_failed_unit_does_not_stop_the_others(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffnkit.recipe.unit import _Job

    out, plan = tmp_path / "out", _Job.compress

    def broken(self: Any) -> dict[str, Any]:
        raise FfnkitError("clustering", "no memory", "Buy some")

    monkeypatch.setattr(_Job, "compress", broken)
    recipe = recipe_of(folder, arms={"half": {"method": "fusion", "width": 0.5}, "whole": {}})
    results = run(recipe, out)
    assert [row["status"] for row in results.rows] == ["failed", "done"] and results.exit_code == 1
    assert results.rows[0]["error"] == "clustering: no memory. Buy some"
    assert "failed" in (out / "table.md").read_text()
    monkeypatch.setattr(_Job, "compress", plan)
    assert run(recipe, out).ok


def test_bad_input_is_found_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fusion = {"method": "fusion", "width": 0.5}
    for changes, parts in (
        ({"arms": {"a": {**fusion, "width": 25}}}, ["arms.a", "25", "24"]),
        ({"arms": {"a": {**fusion, "layers": "last:3"}}}, ["arms.a", "last:3"]),
        ({"arms": {"a": {**fusion, "layers": "some"}}}, ["arms.a", "some"]),
        ({"model": str(tmp_path / "nowhere")}, ["nowhere"]),
        ({"model": str(folder / "train.csv")}, ["train.csv", "file"]),
        ({"task": {"train": str(folder / "train.csv"), "text": "words", "label": "label"}}, ["words"]),
        ({"task": {"train": str(folder / "train.csv"), "text": "text", "label": "mood"}}, ["mood"]),
        ({"task": {"train": str(tmp_path / "no.csv"), "text": "text", "label": "label"}}, ["no.csv"]),
    ):
        with pytest.raises(FfnkitError) as error:
            run(recipe_of(folder, **changes), out)
        line = str(error.value)
        assert all(part in line for part in parts) and "\n" not in line, line
        assert not out.exists()


def test_bad_output_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FfnkitError, match="file"):
        run(recipe_of(folder), tmp_path / "file")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("results.json", "search.json"):  # the latter of a search that is not done
        (foreign / name).write_text("{}")
        for restart in (False, True):
            with pytest.raises(FfnkitError, match="no run of a recipe wrote"):
                run(recipe_of(folder), foreign, restart=restart)
        assert [path.name for path in foreign.iterdir()] == [name] and (foreign / name).read_text() == "{}"
        (foreign / name).unlink()


def test_two_runs_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FfnkitError, match="another run is at work"):
            run(recipe_of(folder), out)


@pytest.mark.slow
def test_sigkill_in_processes_of_their_own(folder: Path, finished: Path, tmp_path: Path) -> None:
    """A real kill while a unit tunes in its process; both processes go, and the next run ends the same."""
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(folder, arms={"half": {"method": "fusion", "width": 0.5}}).to_dict()))
    code = (
        "import json, sys; from pathlib import Path; from ffnkit.recipe import run; from ffnkit.recipe.schema import "
        "recipe_from; import torch; run(recipe_from(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2], False)"
    )
    command = [sys.executable, "-c", code, str(recipe), str(out)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    unit = unit_of(out, "half", 0)
    deadline = time.monotonic() + 240
    while not list(unit.work.glob("tune/checkpoint-*")) and not unit.done:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    stopped = unit.done
    time.sleep(1.0)  # the child sees that we are gone
    assert unit.done == stopped
    subprocess.run(command, env=environment, check=True)
    ours, whole = outcome(out), outcome(finished)
    assert ours["figures"] == whole["figures"][1:]
    assert ours["weights"].items() <= whole["weights"].items() and len(ours["weights"]) == 2


@pytest.mark.slow
def test_a_healed_arm(folder: Path, tmp_path: Path) -> None:
    """What is healed is what is tuned and exported; arms without a method pass by; a kill changes nothing."""
    stages = ["compress", "heal", "evaluate", "export"]
    heal = {"tokens": "1k", "learning_rate": 1e-3, "checks": 2, "patience": 2}
    recipe = recipe_of(folder, stages=stages, heal=heal, calibration={"max_length": 16})
    plain = recipe_of(folder, stages=["compress", "evaluate", "export"])
    assert run(recipe, tmp_path / "healed").ok and run(plain, tmp_path / "plain").ok
    whole, half = json.loads((tmp_path / "healed" / "results.json").read_text())["rows"]
    assert "heal" in half["seconds"] and "heal" not in whole["seconds"]
    marker = json.loads((tmp_path / "healed" / "units" / "half" / "seed-0" / "heal.json").read_text())
    assert marker["kept_at"] and all(marker["after"][name] < loss for name, loss in marker["before"].items())
    first, second = (outcome(tmp_path / name)["weights"] for name in ("healed", "plain"))
    differ = {name for name in first if first[name] != second[name]}
    assert differ == {name for name in first if "/half/" in name}
    with pytest.raises(FfnkitError, match="heal needs compress"):
        recipe_of(folder, stages=["heal", "tune"], arms={"whole": {}})
    with pytest.raises(FfnkitError, match="heal.tokens"):
        recipe_of(folder, stages=stages, heal={"tokens": "many"})


@pytest.mark.parametrize(
    "arm",
    [
        {"method": "calibrated-merging", "layers": "0-1", "refine": 2, "tuner": {"name": "lora", "rank": 2}},
        {"method": "merging", "layers": "0-1", "tuner": {"name": "lora", "rank": 2, "tied": "each"}},
    ],
    ids=["members keep something", "an adapter for each layer"],
)
def test_adapters_that_part_a_shared_ffn_go_on(folder: Path, tmp_path: Path, monkeypatch: Any, arm: Any) -> None:
    """Built again before each stage, as after a kill, an arm ends with the same figures."""
    from ffnkit.recipe import unit as units
    from ffnkit.recipe.preflight import preflight
    from ffnkit.recipe.state import base_facts, unit_facts

    recipe = recipe_of(folder, arms={"a": arm}, stages=["compress", "tune", "evaluate"], calibration={"tokens": 200})
    facts = unit_facts(recipe, base_facts(recipe, *preflight(recipe)), "a", 0)
    monkeypatch.setattr(units, "await_reference", lambda *given, **more: None)
    stage, found = units._Job.stage, []

    def cut(self: Any, name: str) -> Any:
        self.forget()
        return stage(self, name)

    for name, each in (("straight", stage), ("cut", cut)):
        monkeypatch.setattr(units._Job, "stage", each)
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        unit = unit_of(tmp_path / name, "a", 0)
        units.run_unit(recipe, unit, facts, lambda line: None)
        marker = unit.marker("evaluate")
        assert marker is not None
        found.append((marker["metrics"], marker["parameters"]))
    assert found[0] == found[1]


def test_what_cannot_work_is_refused_beforehand(folder: Path) -> None:
    from ffnkit.recipe.preflight import preflight

    arm = {"method": "calibrated-merging", "layers": "0-1", "prune": {"method": "importance", "width": 0.5}}
    stages = ["compress", "tune", "prune", "recover", "evaluate"]
    with pytest.raises(FfnkitError, match="Set extras: false"):
        preflight(recipe_of(folder, arms={"a": arm}, stages=stages))
    preflight(recipe_of(folder, arms={"a": arm | {"extras": False}}, stages=stages))
    wrong = {"method": "merging", "window": 2, "score": "bleu"}
    with pytest.raises(FfnkitError, match="has no such metric"):
        preflight(recipe_of(folder, arms={"a": wrong}))
    for arm in (
        {"method": "merging", "layers": "0-1", "features": "up"},
        {"method": "fusion", "width": 0.5, "refit": True},
    ):
        with pytest.raises(FfnkitError, match=r"arms\.a.*statistics hold sums"):
            preflight(recipe_of(folder, arms={"a": arm}, calibration={"statistics": "s.safetensors"}))
    with pytest.raises(FfnkitError, match="seeds"):
        recipe_of(folder, seeds=[2**32])
