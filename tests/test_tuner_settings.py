"""The settings that a tuner hands to a method have the method's own defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ffnkit.errors import FfnkitError
from ffnkit.tune import get
from ffnkit.tune.tuners import TUNERS

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


LAYERED = [kind.name for kind in TUNERS if "layers" in kind.model_fields]


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (4, "4"),
        ("last:2", "last:2"),
        ([4, 5], [4, 5]),
        (["0-1", 3], ["0-1", 3]),
        (True, None),
        (2.5, None),
        ([2.5], None),
    ],
)
def test_layers_of_a_tuner_are_an_expression_a_number_or_a_list(name: str, given: Any, kept: Any) -> None:
    if kept is None:
        with pytest.raises(FfnkitError, match="layers"):
            get({"name": name, "layers": given})
    else:
        assert get({"name": name, "layers": given}).layers == kept
