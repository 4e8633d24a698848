"""Arms with a target, and statistics in the place of texts, run from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_recipe_run import folder, recipe_of, run  # noqa: F401 (a fixture)

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.recipe.sources import Source
from ffnkit.recipe.state import calibration_facts

pytestmark = pytest.mark.slow
STAGES = ["compress", "evaluate", "export"]


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["rows"]
    return found


def test_an_arm_with_a_target_from_beginning_to_end(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    small = {"target": {"params": 0.9, "parts": ["neurons", "layers"], "multiple": 4, "rounds": 0}}
    run(recipe_of(folder, arms={"whole": {}, "small": small}, stages=STAGES, export="compact"), tmp_path / "out")
    [whole] = [row for row in rows(tmp_path / "out") if row["arm"] == "whole"]
    [row] = [row for row in rows(tmp_path / "out") if row["arm"] == "small"]
    assert row["parameters"] <= 0.9 * whole["parameters"]
    [told] = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("small/seed-0/compress.json")]
    assert told["plan"]["target"]["left"] == row["parameters"]
    opened = fk.load(next((tmp_path / "out").glob("**/small/**/config.json")).parent)
    assert sum(p.numel() for p in opened.parameters()) == row["parameters"]


def test_statistics_take_the_place_of_data(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    arms = {"half": {"method": "calibrated-fusion", "width": 0.5, "refine": 0}}
    plain = recipe_of(folder, arms=arms, stages=STAGES, export="none")
    source = Source(plain)
    model = source.model(0)
    fk.calibrate(model, source.calibration(model, 0)).save(tmp_path / "stats.safetensors")
    named = {"calibration": {"statistics": str(tmp_path / "stats.safetensors")}}
    run(plain, tmp_path / "data")
    run(recipe_of(folder, arms=arms, stages=STAGES, export="none", **named), tmp_path / "statistics")
    first, second = (rows(tmp_path / name)[0] for name in ("data", "statistics"))
    assert first["metrics"] == second["metrics"] and first["parameters"] == second["parameters"]
    other = recipe_of(folder, arms=arms, stages=STAGES, export="none", seeds=[1], **named)
    with pytest.raises(FfnkitError, match="other weights"):  # its head is drawn with another seed
        Source(other).calibration(Source(other).model(1), 1)


def test_wrong_statistics_and_several_texts(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    arms = {"half": {"method": "calibrated-fusion", "width": 0.5, "refine": 0}}
    with pytest.raises(FfnkitError, match="text and statistics are both given"):
        recipe_of(folder, arms=arms, calibration={"text": "a.txt", "statistics": "b.safetensors"})
    with pytest.raises(FfnkitError, match="calibration"):
        run(recipe_of(folder, arms=arms, calibration={"statistics": str(tmp_path / "none")}), tmp_path / "out")
    texts = {}
    for name, share in (("a", 0.5), ("b", 0.5)):
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n")
        texts[str(tmp_path / f"{name}.txt")] = share
    facts = calibration_facts(recipe_of(folder, arms=arms, calibration={"text": texts}))
    assert len(facts["text"]) == 3 and facts["text"][1] != facts["text"][2] and "statistics" not in facts
