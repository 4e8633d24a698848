"""Counts as people write them: 200k, 1.5m, 200_000."""

from __future__ import annotations

import re
from typing import Any

_TIMES = {"": 1, "k": 1_000, "m": 1_000_000}


def amount(value: Any) -> Any:
    """A count read from such a word; what is no word of the kind comes back as it is.

    Raises:
        ValueError: it comes to no whole number.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([km]?)", value.strip().lower())
    if found is None:
        raise ValueError(f"{value!r} is no count; write 200k, 1m or 200_000")
    count = float(found[1].replace("_", "")) * _TIMES[found[2]]
    if abs(count - round(count)) > 1e-6:
        raise ValueError(f"{value!r} is no whole number")
    return round(count)
