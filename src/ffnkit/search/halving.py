"""Which candidates go on: those of the front of size and quality, from the place on where the quality is just kept.

Successive halving with several aims, as in MO-ASHA (Schmucker et al., arXiv 2106.12639): promoted by non-dominated
sorting. Where it begins is our own: of interest is the smallest model that keeps enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Point = tuple[float, float]  # size, and loss: less is better of both


def fronts(points: Mapping[int, Point]) -> list[list[int]]:
    """The names in layers: the first holds those that no other beats in both, the next those of the rest, by size."""
    left, found = dict(points), []
    while left:
        front = [name for name, own in left.items() if not any(_beats(other, own) for other in left.values())]
        found.append(sorted(front, key=lambda name: (left[name][0], name)))
        left = {name: point for name, point in left.items() if name not in front}
    return found


def _beats(other: Point, own: Point) -> bool:
    return other[0] <= own[0] and other[1] <= own[1] and other != own


def spread(points: Mapping[int, Point], count: int) -> list[int]:
    """So many names from the first fronts, of the last one that is reached evenly by size."""
    chosen: list[int] = []
    for front in fronts(points):
        room = count - len(chosen)
        if len(front) > room:
            step = (len(front) - 1) / max(room - 1, 1)
            front = [front[round(number * step)] for number in range(room)] if room else []
        chosen += front
    return chosen


def promoted(points: Mapping[int, Point], most: float, count: int) -> list[int]:
    """So many names of those that lose up to ``most``, or nearly.

    Of each front the smallest that keeps enough comes first, then, since tuning goes on, two smaller ones for each
    larger one.
    """
    chosen: list[int] = []
    for front in fronts(points):
        if len(chosen) == count:
            break
        bound = next((place for place, name in enumerate(front) if points[name][1] <= most), len(front) - 1)
        chosen += _outward(front, bound)[: count - len(chosen)]
    return chosen


def _outward(front: Sequence[int], bound: int) -> list[int]:
    below, above = list(front[:bound][::-1]), list(front[bound + 1 :])
    found = [front[bound]]
    while below or above:
        found += below[:2] + above[:1]
        below, above = below[2:], above[1:]
    return found
