"""Recipes: what is refused and in which words, what is reused, and that a killed run ends with the same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_recipe_run import tiny

from ffnkit.errors import FfnkitError
from ffnkit.recipe import load_recipe, quickstart, shipped
from ffnkit.recipe.loading import parse
from ffnkit.recipe.preflight import preflight
from ffnkit.recipe.schema import recipe_from

ROOT = Path(__file__).resolve().parents[1]
GOOD = """
name: small
model: some/model
task: sst2
seeds: [0, 1]
stages: [compress, tune, evaluate, export]
arms:
  uncompressed: {}
  half: {method: fusion, width: 0.5}
tune: {learning_rate: 1e-4, steps: 4}
"""


def load(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_a_good_recipe_is_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.arms["half"].settings == {"width": 0.5}
    assert recipe.tune.learning_rate == 1e-4  # without a dot in it, YAML 1.1 would read text
    assert recipe.units() == [("uncompressed", 0), ("half", 0), ("uncompressed", 1), ("half", 1)]
    assert recipe_from(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_recipes_that_ship_are_good() -> None:
    assert list(quickstart().arms) == ["uncompressed", "half"]
    files = list(shipped.FOLDER.glob("*.yaml"))
    assert files
    for path in files:
        whole = load_recipe(path)
        small = load_recipe(path, small=True) if "\nsmall:" in path.read_text() else whole
        assert small.arms and small.arms.keys() <= whole.arms.keys()


def test_a_small_variant_of_a_papers_table_names_itself() -> None:
    """Else its tables are headed by the paper's model and data, which it did not see."""
    files = list((shipped.FOLDER / "papers").glob("*.yaml"))
    assert len(files) > 10
    for path in files:
        whole, small = yaml.safe_load(path.read_text()), yaml.safe_load(path.read_text())["small"]
        assert "small variant" in small["name"] and small["name"] != whole["name"], path.name


# (old, new, what the one line must hold)
BAD = [
    ("seeds:", "seed:", ["seed: unknown field", "'seeds'"]),
    ("width: 0.5", "widht: 0.5", ["arms.half.widht: unknown field", "'width'"]),
    ("width: 0.5", "width: 1.5", ["arms.half.width: 1.5 is above 1.0"]),
    ("width: 0.5", "width: 0", ["arms.half.width: 0 is not above 0"]),
    ("width: 0.5", "width: -0.5", ["arms.half.width: -0.5 is not above 0"]),
    ("width: 0.5", "width: true", ["arms.half.width: True is not a number"]),
    ("width: 0.5", "width: wide", ["arms.half.width: 'wide' is not a number"]),
    ("width: 0.5", "seed: 1", ["arms.half", "width"]),
    ("method: fusion", "method: fussion", ["arms.half.method: unknown method 'fussion'", "'fusion'"]),
    ("uncompressed: {}", "uncompressed: {width: 0.5}", ["arms.uncompressed.width", "method"]),
    ("  uncompressed: {}", "  half: {}", ["half is given twice", "lines 8 and 9"]),
    ("uncompressed: {}", "un/compressed: {}", ["arms.un/compressed", "folder"]),
    ("uncompressed: {}", "uncompressed: 3", ["arms.uncompressed: 3"]),
    ("uncompressed: {}", "uncompressed: {distil: 1}", ["arms.uncompressed.distil"]),
    ("task: sst2", "task: sst3", ["task: unknown task 'sst3'", "'sst2'"]),
    ("task: sst2", "task: {train: a.csv, label: y}", ["task.text: is missing"]),
    ("task: sst2", "task: {train: a.csv, label: y, text: [a, b, c]}", ["task.text: names 3 columns"]),
    ("task: sst2", "task: {name: sst2, train: a.csv}", ["task.name", "not both"]),
    ("seeds: [0, 1]", "seeds: [0, 0]", ["seeds: seed 0 is given twice"]),
    ("seeds: [0, 1]", "seeds: []", ["seeds: is empty"]),
    ("seeds: [0, 1]", "seeds: 3", ["seeds: 3"]),
    ("seeds: [0, 1]", "seeds: [0, one]", ["seeds.1: 'one'"]),
    ("[compress, tune,", "[tune, compress,", ["stages: is out of order", "compress, tune, evaluate, export"]),
    ("[compress, tune,", "[compress, tuen,", ["stages.1: unknown value 'tuen'", "'tune'"]),
    ("[compress, tune,", "[tune,", ["stages: arm half has a method"]),
    ("steps: 4", "step: 4", ["tune.step: unknown field", "'steps'"]),
    ("steps: 4", "steps: many", ["tune.steps: 'many'"]),
    ("name: small\n", "", ["name: is missing"]),
    ("name: small", "name: small\nlimits: {dev: 0}", ["limits.dev: 0"]),
    ("name: small", "name: small\ntuner: lorra", ["tuner: unknown tuner 'lorra'", "'lora'"]),
    ("name: small", "name: small\ntuner: {name: lora, rnak: 4}", ["tuner.rnak: unknown field", "'rank'"]),
    (
        "name: small",
        "name: small\nexport: none\nmeasure: {latency: true}",
        ["latency: no checkpoint"],
    ),
    ("half: {", "half: {tuner: {name: lora, rank: 0}, ", ["arms.half.tuner.rank: 0"]),
]


