"""What ``compress`` says of time and memory: about what a plan takes, before it is made, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ffnkit.cli import console


@contextmanager
def expecting(model: Any, method: Any, data: Any, told: dict[str, Any]) -> Iterator[None]:
    """Say about how long the planning inside the block takes and how much memory; ``told`` gets it, and the truth."""
    from ffnkit.methods.expecting import expected
    from ffnkit.report.measure import peak_memory

    with peak_memory() as peak:
        found = expected(model, method, data)
        whole = peak.before_bytes + int(found.bytes)
        if found.work is not None:
            passes = f" ({found.passes:.0f} s of them passes over the data)" if found.passes >= 1 else ""
            console.say(f"expected: about {_time(found.seconds)}{passes} and {console.megabytes(whole)} of memory")
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
    told |= {
        "expected": {"seconds": found.seconds, "passes": found.passes, "memory": whole},
        "took": {"seconds": taken, "memory": peak.peak_bytes},
    }


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
