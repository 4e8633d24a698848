"""One line for each method: its name and an instance with settings that suit the small models of families.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import ffnkit as fk
from ffnkit import methods

METHODS: dict[str, Callable[..., Any]] = {
    "fusion": lambda **more: fk.Fusion(**{"width": 0.5, "seed": 0, "restarts": 1} | more),
}

# The others share everything but the choice of neurons: one family of each kind of FFN shows that.
KINDS = ("bert", "gpt2", "llama", "phi3", "t5", "switch", "mixtral", "llama4", "albert")
OTHERS: dict[str, Callable[..., Any]] = {
    "calibrated-fusion": lambda **more: fk.CalibratedFusion(**{"width": 0.5, "refine": 3} | more),
    "clustering": lambda **more: methods.build("clustering", **{"width": 0.5, "restarts": 1} | more),
    "sketch": lambda **more: methods.build("sketch", **{"width": 0.5, "keep": 3} | more),
    "svd": lambda **more: methods.build("svd", **{"width": 0.5} | more),
    "mmd": lambda **more: methods.build("mmd", **{"width": 0.5, "steps": 3} | more),
    "random": lambda **more: methods.build("random", **{"width": 0.5} | more),
    "magnitude": lambda **more: methods.build("magnitude", **{"width": 0.5} | more),
    "importance": lambda **more: methods.build("importance", **{"width": 0.5} | more),
    "reinit": lambda **more: methods.build("reinit", **{"width": 0.5} | more),
    "unstructured": lambda **more: methods.build("unstructured", **{"width": 0.5} | more),
}


def slow_but(fast: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Names for ``parametrize``; all but the fast ones are for ``make test-slow``."""
    fast, names = set(fast), list(names)
    assert fast <= set(names), f"no such names: {fast - set(names)}"
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def crossed(
    *axes: Iterable[Any], always: Iterable[tuple[Any, ...]] = (), but: Iterable[tuple[Any, ...]] = ()
) -> list[Any]:
    """All combinations for ``parametrize``; each value once or more in the fast ones, the rest for the slow tests.

    ``always`` are fast too, and ``but`` are left out.
    """
    lists = [list(axis) for axis in axes]
    fast = [tuple(values[i % len(values)] for values in lists) for i in range(max(map(len, lists)))]
    fast += always
    cases = [case for case in dict.fromkeys(itertools.product(*lists)) if case not in but]
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]
