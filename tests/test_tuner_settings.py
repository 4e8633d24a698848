"""The settings that a tuner hands to a method have the method's own defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ffnkit.tune import get

OTHER = {"mask": {"basis", "choose"}, "meprop": {"basis", "selection"}}  # what makes the tuner another one


def differing(made: Any, own: set[str]) -> dict[str, tuple[Any, Any]]:
    """Settings of a method that are not its defaults, beside those that are meant to differ."""
    plain = type(made)()
    pairs = {f.name: (getattr(made, f.name), getattr(plain, f.name)) for f in dataclasses.fields(made)}
    return {n: pair for n, pair in pairs.items() if n not in own and _plain(pair[0]) != _plain(pair[1])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", ["sparsegrad", "dsee", "mask", "meprop"])
def test_defaults_are_the_methods(name: str) -> None:
    assert differing(get(name).method, OTHER.get(name, set())) == {}


def test_another_default_is_found() -> None:
    assert set(differing(get({"name": "dsee", "rank": 3}).method, set())) == {"rank"}
