"""Trackers: logs under OUT/logs after success, runs by name, plan, sizes and figures read back by the trackers' own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_companions import HALF, cli
from test_recipe_run import recipe_of, run, tiny

from ffnkit.errors import FfnkitError
from ffnkit.tune import tracking

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("tracked"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)


def scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that tensorboard's reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def text_of(logs: Path, name: str) -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs)).Reload()
    found = events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0]
    return str(found.decode())


def records(data: bytes, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as wandb writes them: behind 7 bytes of its own, in blocks, each
    part with checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last)."""
    place, held = header, b""
    while place + header <= len(data):
        if block - place % block < header:  # padding at a block's end
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        held += data[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):
            yield held
            held = b""


def wandb_runs(logs: Path) -> list[dict[str, Any]]:
    """What wandb's files hold of each offline run: its name, project, settings, history and summary."""
    from wandb.proto import wandb_internal_pb2

    runs = []
    for path in sorted(logs.rglob("*.wandb")):
        told: dict[str, Any] = {"config": {}, "history": [], "summary": {}}
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                told |= {"name": record.run.display_name, "project": record.run.project, "id": record.run.run_id}
            items = {"run": record.run.config, "config": record.config, "summary": record.summary}.get(kind)
            for item in getattr(items, "update", ()):
                name = item.key or "/".join(item.nested_key)
                told["summary" if kind == "summary" else "config"][name] = json.loads(item.value_json)
            if kind == "history":
                told["history"].append({each.key or ".".join(each.nested_key) for each in record.history.item})
        runs.append(told)
    return runs


@pytest.mark.slow
def test_a_recipe_s_units(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tune = {"learning_rate": 3e-3, "steps": 4, "batch_size": 8, "max_length": 16, "eval_every": 2, "logging_every": 1}
    stages = ["compress", "tune", "evaluate", "export"]
    recipe = recipe_of(folder, seeds=[3], stages=stages, tune={**tune, "report_to": "tensorboard"})
    results = run(recipe, tmp_path / "out")
    assert results.ok, results.failed
    for row in results.rows:
        logs = tmp_path / "out" / "logs" / row["arm"] / f"seed-{row['seed']}"
        found = scalars(logs)
        assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
        assert found["report/accuracy"][-1][1] == pytest.approx(row["metrics"]["accuracy"])
        assert found["size/flops_per_token"][-1][1] == pytest.approx(row["flops_per_token"])
        assert found["size/bytes_on_disk_compact"][-1][1] == pytest.approx(row["bytes_on_disk_compact"])
        assert f"{recipe.name}/{row['arm']}/seed-{row['seed']}" in text_of(logs, "args")
    assert "12 neurons" in text_of(tmp_path / "out/logs/half/seed-3", "plan")
    assert not list((tmp_path / "out" / "units").rglob("events.*"))  # nothing is left where checkpoints were


@pytest.mark.slow
def test_tune_leaves_its_logs(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    cli("compress", folder / "model", *HALF, "--out", tmp_path / "small")
    table = ("--train-file", folder / "train.csv", "--text-column", "text", "--label-column", "label")
    steps = ("--steps", 4, "--batch-size", 4, "--max-length", 16, "--set", "logging_every=1")
    words = ("tune", tmp_path / "small", *table, *steps, "--report-to", "tensorboard", "--out", tmp_path / "tuned")
    for _ in range(2):  # the second takes the first's place
        cli(*words)
        found = scalars(tmp_path / "tuned" / "logs")
        metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())["metrics"]
        assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
        assert found["report/accuracy"][-1][1] == pytest.approx(metrics["accuracy"])
        assert found["size/parameters"][-1][1] > 0
        assert "24 -> 12 neurons" in text_of(tmp_path / "tuned" / "logs", "plan")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "tuned"]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


@pytest.mark.slow
def test_wandb_offline(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tune = {"learning_rate": 3e-3, "steps": 2, "batch_size": 8, "max_length": 16, "eval_every": 2, "logging_every": 1}
    arms = {"whole": {}, "half": {"method": "fusion", "width": 0.5}}
    stages = ["compress", "tune", "evaluate"]
    recipe = recipe_of(folder, name="own", stages=stages, arms=arms, tune={**tune, "report_to": ["wandb"]})
    results = run(recipe, tmp_path / "out")
    assert results.ok, results.failed
    for row in results.rows:
        runs = wandb_runs(tmp_path / "out" / "logs" / row["arm"] / "seed-0")
        assert {each["name"] for each in runs} == {f"own/{row['arm']}/seed-0"}
        assert {each["project"] for each in runs} == {"own"} and len({each["id"] for each in runs}) == 1
        assert any("train/loss" in entry for each in runs for entry in each["history"])
        summary = {key: value for each in runs for key, value in each["summary"].items()}
        assert summary["report/accuracy"] == pytest.approx(row["metrics"]["accuracy"])
        assert summary["size/flops_per_token"] == pytest.approx(row["flops_per_token"])
        config = {key: value for each in runs for key, value in each["config"].items()}
        assert ("plan" in config) == (row["arm"] == "half") and config["recipe"] == "own"
    assert not (tmp_path / "wandb").exists()


def test_what_there_is_not_is_told_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FfnkitError, match="transformers knows no such tracker"):
        tracking.trackers("no_such")
    data = {"tune": {"steps": 1, "report_to": ["no_such"]}}
    with pytest.raises(FfnkitError, match="no such tracker"):
        run(recipe_of(folder, **data), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert tracking.trackers("none") == tracking.trackers([]) == []


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    with pytest.raises(FfnkitError, match="report_to wandb: it is not installed"):
        tracking.trackers("wandb")
    assert tracking.trackers("all") == []


def test_a_tracker_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    def fails(*_: Any) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(tracking, "trackers", lambda names: ["wandb"])
    monkeypatch.setitem(tracking._TELLERS, "wandb", fails)
    tracking.tell(tracking.Run("name", tmp_path), "wandb", tracking.Record())
    assert "wandb did not take the figures of name: no server" in caplog.text


def test_numbers_and_names(tmp_path: Path) -> None:
    found = tracking.numbers({"a": {"b": 1, "c": True, "d": "x"}, "e": 2.5, "f": None})
    assert found == {"a/b": 1.0, "e": 2.5}
    first, second = tracking.Run("one", tmp_path), tracking.Run("two", tmp_path)
    assert first.id == tracking.Run("one", tmp_path).id != second.id
