"""About what bringing a model to a target takes: what is computed for each FFN, and how many tokens pass the model."""

from __future__ import annotations

import dataclasses

from ffnkit.budget.losses import CURVES, EXPECTED, FEW, MANY
from ffnkit.budget.moves import Space
from ffnkit.budget.refining import TOKENS
from ffnkit.budget.speed import ROUNDS
from ffnkit.budget.speed import TOKENS as TIMED
from ffnkit.methods.expecting import Work, answers
from ffnkit.methods.narrow.calibrated import CalibratedFusion

FISHER = 3 * 4096  # tokens that go through the model and back, as passes
WIDTHS = 3  # at which an FFN is refitted before the choice is made
SEARCHES = 3  # until the FLOPs are found under which a target of time is kept


def works(space: Space, method: CalibratedFusion | None, tokens: int, *, every: bool) -> list[Work]:
    """The work of each FFN, beside passes of the model.

    Args:
        method: how FFNs are fitted in the end; None: in closed form alone. every: two choices are fitted wholly.
    """
    closed = CalibratedFusion(width=1, effort="fast")
    compared = 2 * MANY * 6.0 * answers(space.model)  # the original's answers, a choice's, and those that count
    placed = sum(p.numel() * p.element_size() for ffn in space.found for p in ffn.parameters())  # a choice's weights
    share = max(0.1, space.limit / max(space.whole, 1))
    found = []
    for ffn in space.found:
        width = max(1, round(share * ffn.width))
        parts = [closed.work(ffn, width, min(tokens, CURVES))] * WIDTHS
        if method is not None:
            quick = dataclasses.replace(method, refine=0)
            parts += [quick.work(ffn, width, min(tokens, TOKENS))] * 2
            parts += [method.work(ffn, width, tokens)] * (2 if every else 1)
        added = {f.name: sum(getattr(p, f.name) for p in parts) for f in dataclasses.fields(Work)}
        found.append(Work(**added | {"held": max(part.held for part in parts) + compared + placed}))
    return found


def passed(space: Space, method: CalibratedFusion | None, tokens: int, *, every: bool) -> float:
    """Tokens that pass the whole model, about: single moves through half of it, choices, and the fits' streams."""
    single = FEW * (len(space.joints) + len(space.blocks)) / 2
    total = single + EXPECTED * (FEW + MANY) + min(tokens, CURVES)
    if method is None:
        return total + tokens
    return total + min(FISHER, 3 * tokens) + 2 * (2 * min(tokens, TOKENS) + tokens * (2 if every else 1))


def timed() -> float:
    """The same, of a target of time, beside one of FLOPs: choices are timed, and searched for again."""
    return SEARCHES * 2 * (ROUNDS + 2) * TIMED + (SEARCHES - 1) * EXPECTED / 2 * (FEW + MANY)
