"""Files that earlier versions wrote still open, and compute what they did then (written by tools/old_files.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from tolerance import assert_close, relative_error
from torch import Tensor

import ffnkit as fk

FOLDER = Path(__file__).parent / "old_files"
SAME = 1e-5


@dataclass(frozen=True)
class Case:
    """A stored file.

    Attributes:
        kind: plans, adapters, loras or compact. trains: its outputs are those after the steps of ``moved``.
    """

    kind: str
    name: str
    family: str
    trains: bool

    @property
    def path(self) -> Path:
        return FOLDER / self.kind / (f"{self.name}.safetensors" if self.kind == "plans" else self.name)

    @property
    def outputs(self) -> Path:
        return FOLDER / "outputs" / f"{self.kind}-{self.name}.safetensors"

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


INDEX = FOLDER / "index.json"
CASES = [Case(**row) for row in json.loads(INDEX.read_text())] if INDEX.is_file() else []


def of(kind: str) -> Any:
    return pytest.mark.parametrize("case", [case for case in CASES if case.kind == kind], ids=str)


def outputs(family: str, model: Any) -> dict[str, Tensor]:
    if FAMILIES[family].has_experts:  # a model from a checkpoint starts with another implementation of the experts
        model.set_experts_implementation("eager")
    return FAMILIES[family].outputs(model.eval())


def moved(family: str, model: Any) -> None:
    """Two steps of plain gradient descent: updates start at zero, so that only training tells them apart.

    Without momentum or a norm, rounding stays rounding, and the order of the parameters does not matter.
    """
    parameters = fk.trainable_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(2):
        found = FAMILIES[family].outputs(model, grad=True)
        draw = torch.Generator().manual_seed(0)
        wanted = {name: torch.randn(value.shape, generator=draw) for name, value in found.items()}
        torch.stack([(found[name] - value).square().mean() for name, value in wanted.items()]).sum().backward()
        optimizer.step()
        model.zero_grad()


def check(case: Case, model: Any) -> None:
    expected, found = load_file(case.outputs), outputs(case.family, model)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key], rel=SAME, what=f"{case} {key}")
    plain = outputs(case.family, FAMILIES[case.family].model())
    assert max(relative_error(plain[key], expected[key]) for key in plain) > 1e-3, "the control: it does something"


def test_every_kind_is_there() -> None:
    assert {case.kind for case in CASES} == {"plans", "adapters", "loras", "compact"}
    assert all(case.path.exists() and case.outputs.is_file() for case in CASES)


@of("plans")
def test_plans(case: Case, tmp_path: Path) -> None:
    plan = fk.Plan.load(case.path)
    assert str(plan)
    model: Any = fk.apply(FAMILIES[case.family].model(), plan)
    if case.trains:
        moved(case.family, model)
    check(case, model)
    plan.save(tmp_path / "again")
    assert fk.Plan.load(tmp_path / "again") == plan


@of("adapters")
def test_adapters(case: Case) -> None:
    model: Any = fk.load_adapter(FAMILIES[case.family].model(), case.path)
    check(case, model)
    check(case, fk.fold(model))


@of("loras")
def test_loras(case: Case) -> None:
    model: Any = FAMILIES[case.family].model()
    targets = "all" if case.name == "conv1d" else "qv"
    check(case, fk.apply(model, fk.plan(model, fk.DSEE(lora=str(case.path), nonzeros=0, targets=targets))))


@of("compact")
def test_compact_checkpoints(case: Case, tmp_path: Path) -> None:
    model: Any = fk.load(case.path)
    check(case, model)
    assert str(fk.inspect(model))
    fk.save(model, tmp_path / "again")
    check(case, fk.load(tmp_path / "again"))
