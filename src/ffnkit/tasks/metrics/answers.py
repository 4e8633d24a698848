"""Exact match and token F1 of short answers.

Source: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016, section 6.1; Reddy et
al., CoQA: A Conversational Question Answering Challenge, TACL 2019, section 3, and its evaluation script.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalized prediction is one of the normalized references, else 0."""
    return float(normalized(prediction) in map(normalized, references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of shared tokens over the references; of an answer without tokens, whether both have none."""
    return max(_f1(normalized(prediction).split(), normalized(one).split()) for one in references)


def _f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    shared = (Counter(predicted) & Counter(right)).total()
    return 2 * shared / (len(predicted) + len(right))


def left_out(score: Callable[[str, Sequence[str]], float], prediction: str, references: Sequence[str]) -> float:
    """CoQA's rule for several people's answers: the mean of the scores against all of them but one.

    A person is scored against the others, so that a model must not be scored against one more. Answers that two people
    gave alike stay two. A lone answer is the reference itself.
    """
    if len(references) < 2:
        return score(prediction, references)
    rest = [[*references[:i], *references[i + 1 :]] for i in range(len(references))]
    return sum(score(prediction, several) for several in rest) / len(rest)
