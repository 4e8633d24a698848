"""How sure it is that a model keeps a share of a metric: rows are drawn anew, the same ones of both models."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Rows = Mapping[str, np.ndarray]  # what a model gave for each row; of all names the rows are the first axis
Metric = Callable[[Rows], float]
DRAWS, SIDE = 1000, 0.1


def kept_share(value: float, original: float, more: bool) -> float:
    """The share of the original's metric that is kept: above 1 where the model is better. 0 where it has no sense."""
    above, below = (value, original) if more else (original, value)
    return float(above / below) if below > 0 and np.isfinite(above) else 0.0


def least_kept(rows: Rows, original: Rows, metric: Metric, more: bool, *, seed: int = 0) -> float | None:
    """The lower end of the one-sided 90% interval of :func:`kept_share`, by a bootstrap over paired rows.

    None where nothing is known of single rows.
    """
    if not rows or not original:
        return None
    count = len(next(iter(rows.values())))
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        chosen = draw.integers(count, size=count)
        ours, theirs = ({name: value[chosen] for name, value in each.items()} for each in (rows, original))
        found.append(kept_share(metric(ours), metric(theirs), more))
    return float(np.quantile(found, SIDE))
