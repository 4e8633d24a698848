"""The cheapest choice of one option an item under a budget: a multiple-choice knapsack, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CELLS = 20_000  # of the table; beyond it sizes are rounded up to the budget's CELLS-th part


def cheapest(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For each item the option such that the sizes sum to at most ``budget`` and the costs to the least.

    Exact where budget / (greatest common divisor of all sizes) is at most ``CELLS``, which it is where all FFNs have
    equal neurons. Else sizes are rounded up to a ``CELLS``-th of the budget: the budget is kept all the same, and the
    result is at least as cheap as the best one under a budget that is smaller by one such part an item.

    Args:
        sizes, costs: of each option of each item; whole sizes, of items that have one option at least.

    Raises:
        ValueError: the smallest options are above the budget, or a cost is NaN.
    """
    least = sum(min(options) for options in sizes)
    if least > budget:
        raise ValueError(f"the smallest options sum to {least}, the budget is {budget}")
    if any(math.isnan(cost) for options in costs for cost in options):
        raise ValueError("a cost is NaN")
    unit = math.gcd(*(size for options in sizes for size in options)) or 1
    if budget // unit > CELLS:
        found = _solve(sizes, costs, budget, -(-budget // CELLS))
        if found is not None:
            return found
        return [min(range(len(options)), key=options.__getitem__) for options in sizes]  # only rounding is in the way
    found = _solve(sizes, costs, budget, unit)
    assert found is not None
    return found


def _solve(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int, unit: int
) -> list[int] | None:
    """The options, with sizes rounded up to multiples of ``unit``; None where rounding leaves no choice."""
    cells = budget // unit + 1
    best = np.zeros(cells)  # the least cost of the items so far within so many units
    taken: list[np.ndarray] = []
    for options, prices in zip(sizes, costs, strict=True):
        fresh = np.full(cells, np.inf)
        chosen = np.full(cells, -1, dtype=np.int32)
        for number, (size, price) in enumerate(zip(options, prices, strict=True)):
            need = -(-size // unit)
            if need >= cells:
                continue
            reached = np.full(cells, np.inf)
            reached[need:] = best[: cells - need] + price
            better = reached < fresh
            fresh[better], chosen[better] = reached[better], number
        best = fresh
        taken.append(chosen)
    cell = cells - 1
    if not np.isfinite(best[cell]):
        return None
    picked: list[int] = []
    for options, chosen in zip(reversed(sizes), reversed(taken), strict=True):
        number = int(chosen[cell])
        picked.append(number)
        cell -= -(-options[number] // unit)
    return picked[::-1]
