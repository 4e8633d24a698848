"""The NIST score of a corpus, with any number of references an input.

Source: Doddington, Automatic Evaluation of Machine Translation Quality Using N-gram Co-Occurrence Statistics, 2002,
eq. 2 and 3, read as mteval-v13a and the E2E challenge's script do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[str]
_BETA = math.log(0.5) / math.log(1.5) ** 2
"""Makes the length penalty 0.5 where the output has two thirds of the references' average length."""


def nist(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 5) -> float:
    """Sum over n up to ``order`` of matched information per predicted n-gram, times a length penalty; 0 is the worst.

    Matches are clipped by the largest count in one reference. The information of an n-gram, log2(count of its first
    n - 1 words / count of it), is measured on all references together.

    Args:
        predictions: (n,) token lists; empty ones match nothing.
        references: (n,) lists of one or more token lists.
        order: the longest n-grams.

    Differs: where no prediction has as many as n words, the term of n is 0 instead of undefined.
    """
    counts: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(order + 1)]
    for several in references:
        for one in several:
            counts[0][()] += len(one)
            for n in range(1, order + 1):
                counts[n].update(_ngrams(one, n))
    total = 0.0
    for n in range(1, order + 1):
        information, predicted = 0.0, 0
        for output, several in zip(predictions, references, strict=True):
            found = Counter(_ngrams(output, n))
            predicted += found.total()
            limits: Counter[tuple[str, ...]] = Counter()
            for one in several:
                limits |= Counter(_ngrams(one, n))
            for gram, count in (found & limits).items():
                information += count * math.log2(counts[n - 1][gram[:-1]] / counts[n][gram])
        total += information / predicted if predicted else 0.0
    length = sum(len(output) for output in predictions)
    usual = sum(sum(len(one) for one in several) / len(several) for several in references)
    return total * _penalty(length, usual)


def _penalty(length: float, usual: float) -> float:
    if not length or not usual:
        return 0.0
    return math.exp(_BETA * math.log(min(length / usual, 1.0)) ** 2)


def _ngrams(tokens: Tokens, n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