@pytest.mark.parametrize(("old", "new", "expected"), BAD, ids=[new.strip()[:40] for _, new, _ in BAD])
def test_a_wrong_field_is_named_in_one_line(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(FfnkitError) as error:
        load(tmp_path, GOOD.replace(old, new, 1))
    line = str(error.value).replace(str(tmp_path), "")
    assert "\n" not in line and len(line) < 400
    for part in expected:
        assert part in line


def test_empty_arms_and_other_files(tmp_path: Path) -> None:
    for text, part in (
        (GOOD.split("arms:")[0] + "arms: {}\n", "arms: is empty"),
        (GOOD.split("arms:")[0], "arms: is missing"),
        ("", "the file is empty"),
        ("- a\n- b\n", "holds a list"),
        ("a: [1,\nb: 2", "not valid YAML on line"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
    ):
        with pytest.raises(FfnkitError) as error:
            load(tmp_path, text)
        assert part in str(error.value), str(error.value)
    with pytest.raises(FfnkitError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(FfnkitError, match="cannot be read"):
        load_recipe(tmp_path)


def test_several_errors_are_all_named(tmp_path: Path) -> None:
    text = GOOD.replace("seeds: [0, 1]", "seeds: 3").replace("width: 0.5", "width: 9.5").replace("steps:", "stepps:")
    with pytest.raises(FfnkitError, match=r"seeds: .*arms\.half\.width: .*tune\.stepps: "):
        load(tmp_path, text)


@pytest.mark.parametrize("method", ["{method: merging, window: 2}", "{method: layer-drop, window: 2}"])
def test_windows_pass_the_checks_before_a_run(method: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    task = f"{{train: {folder / 'train.csv'}, text: text, label: label}}"
    text = f"name: w\nmodel: {folder / 'model'}\ntask: {task}\narms: {{some: {method}}}"
    recipe = parse(text, "here")
    with pytest.raises(FfnkitError, match="window of 9"):
        preflight(parse(text.replace("window: 2", "window: 9"), "here"))
    assert preflight(recipe)


def test_an_arm_may_have_settings_of_its_own(tmp_path: Path) -> None:
    text = GOOD.replace("half: {method: fusion, width: 0.5}", "half: {tuner: lora, tune: {learning_rate: 1e-3}}")
    recipe = load(tmp_path, text)
    assert recipe.tune_of("half").learning_rate == 1e-3 and recipe.tune_of("half").steps == 4
    assert recipe.tune_of("uncompressed") == recipe.tune
    assert recipe_from(json.loads(json.dumps(recipe.to_dict()))) == recipe
    for wrong, named in (("learning_rat: 1e-3", "learning_rat"), ("learning_rate: fast", "learning_rate")):
        with pytest.raises(FfnkitError, match=f"arms.half.tune.{named}"):
            load(tmp_path, text.replace("learning_rate: 1e-3", wrong))


def test_a_recipe_that_ships_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"sst2_minilm", "papers/sparsegrad_glue"} <= set(shipped.names())
    assert load_recipe("sst2_minilm").name == "sst2-minilm"
    assert all(len(shipped.about(name)) > 20 for name in shipped.names())
    Path("sst2_minilm").write_text(GOOD, encoding="utf-8")  # a file of one's own goes first
    assert load_recipe("sst2_minilm").name != "sst2-minilm"
    with pytest.raises(FfnkitError, match="there is no such file.*ffnkit recipes"):
        load_recipe("sst2_minilms")
    with pytest.raises(FfnkitError, match="ffnkit recipes"):
        shipped.path("../loading")
