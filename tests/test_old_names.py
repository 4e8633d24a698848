"""Settings, options and records under the names that they had before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit import methods
from ffnkit.cli.program import app
from ffnkit.errors import FfnkitError, RenamedWarning
from ffnkit.recipe.schema import facts_today, recipe_from
from ffnkit.settings import today
from ffnkit.tune import get
from ffnkit.tune.tuners import TUNERS

VALUES: dict[str, Any] = {
    "targets": "all",
    "modules_to_train": ("norms",),
    "density": 0.25,
    "sparsity": 0.25,
    "adapted_sparsity": 0.125,
    "remove": 0.5,
    "remove_heads": 0.5,
    "remove_neurons": 0.125,
}
METHODS = {kind.name: kind for kind in (*methods.METHODS, fk.DSEE, fk.SparseGrad) if hasattr(kind, "old_names")}
RENAMED = [(name, old, new) for name, kind in METHODS.items() for old, new in kind.old_names.items()]
TUNED = [
    (kind.name, old, new) for kind in TUNERS for old, new in kind.old_names.items() if new in kind.model_fields
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_methods_take_old_names_and_say_so(name: str, old: str, new: str) -> None:
    kind, value = METHODS[name], VALUES[new]
    with pytest.warns(RenamedWarning, match=f"'{old}' of {name} is called '{new}' now"):
        made = kind(**{old: value})
    assert made == kind(**{new: value}) and getattr(made, new) == value
    assert dataclasses.replace(made, **{new: value}) == made
    with pytest.warns(RenamedWarning), pytest.raises(FfnkitError, match="one setting"):
        kind(**{"seed": 0, **{old: value}}) and kind(**{old: value, new: value})


@pytest.mark.parametrize(("name", "old", "new"), TUNED)
def test_tuners_take_old_names_and_say_so(name: str, old: str, new: str) -> None:
    parts = [{"name": "mask"}, {"name": "dsee"}]
    settings = {"name": name, **({"parts": parts} if name == "combined" else {})}
    with pytest.warns(RenamedWarning, match=f"'{old}' of {name} is called '{new}' now"):
        made = get({**settings, old: VALUES[new]})
    assert made == get({**settings, new: VALUES[new]})
    with pytest.raises(FfnkitError, match="one setting"):
        get({**settings, old: VALUES[new], new: VALUES[new]})


def _recipe(tuner: dict[str, Any], prune: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "renamed",
        "model": "somewhere",
        "task": {"name": "sst2"},
        "stages": ["compress", "tune", "prune", "evaluate"],
        "tuner": tuner,
        "arms": {"first": arm, "second": {"prune": [prune]}},
    }


def test_recipes_and_what_runs_stored_are_read_under_the_names_of_today() -> None:
    old = _recipe(
        {"name": "sparsegrad", "share": 0.02, "also": ["norms"]},
        {"method": "prune", "ratio": 0.25, "sites": "ffn"},
        {"method": "heads", "share": 0.5},
    )
    new = _recipe(
        {"name": "sparsegrad", "density": 0.02, "modules_to_train": ["norms"]},
        {"method": "prune", "sparsity": 0.25, "targets": "ffn"},
        {"method": "heads", "remove": 0.5},
    )
    with pytest.warns(RenamedWarning):
        read = recipe_from(old)
    assert read.to_dict() == recipe_from(new).to_dict()
    stored = {"tuner": old["tuner"], "arm": {"method": "none", "prune": old["arms"]["second"]["prune"]}, "seed": 0}
    found = facts_today(stored)
    assert found == {
        "tuner": new["tuner"], "arm": {"method": "none", "prune": new["arms"]["second"]["prune"]}, "seed": 0
    }  # fmt: skip


def test_a_name_that_never_was_is_refused() -> None:
    with pytest.raises(FfnkitError, match="no such setting"):
        methods.build("heads", part=0.5)
    with pytest.raises(TypeError):
        fk.RemoveHeads(part=0.5)  # type: ignore[call-arg]
    assert today(fk.RemoveHeads, {"remove": 0.5}) == {"remove": 0.5}


def test_the_command_line_takes_old_names_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    call = ["compress", str(tmp_path / "none"), "--method", "heads", "--dry-run", "--set"]
    for old, new in (("share=0.5", "remove=0.5"),):
        found = CliRunner().invoke(app, [*call, old])
        assert found.exit_code == 2
        lines = [line for line in found.stderr.splitlines() if "called" in line]
        assert lines == ["ffnkit: warning: setting 'share' of heads is called 'remove' now; the old name will go"]
        assert "called" not in CliRunner().invoke(app, [*call, new]).stderr
    found = CliRunner().invoke(app, ["analyze", str(tmp_path / "none"), "--energy", "--sites=all"])
    assert found.stderr.count("option --sites is called --targets now") == 1
    assert json.dumps(found.exit_code) == "2"
