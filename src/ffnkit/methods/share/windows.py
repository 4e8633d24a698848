"""Windows of adjacent layers: which there are, and which of them costs least."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import nn

from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.targets import ranges

Groups = list[list[FFN]]
Score = Callable[[nn.Module], float] | str  # the name of a task's metric until a task is there


def series(found: list[FFN]) -> Groups:
    """FFNs that stand in one place of successive layers of one stack."""
    rows: dict[tuple[str, str], list[FFN]] = defaultdict(list)
    for ffn in found:
        rows[ffn.stack, re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", ffn.name, count=1)].append(ffn)
    return list(rows.values())


def windows(rows: Groups, lengths: Sequence[int], least: int = 1) -> list[Groups]:
    """Every window of the given length in each series, the same start in all: starts 0 to N - k, both included.

    A series that is too short for a start has its last window there.

    Raises:
        FfnkitError: a length below ``least`` or beyond its series.
    """
    if any(not least <= k <= len(one) for one, k in zip(rows, lengths, strict=True)):
        found = f"there are {', '.join(str(len(one)) for one in rows)} FFNs in a stack"
        raise FfnkitError(f"a window of {max(lengths)} layers", found, f"Give one from {least} to that number")
    starts = max(len(one) - k + 1 for one, k in zip(rows, lengths, strict=True))
    return [
        [one[min(start, len(one) - k) :][:k] for one, k in zip(rows, lengths, strict=True)] for start in range(starts)
    ]


def label(groups: Groups) -> str:
    """A choice of groups in words: "encoder:2-4; decoder:2-4"."""
    parts = []
    for group in groups:
        text = ranges([ffn.layer for ffn in group])
        parts.append(f"{group[0].stack}:{text}" if group[0].stack else text)
    return "; ".join(parts)


def alike(group: Sequence[FFN]) -> bool:
    """Whether FFNs are of one shape, so that one can stand for all."""
    return len(set(map(signature, group))) == 1


def signature(ffn: FFN) -> str:
    """The shape of an FFN in words."""
    bias = "with" if ffn.raw().down_bias is not None else "without"
    return f"{ffn.d} x {ffn.width}{' gated' if ffn.gated else ''} {bias} bias"


def score_name(score: Score | None) -> str | None:
    """What a plan's settings call a score."""
    return score if score is None or isinstance(score, str) else getattr(score, "__name__", type(score).__name__)


def computable(score: Score | None) -> Callable[[nn.Module], float] | None:
    """A score as a function. Raises FfnkitError where it is still the name of a metric."""
    if isinstance(score, str):
        do = "Give a function of the model, or a task: ffnkit.tune.scorer makes one"
        raise FfnkitError(f"score={score}", "the name of a metric alone cannot be computed", do)
    return score


def best(
    model: nn.Module,
    candidates: list[Groups],
    score: Callable[[nn.Module], float] | None,
    edits: Callable[[Groups], list[Edit]],
    proxy: Callable[[Groups], float],
) -> tuple[Groups, dict[str, float]]:
    """The choice with the highest score, and all scores; one choice alone is not scored.

    Args:
        score: of the model with the choice's ``edits``; None takes the ``proxy``, which needs no run.
    """
    from ffnkit.surgery.temporary import temporarily

    if len(candidates) == 1:
        return candidates[0], {}
    scores = []
    for groups in candidates:
        if score is None:
            scores.append(proxy(groups))
            continue
        with temporarily(model, edits(groups)):
            value = float(score(model))
            scores.append(-math.inf if math.isnan(value) else value)  # numbers that overflow are no highest score
    top = max(range(len(candidates)), key=lambda i: scores[i])
    return candidates[top], {label(groups): value for groups, value in zip(candidates, scores, strict=True)}
