"""A package outside of the source tree adds a method, a kind of edit and a family; broken ones are caught by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ffnkit
from ffnkit import _registry
from ffnkit.errors import FfnkitError

HERE = Path(__file__).parent
BROKEN = (
    "a transposed weight", "a fold that drops the bias", "a scale forgotten", "an edit that writes in place",
    "a tie missed", "a config key forgotten", "a structure that hangs on numbers", "a plan that writes",
    "a plan of chance", "settings forgotten", "a row with gate and up swapped",
)  # fmt: skip

WORKER = """
import json, torch
torch.set_num_threads(1)
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from methods import case_of
import ffnkit as fk
from ffnkit import methods
from ffnkit.model.families import ffns as rows
from ffnkit.model.finding import ffns
from ffnkit.testing import Case, ContractError, check_edit, check_family, check_method
from ffnkit_outside import Each, GainInputs, Halve, outside_inputs, outside_model
from ffnkit_outside.broken import HALF, METHODS

found = {}
case = Case(outside_model, outside_inputs, name="outside")


def tied():
    model = outside_model()
    model.layers[1].outward.bias = model.layers[0].outward.bias
    return model


def tried(name, check):
    try:
        check()
        found[name] = "passed"
    except ContractError as error:
        found[name] = error.check
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"


tried("the family", lambda: check_family(case))
for where, each in (("outside", case), ("bert", case_of("bert")), ("mixtral", case_of("mixtral"))):
    tried(f"the method on {where}", lambda: check_method(lambda: methods.build("halve"), each))
for where, each in (("outside", case), ("gpt2", case_of("gpt2"))):
    tried(f"the edit on {where}", lambda: check_method(lambda: Each("gain"), each))
name = ffns(outside_model())[0].name
tried("the edit alone", lambda: check_edit(GainInputs(name, "down", HALF), case))
for name, (method, _) in METHODS.items():
    each = Case(tied, outside_inputs) if name == "a tie missed" else case
    tried(name, lambda: check_method(method, each))
kept = list(rows.LAYOUTS)
rows.LAYOUTS[:] = [rows.Layout("swapped", up="gate_proj", down="down_proj", gate="up_proj")]
tried("a row with gate and up swapped", lambda: check_family(case_of("llama")))
rows.LAYOUTS[:] = kept
tried("the row as it is", lambda: check_family(case_of("llama")))
expected = {name: check for name, (_, check) in METHODS.items()}
print(json.dumps([found, expected, methods.names()]))
"""


@pytest.fixture(scope="module")
def results() -> Any:
    source = Path(ffnkit.__file__).parents[1]
    path = os.pathsep.join(map(str, (source, HERE, HERE / "outside")))
    command = [sys.executable, "-c", WORKER]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "what",
    [
        "the family", "the method on outside", "the method on bert", "the method on mixtral", "the edit on outside",
        "the edit on gpt2", "the edit alone", "the row as it is",
    ],
)  # fmt: skip
def test_what_another_package_adds_keeps_the_contract(what: str, results: Any) -> None:
    assert results[0][what] == "passed"


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_fails_by_its_check(what: str, results: Any) -> None:
    expected = results[1] | {"a row with gate and up swapped": "the gate is under the activation"}
    assert set(expected) == set(BROKEN)
    assert results[0][what] == expected[what]


def test_names_of_other_packages_are_listed(results: Any) -> None:
    assert "halve" in results[2]


class Entry:
    """An entry point of a package that is not there."""

    def __init__(self, name: str, package: str, value: Any) -> None:
        self.name, self.value = name, value
        self.dist = type("Dist", (), {"name": package})

    def load(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def entries(monkeypatch: pytest.MonkeyPatch, *made: Entry) -> None:
    monkeypatch.setattr(_registry, "entry_points", lambda group: made)
    _registry.added.cache_clear()


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    yield
    _registry.added.cache_clear()


def test_a_broken_entry_point_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, Entry("bad", "bad-package", ImportError("no module named x")), Entry("good", "other", "good"))
    with pytest.warns(UserWarning, match="'bad' of bad-package cannot be loaded.*no module named x"):
        found = _registry.with_added("ffnkit.methods", ["ours"], str)
    assert found == ("ours", "good")


@pytest.mark.parametrize("name", ["ours", "good"])
def test_a_name_that_is_taken_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, Entry("good", "first", "good"), Entry(name, "second", name))
    with pytest.raises(FfnkitError, match=f"'{name}' of second.*has one of that name"):
        _registry.with_added("ffnkit.methods", ["ours"], str)
