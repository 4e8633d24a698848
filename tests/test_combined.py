"""Several methods in one plan: the same as one after the other, and never two on one FFN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tolerance import assert_close

import ffnkit as fk
from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.recipe.loading import parse
from ffnkit.tune.scoring import with_score


def batches(name: str, model: Any) -> list[dict[str, Any]]:
    return [FAMILIES[name].inputs(model)]


def both(**more: Any) -> fk.Combined:
    return fk.Combined([fk.Merging(layers="0-1"), fk.CalibratedFusion(width=0.5, layers="2", **more)])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_one_plan_does_what_two_do(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    one, two = (family.model() for _ in range(2))
    data = batches(name, one)
    plan = fk.plan(one, both(), data=iter(data))
    assert str(plan).count("shares") == 1 and "neurons" in str(plan)
    plan.save(tmp_path / "plan")
    assert fk.Plan.load(tmp_path / "plan") == plan
    untouched = family.outputs(family.model())
    for key, value in family.outputs(one).items():
        assert torch.equal(value, untouched[key])  # planning changed nothing
    fk.apply(one, plan)
    for method in both().methods:
        fk.apply(two, fk.plan(two, method, data=data))
    for key, value in family.outputs(two).items():
        assert_close(family.outputs(one)[key], value, rel=1e-6, what=key)
        assert not torch.equal(value, untouched[key])
    assert sorted(ffn.width for ffn in ffns(one)) == sorted(ffn.width for ffn in ffns(two))
    fk.save(one, tmp_path / "saved")
    for key, value in family.outputs(fk.load(tmp_path / "saved").eval()).items():
        assert_close(value, family.outputs(one)[key], rel=1e-6, what=key)


def test_later_methods_see_the_edits_of_earlier_ones() -> None:
    """The control: calibrated on the unmerged model, the narrowed layer is another one."""
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    last = fk.plan(model, both(), data=data).edits[-1].tensors()
    alone = fk.plan(model, both().methods[1], data=data).edits[-1].tensors()
    assert any(not torch.equal(last[key], alone[key]) for key in last)


def test_two_methods_on_one_ffn_are_refused() -> None:
    model = FAMILIES["bert"].model()
    asked = fk.Combined([fk.Fusion(width=0.5, layers="0-1"), fk.Fusion(width=0.25, layers="1-2")])
    with pytest.raises(FfnkitError, match=r"changed by fusion too.*apply one plan"):
        fk.plan(model, asked)


def test_an_overlap_that_a_search_finds_is_refused() -> None:
    model = FAMILIES["bert"].model()
    asked = fk.Combined([methods.build("magnitude", width=1.0, layers="0-2"), fk.Merging(window=2)])
    with pytest.raises(FfnkitError, match="changed by magnitude too"):
        fk.plan(model, asked, data=batches("bert", model))


def test_dropped_layers_are_refused() -> None:
    model = FAMILIES["bert"].model()
    asked = fk.Combined([methods.build("layer-drop", layers="2"), fk.Fusion(width=0.5, layers="0")])
    with pytest.raises(FfnkitError, match="Apply it first"):
        fk.plan(model, asked)


@pytest.mark.parametrize("given", [None, [], [{"method": "fusion", "width": 0.5}], "fusion"])
def test_fewer_than_two_methods_are_refused(given: Any) -> None:
    with pytest.raises(FfnkitError, match="two methods or more"):
        fk.Combined(given)


@pytest.mark.parametrize("given", [{"width": 0.5}, {"method": "fuse", "width": 0.5}, {"method": "fusion", "widht": 1}])
def test_methods_by_name_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(FfnkitError):
        fk.Combined([given, {"method": "merging", "layers": "0-1"}])


def test_recipes_combine() -> None:
    text = """
name: both
model: quickstart
task: sst2
arms:
  both:
    method: combined
    methods: [{method: merging, layers: 0-2}, {method: fusion, layers: 3-5, width: 0.5}]
"""
    arm = parse(text, "here").arms["both"]
    assert methods.build(arm.method, **arm.settings).methods[1] == fk.Fusion(width=0.5, layers="3-5")
    with pytest.raises(FfnkitError, match="widht"):
        parse(text.replace("width", "widht"), "here")


def test_metrics_become_scores_inside() -> None:
    class Task:
        name, metrics, dev_metric = "cola", ("matthews",), "matthews"

    asked = fk.Combined([fk.Merging(window=2, score="matthews"), fk.Fusion(width=0.5, layers="2")])
    scored = with_score(asked, Task(), None, [])
    assert callable(scored.methods[0].score) and scored.methods[1] == asked.methods[1]
