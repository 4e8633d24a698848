"""One line for each method: its name and an instance with settings that suit the small models of families.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ffnkit as fk

METHODS: dict[str, Callable[..., Any]] = {
    "fusion": lambda **more: fk.Fusion(**{"width": 0.5, "seed": 0, "restarts": 1} | more),
}
