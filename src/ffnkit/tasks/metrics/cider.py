"""CIDEr-D of a corpus: cosines of tf-idf weighted n-grams, clipped, with a penalty on lengths that differ.

Source: Vedantam, Zitnick, Parikh, CIDEr: Consensus-based Image Description Evaluation, CVPR 2015, section 5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Tokens = Sequence[str]
Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """Weights by n-gram for n = 1, 2, ..., their norms, and the sentence's number of tokens."""

    weights: list[dict[Gram, float]]
    norms: list[float]
    length: int


def cider_d(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 4, sigma: float = 6.0
) -> float:
    """Mean over inputs, references and n of the clipped cosine times exp(-(length difference)^2 / 2 sigma^2), times 10.

    Document frequencies are those of the inputs' references. So a word that all inputs share weighs nothing, and of
    a single input every score is 0.

    Args:
        predictions: (n,) token lists; an empty one scores 0.
        references: (n,) lists of one or more token lists.

    Differs: term frequencies are counts, not shares of the sentence, as in the authors' released code, by which
    figures are reported. No stemming, as there.
    """
    frequency: Counter[Gram] = Counter()
    for several in references:
        frequency.update({gram for one in several for grams in _counts(one, order) for gram in grams})
    log_inputs = math.log(max(len(references), 1))
    total = 0.0
    for output, several in zip(predictions, references, strict=True):
        candidate = _vector(output, frequency, log_inputs, order)
        scores = [_similarity(candidate, _vector(one, frequency, log_inputs, order), sigma) for one in several]
        total += sum(scores) / len(scores)
    return 10.0 * total / len(predictions)


def _counts(tokens: Tokens, order: int) -> list[Counter[Gram]]:
    return [
        Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)) for n in range(1, order + 1)
    ]


def _vector(tokens: Tokens, frequency: Counter[Gram], log_inputs: float, order: int) -> _Vector:
    weights = [
        {gram: count * (log_inputs - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}
        for counts in _counts(tokens, order)
    ]
    norms = [math.sqrt(sum(weight**2 for weight in each.values())) for each in weights]
    return _Vector(weights, norms, len(tokens))


def _similarity(candidate: _Vector, reference: _Vector, sigma: float) -> float:
    total = 0.0
    for own, other, own_norm, other_norm in zip(
        candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True
    ):
        if own_norm and other_norm:
            product = sum(min(weight, other[gram]) * other[gram] for gram, weight in own.items() if gram in other)
            total += product / (own_norm * other_norm)
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * sigma**2))
    return penalty * total / len(candidate.weights)
