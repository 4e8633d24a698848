"""``--device-map``: the commands that open a model lay it over devices, and say what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_recipe_run import tiny
from typer.testing import CliRunner

from ffnkit.cli import app
from ffnkit.errors import FfnkitError
from ffnkit.io import placing
from ffnkit.io.loading import load_pretrained


def invoke(*words: Any, code: int = 0) -> str:
    found = CliRunner().invoke(app, [*map(str, words), "--quiet"])
    assert found.exit_code == code, found.output
    return " ".join(found.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("map"))


def rows(folder: Path) -> list[Any]:
    files = ["--train-file", folder / "train.csv", "--validation-file", folder / "validation.csv"]
    return [*files, "--text-column", "text", "--label-column", "label"]


@pytest.mark.parametrize("given", ["nowhere", "missing.json"])
def test_what_is_no_map_says_so(given: str) -> None:
    with pytest.raises(FfnkitError, match=f"--device-map {given}"), placing.mapped(given):
        pass
    assert placing.asked() == {}


def test_a_map_stands_alone(folder: Path, tmp_path: Path) -> None:
    words = ["compress", folder / "model", "--method", "magnitude", "--set", "width=0.5", "--out", tmp_path / "out"]
    assert "--stream keeps the model in its files" in invoke(*words, "--device-map", "auto", "--stream", code=2)
    assert "--device cpu is given too" in invoke(*words, "--device-map", "auto", "--device", "cpu", code=2)


def on_disk(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    path.write_text(
        json.dumps({"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"})
    )
    return path


def test_weights_on_the_disk_cannot_be_changed(folder: Path, tmp_path: Path) -> None:
    path = on_disk(folder, tmp_path)
    compress = ["compress", folder / "model", "--method", "magnitude", "--set", "width=0.5"]
    tune = ["tune", folder / "model", *rows(folder), "--steps", "2"]
    for words in (compress, tune, ["export", folder / "model"]):
        told = invoke(*words, "--out", tmp_path / "out", "--device-map", path, code=2)
        assert "(bert.encoder) would stay on the disk" in told and "--stream" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("given", ["cpu", "auto"])
def test_every_command_takes_a_map(given: str, folder: Path, tmp_path: Path) -> None:
    """With the same weights and figures as without one."""
    figures = {}
    for name, words in (("plain", []), ("mapped", ["--device-map", given])):
        place = tmp_path / name
        small = ["--method", "magnitude", "--set", "width=0.5", "--out", place / "small", "--form", "compact"]
        invoke("compress", folder / "model", *small, *words)
        limits = ["--steps", "2", "--batch-size", "4", "--max-length", "16", "--out", place / "tuned"]
        invoke("tune", place / "small", *rows(folder), *limits, *words)
        invoke("export", place / "tuned", "--out", place / "final", "--measure", "0", *words)
        asked = ["--validation-file", folder / "validation.csv", "--text-column", "text", "--label-column", "label"]
        told = CliRunner().invoke(app, [*map(str, ["eval", place / "final", *asked, *words]), "--json", "--quiet"])
        assert told.exit_code == 0, told.output
        figures[name] = json.loads(told.stdout)["metrics"]
    assert figures["mapped"] == figures["plain"]
    first, second = ((tmp_path / n / "final" / "model.safetensors").read_bytes() for n in ("plain", "mapped"))
    assert first == second


@pytest.mark.slow
def test_a_model_whose_parts_lie_on_the_disk_is_measured(folder: Path, tmp_path: Path) -> None:
    limits = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--max-length",
        "16",
        "--out",
        tmp_path / "tuned",
        "--form",
        "standard",
    ]
    invoke("tune", folder / "model", *rows(folder), *limits)
    path = on_disk(folder, tmp_path)
    with placing.mapped(str(path), runs_only=True):
        from transformers import AutoModelForSequenceClassification

        model = load_pretrained(AutoModelForSequenceClassification, tmp_path / "tuned")
    assert "disk" in model.hf_device_map.values()
    asked = [
        "--validation-file",
        folder / "validation.csv",
        "--text-column",
        "text",
        "--label-column",
        "label",
        "--json",
    ]
    found = [
        CliRunner().invoke(app, [*map(str, ["eval", tmp_path / "tuned", *asked, *more]), "--quiet"])
        for more in ([], ["--device-map", path])
    ]
    assert [each.exit_code for each in found] == [0, 0], found[1].output
    first, second = (json.loads(each.stdout)["metrics"] for each in found)
    assert first == pytest.approx(second)
