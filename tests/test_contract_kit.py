"""Every method and every tuner through the public contract kit, on one family of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import NAMES
from methods import FURTHER, KINDS, METHODS, OTHERS, TUNERS, case_of

from ffnkit import methods
from ffnkit.testing import check_family, check_method, check_tuner
from ffnkit.tune import tuners

EVERY: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    **{name: (made, KINDS) for name, made in (METHODS | OTHERS).items()},
    **FURTHER,
}
PAIRS = [(method, family) for method, (_, families) in EVERY.items() for family in families]
FAST = [(name, families[n % len(families)]) for n, (name, (_, families)) in enumerate(EVERY.items())]
TUNED = [(name, family) for name in TUNERS for family in ("bert", "gpt2", "llama", "t5", "albert")]


def test_every_method_and_every_tuner_has_a_line() -> None:
    assert {method.name for method in methods.METHODS} <= set(EVERY)
    assert {tuner.name for tuner in tuners.TUNERS} == set(TUNERS)


@pytest.mark.parametrize(("method", "family"), FAST)
def test_methods_keep_the_contract(method: str, family: str) -> None:
    check_method(EVERY[method][0], case_of(family), dtypes=(torch.float32, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if pair not in FAST])
def test_methods_keep_the_contract_on_every_kind(method: str, family: str) -> None:
    check_method(EVERY[method][0], case_of(family))


@pytest.mark.parametrize("tuner", list(TUNERS))
def test_tuners_keep_the_contract(tuner: str) -> None:
    check_tuner({"name": tuner, **TUNERS[tuner]}, case_of("bert"))


@pytest.mark.slow
@pytest.mark.parametrize(("tuner", "family"), [pair for pair in TUNED if pair[1] != "bert"])
def test_tuners_keep_the_contract_on_every_kind(tuner: str, family: str) -> None:
    check_tuner({"name": tuner, **TUNERS[tuner]}, case_of(family))


@pytest.mark.parametrize("name", KINDS)
def test_families_keep_the_contract(name: str) -> None:
    check_family(case_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in KINDS])
def test_all_families_keep_the_contract(name: str) -> None:
    check_family(case_of(name))
