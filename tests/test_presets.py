"""Presets: each is filled in wherever settings are read, what is given goes before it, and cards tell both."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit import methods
from ffnkit.cli import app, describe
from ffnkit.errors import FfnkitError
from ffnkit.recipe.cards import tuners as told_by
from ffnkit.recipe.schema import recipe_from
from ffnkit.report.card import CardInfo, model_card
from ffnkit.settings import build, settings_of
from ffnkit.settings.presets import Preset, presets_of, unlike
from ffnkit.tune import TUNERS, get

NEEDED = {"merging": {"layers": "0-1"}}
METHODS = [(kind, name) for kind in methods.METHODS for name in presets_of(kind)]
OF_TUNERS = [(kind, name) for kind in TUNERS for name in presets_of(kind)]


def needed(kind: Any) -> dict[str, Any]:
    """Settings without which there is no method, but for those that a preset has."""
    given = {each.name: 0.5 for each in settings_of(kind) if each.required} | NEEDED.get(kind.name, {})
    return given


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def values(made: Any, names: Any) -> dict[str, Any]:
    return {name: plain(getattr(made, name)) for name in names}


def another(kind: Any, preset: Preset) -> tuple[str, Any]:
    """A setting of a preset and another value that it may have."""
    for each in settings_of(kind):
        for value in (*each.choices, *([1, 2] if each.kinds == (int,) else [])):
            if each.name in preset.values and not each.doc.choices and value != preset.values[each.name]:
                return each.name, value
    raise AssertionError(kind)


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda v: getattr(v, "name", v))
def test_of_methods(kind: Any, name: str) -> None:
    preset, chooser = presets_of(kind)[name], getattr(kind, "chooses_preset", "preset")
    wanted = {key: plain(value) for key, value in preset.values.items()}
    given = {key: value for key, value in needed(kind).items() if key not in wanted} | {chooser: name}
    by_cli = describe.build(kind, given, "method")
    for made in (kind(**given), build(kind, given, kind.name), by_cli, dataclasses.replace(by_cli, seed=1)):
        assert values(made, wanted) == wanted
        assert made.settings()[chooser] == name
    key, value = another(kind, preset)
    made = kind(**given | {key: value})
    assert values(made, wanted) == wanted | {key: plain(value)}
    assert f"{key}={value}" in str(unlike(kind, {**given, key: value}, name))
    assert unlike(kind, given, name) is None
    # records of runs without one are what they were
    assert kind(**needed(kind)).settings().get(chooser) in (None, "default")
    assert str(preset) in describe.fields(kind)[chooser]["help"]


@pytest.mark.parametrize(("kind", "name"), OF_TUNERS, ids=lambda v: getattr(v, "name", v))
def test_of_tuners(kind: Any, name: str) -> None:
    preset = presets_of(kind)[name]
    wanted = {key: plain(value) for key, value in preset.values.items()}
    made = get({"name": kind.name, "preset": name})
    assert values(made, wanted) == wanted
    of_method = presets_of(type(made.method))[name]
    assert values(made.method, of_method.values) == {key: plain(value) for key, value in of_method.values.items()}
    assert "preset" not in get(kind.name).model_dump()
    assert made.model_dump()["preset"] == name


def test_values_given_by_place_stay() -> None:
    made = fk.DSEE(4, preset="paper")
    assert (made.rank, made.support, made.nonzeros) == (4, "grebsmo", 16)


def test_under_an_old_name() -> None:
    with pytest.warns(Warning, match="modules_to_train"):
        made = fk.DSEE(preset="paper", also=("biases",))
    assert made.modules_to_train == ("biases",)


def test_recipe_combined_and_cards() -> None:
    tuner = {"name": "combined", "parts": [{"name": "sparsegrad"}, {"name": "dsee", "preset": "paper"}]}
    recipe = recipe_from({"name": "r", "model": "m", "task": "sst2", "tuner": tuner, "arms": {"a": {}}})
    assert get(recipe.tuner.model_dump()).method.methods[1].support == "grebsmo"  # type: ignore[attr-defined]
    told = told_by.told("dsee", {"preset": "paper"})
    assert told["support"] == "grebsmo" and "differs" not in told
    assert "support=svd where that has" in told_by.told("dsee", {})["differs"]
    card = model_card(CardInfo("base", method="dsee", settings=fk.DSEE(rank=4).settings()))
    assert "rank=4, nonzeros=64, support=svd where that has rank=16, nonzeros=16, support=grebsmo" in card
    assert "where that has" not in model_card(CardInfo("base", method="dsee", settings={"preset": "paper"}))


@pytest.mark.parametrize("make", [lambda: get({"name": "dsee", "preset": "no"}), lambda: fk.DSEE(preset="no").check()])
def test_unknown(make: Any) -> None:
    with pytest.raises(FfnkitError, match="preset.*paper"):
        make()


def test_at_the_command_line() -> None:
    found = CliRunner().invoke(app, ["tune", "m", "--task", "sst2", "--tuner", "dsee", "--tuner-set", "preset=papr",
                                     "--out", "nowhere"])  # fmt: skip
    assert found.exit_code == 2 and "preset=papr: should be" in found.stderr
