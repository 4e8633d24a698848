"""Every method and every tuner through the public contract kit, on one family of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES
from methods import EVERY, KINDS, REFUSED, TUNERS, case_of

import ffnkit as fk
from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.testing import ContractError, check_family, check_method, check_reopened, check_tuner
from ffnkit.testing.contract import difference, snapshot
from ffnkit.testing.forms import check_forms
from ffnkit.testing.methods import planned
from ffnkit.tune import tuners

FAMILIES = (*KINDS, "clip")


# Faults that are known: each test fails until the fault is mended, and then until its line here goes.
def crossed(names: Any, times: int) -> list[Any]:
    """Each name with each family that bears it; ``times`` of them in the fast suite, by turns, the others are slow."""
    cases = []
    for number, name in enumerate(names):
        borne = [family for family in FAMILIES if (name, family) not in REFUSED]
        fast = {borne[(number + step * (len(borne) // times)) % len(borne)] for step in range(times)}
        for family in borne:
            marks = [] if family in fast else [pytest.mark.slow]
            cases.append(pytest.param(name, family, marks=marks))
    return cases


def test_every_method_and_every_tuner_has_a_line() -> None:
    assert {method.name for method in methods.METHODS} <= set(EVERY)
    assert {tuner.name for tuner in tuners.TUNERS} == {settings["name"] for settings in TUNERS.values()}


@pytest.mark.parametrize(("method", "family"), crossed(EVERY, 1))
def test_methods_keep_the_contract(
    method: str, family: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    slow = request.node.get_closest_marker("slow") is not None
    dtypes = (torch.float32, torch.bfloat16, torch.float64) if slow else (torch.float32, torch.bfloat16)
    check_method(EVERY[method], case_of(family, device), dtypes=dtypes)


@pytest.mark.parametrize(("name", "family"), [key for key in REFUSED if key[0] in EVERY])
def test_what_a_model_does_not_bear_is_refused(name: str, family: str) -> None:
    case = case_of(family)
    model = case.model()
    before = snapshot(model)
    with pytest.raises(FfnkitError, match=REFUSED[name, family]):
        fk.apply(model, fk.plan(model, EVERY[name](), data=case.batches(model)))
    assert not difference(before, snapshot(model))


@pytest.mark.parametrize(("tuner", "family"), crossed(TUNERS, 2))
def test_tuners_keep_the_contract(tuner: str, family: str, device: torch.device) -> None:
    check_tuner(TUNERS[tuner], case_of(family, device))


@pytest.mark.parametrize(("name", "family"), [key for key in REFUSED if key[0] in TUNERS and "on data" not in key[0]])
def test_what_a_model_does_not_bear_is_not_tuned(name: str, family: str) -> None:
    model = case_of(family).model()
    before = snapshot(model)
    with pytest.raises(FfnkitError, match=REFUSED[name, family]):
        tuners.prepare(model, TUNERS[name])
    assert not difference(before, snapshot(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_the_contract(name: str) -> None:
    check_family(case_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FAMILIES])
def test_all_families_keep_the_contract(name: str) -> None:
    check_family(case_of(name))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of methods that change different things."""
    root = tmp_path_factory.mktemp("shelf")
    for name, family in {"svd": "bert", "merging": "t5", "heads": "gpt2", "ffn-drop": "llama"}.items():
        case, folder = case_of(family), root / name
        folder.mkdir()
        check_forms(planned(EVERY[name], case, case.model()), case, folder)
    return root


@pytest.mark.slow
def test_fresh_processes_open_both_forms(shelf: Path) -> None:
    check_reopened(shelf)


@pytest.mark.slow
def test_a_fresh_process_that_opens_something_else_is_seen(shelf: Path, tmp_path: Path) -> None:
    """The control: other outputs are expected than the checkpoint has."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(shelf / "svd", tmp_path / "svd")
    path = tmp_path / "svd" / "outputs.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    with pytest.raises(ContractError, match="a fresh process opens it: svd/compact, with ffnkit: "):
        check_reopened(tmp_path)
    with pytest.raises(ContractError, match="holds no checkpoints"):
        check_reopened(tmp_path / "svd" / "compact")
