"""Metrics of generated text by name: BLEU, chrF, TER, NIST, METEOR, ROUGE, CIDEr-D, COMET, exact match and token F1.

BLEU, chrF and TER are sacrebleu's, METEOR is nltk's, ROUGE is rouge-score's, COMET is that of its authors. All take
whole texts, not tokens, and any number of references an input.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ffnkit.errors import FfnkitError

Score = Callable[..., float]
"""Of predictions, lists of references and, where a metric asks for them, sources."""


@dataclass(frozen=True)
class TextMetric:
    """One figure of a corpus from predictions (n,) and lists of references (n,).

    Attributes:
        score: the figure.
        scale: its worst and best value, in words.
        description: variant, tokens and how several references count.
        greater_is_better: whether more is better.
        reads_sources: whether it looks at what the model read, too.
        ready: raises FfnkitError where something that it needs is not on this machine.
        greatest: the greatest value that it can have; None: there is none.
    """

    score: Score
    scale: str
    description: str
    greater_is_better: bool = True
    reads_sources: bool = False
    ready: Callable[[], object] | None = None
    greatest: float | None = 100.0


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Each metric of ``metrics`` over a whole corpus, on the scale that :data:`METRICS` names.

    Args:
        predictions: (n,) generated texts, detokenized; an empty one counts as a miss.
        references: (n,) lists of one or more right texts; their number may differ by input.
        metrics: names in :data:`METRICS`.
        sources: (n,) what the model read, for metrics that ask for it (COMET).

    Raises:
        FfnkitError: no such metric, no or unequal numbers of predictions and references, an input without a
            reference, something else than strings, or a metric that needs sources without them.
    """
    wanted = [check(name) for name in metrics]
    asked = f"metrics {', '.join(wanted)}"
    if len(predictions) != len(references) or not len(predictions):
        found = f"{len(predictions)} predictions for {len(references)} lists of references"
        raise FfnkitError(asked, found, "Give one prediction for each list of references, and at least one")
    lists = [several for several in references if isinstance(several, Sequence) and not isinstance(several, str)]
    bare = [row for row, several in enumerate(references) if not several]
    if bare or len(lists) < len(references):
        found = f"input {bare[0] + 1} has no reference" if bare else "some references are not in a list"
        raise FfnkitError(asked, found, "Give every input a list of one or more references")
    if not all(isinstance(text, str) for text in (*predictions, *(one for several in lists for one in several))):
        raise FfnkitError(asked, "some predictions or references are not strings", "Decode predictions to text first")
    blind = [name for name in wanted if METRICS[name].reads_sources and len(sources) != len(predictions)]
    if blind:
        found = f"{len(sources)} sources for {len(predictions)} predictions"
        raise FfnkitError(f"metric {blind[0]}", found, "Give what was translated as sources, one for each prediction")
    return {name: float(_scored(METRICS[name], predictions, lists, sources)) for name in wanted}


def _scored(
    metric: TextMetric, predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]
) -> float:
    more = (sources,) if metric.reads_sources else ()
    return metric.score(predictions, references, *more)


def check(name: str) -> str:
    """``name`` if :data:`METRICS` has it and what it needs is here, else FfnkitError."""
    if (ready := _known(name).ready) is not None:
        ready()
    return name


def _known(name: str) -> TextMetric:
    if name not in METRICS:
        raise FfnkitError(f"metric {name!r}", "there is no such metric of text", f"Choose one of {', '.join(METRICS)}")
    return METRICS[name]


def labels(metrics: Sequence[str], references: Sequence[Sequence[str]] = ()) -> dict[str, str]:
    """How each metric is computed, in a line to print beside figures: variant, tokens, scale, sacrebleu's signature.

    The signature names the number of references an input where ``references`` are given and all alike, else "var".
    """
    counts = {len(several) for several in references}
    lines = {}
    for name in metrics:
        metric = _known(name)
        better = "more is better" if metric.greater_is_better else "less is better"
        parts = [metric.description, metric.scale, better]
        if name in _SACREBLEU:
            measure = _sacrebleu(name)
            measure.num_refs = counts.copy().pop() if len(counts) == 1 else -1  # else known only after scoring
            parts.append(f"sacrebleu {measure.get_signature()}")
        elif name == "meteor":
            parts[0] = f"{meteor_variant()}, {parts[0]}"
        lines[name] = "; ".join(parts)
    return lines


def meteor_variant() -> str:
    """ "meteor (exact+stem)", or with "+wordnet" where nltk finds WordNet's data."""
    return "meteor (exact+stem+wordnet)" if _wordnet() is not None else "meteor (exact+stem)"


_SACREBLEU: dict[str, tuple[str, dict[str, Any]]] = {
    "bleu": ("BLEU", {"force": True}),  # force: no warning about texts that look tokenized; the score is the same
    "bleu_lower": ("BLEU", {"force": True, "lowercase": True}),
    "chrf": ("CHRF", {}),
    "ter": ("TER", {}),
}


def _sacrebleu(name: str) -> Any:
    import sacrebleu

    metric, settings = _SACREBLEU[name]
    return getattr(sacrebleu, metric)(**settings)


def _of_sacrebleu(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The corpus score; references go in as streams of one for each input, None where an input has no more."""
    most = max(map(len, references))
    streams = [[several[rank] if rank < len(several) else None for several in references] for rank in range(most)]
    return float(_sacrebleu(name).corpus_score(list(predictions), streams).score)


@functools.cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def tokens(text: str) -> list[str]:
    """mteval-v13a's tokens, in lower case."""
    return str(_tokenizer()(text.lower())).split()


def words(text: str) -> list[str]:
    """:func:`tokens` without those that are punctuation only."""
    return [token for token in tokens(text) if not all(unicodedata.category(mark)[0] == "P" for mark in token)]


def _tokenized(
    split: Callable[[str], list[str]], of: Callable[[list[list[str]], list[list[list[str]]]], float]
) -> Score:
    """A score of tokens as a score of texts."""

    def scored(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        return of([split(text) for text in predictions], [[split(text) for text in several] for several in references])

    return scored


def _nist(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    from ffnkit.tasks.metrics.nist import nist

    return nist(predictions, references)


def _cider(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    from ffnkit.tasks.metrics.cider import cider_d

    return cider_d(predictions, references)


class _Stemmer:
    """nltk's Porter stemmer, every word stemmed once."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = functools.lru_cache(maxsize=2**16)(PorterStemmer().stem)


class _NoSynonyms:
    """In the place of WordNet where its data are not installed."""

    def synsets(self, word: str) -> list[Any]:
        return []


@functools.cache
def _wordnet() -> Any:
    """nltk's WordNet, or None where its data are not on this machine. Nothing is downloaded."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except Exception:  # LookupError without the data, others for data that are damaged
        return None
    return wordnet


def _meteor(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    from nltk.translate.meteor_score import meteor_score

    stemmer, synonyms = _Stemmer(), _wordnet() or _NoSynonyms()
    scores = [
        meteor_score(several, output, stemmer=stemmer, wordnet=synonyms)
        for output, several in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+")


class _RougeTokens:
    """rouge-score's own tokens with stems, every text cut once."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = functools.lru_cache(maxsize=2**16)(DefaultTokenizer(use_stemmer=True).tokenize)


def sentences(text: str) -> str:
    """A text with a sentence a line: cut at line breaks, and after . ! ? with or without closing quotes or brackets."""
    return _SENTENCE_END.sub("\n", text)


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer, cut = RougeScorer([kind], tokenizer=_RougeTokens()), sentences if kind == "rougeLsum" else str
    scores = [
        scorer.score_multi(list(map(cut, several)), cut(output))[kind].fmeasure
        for output, several in zip(predictions, references, strict=True)
    ]
    return 100.0 * sum(scores) / len(scores)


def _mean(of: Callable[[str, Sequence[str]], float], scale: float) -> Score:
    """The mean over inputs of a score of one prediction against its references."""

    def scored(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        return scale * sum(map(of, predictions, references)) / len(predictions)

    return scored


def _exact_match(prediction: str, references: Sequence[str]) -> float:
    from ffnkit.tasks.metrics.answers import exact_match

    return exact_match(prediction, references)


def _token_f1(prediction: str, references: Sequence[str]) -> float:
    from ffnkit.tasks.metrics.answers import token_f1

    return token_f1(prediction, references)


def _coqa_f1(prediction: str, references: Sequence[str]) -> float:
    from ffnkit.tasks.metrics.answers import left_out, token_f1

    return left_out(token_f1, prediction, references)


def _coqa_exact_match(prediction: str, references: Sequence[str]) -> float:
    from ffnkit.tasks.metrics.answers import exact_match, left_out

    return left_out(exact_match, prediction, references)


def _comet_ready() -> object:
    from ffnkit.tasks.metrics.comet import check

    return check()


def _comet(predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> float:
    from ffnkit.tasks.metrics.comet import comet

    return comet(predictions, references, sources)


def _same(prediction: str, references: Sequence[str]) -> float:
    return float(" ".join(prediction.split()) in [" ".join(one.split()) for one in references])


def _rouge_metric(kind: str, what: str) -> TextMetric:
    described = f"F1 of {what}, stemmed, tokens [a-z0-9]+ in lower case, the best reference counts"
    return TextMetric(functools.partial(_rouge, kind), "0 to 100", described)


METRICS: dict[str, TextMetric] = {
    "bleu": TextMetric(
        functools.partial(_of_sacrebleu, "bleu"), "0 to 100", "corpus BLEU-4, case kept, tokens of mteval-v13a"
    ),
    "bleu_lower": TextMetric(
        functools.partial(_of_sacrebleu, "bleu_lower"), "0 to 100", "corpus BLEU-4 in lower case, tokens of mteval-v13a"
    ),
    "nist": TextMetric(
        _tokenized(tokens, _nist), "0 upwards", "NIST-5 in lower case, tokens of mteval-v13a", greatest=None
    ),
    "meteor": TextMetric(
        _tokenized(tokens, _meteor),
        "0 to 1",
        "mean of inputs, parameters of 2007, tokens of mteval-v13a in lower case, the best reference counts",
        greatest=1.0,
    ),
    "rougeL": _rouge_metric("rougeL", "the longest common subsequence"),
    "rouge1": _rouge_metric("rouge1", "words"),
    "rouge2": _rouge_metric("rouge2", "pairs of words"),
    "rougeLsum": _rouge_metric("rougeLsum", "the common subsequences of each sentence, sentence by sentence"),
    "cider": TextMetric(
        _tokenized(words, _cider),
        "0 to 10",
        "CIDEr-D, document frequencies of these references, words of mteval-v13a in lower case without punctuation",
        greatest=10.0,
    ),
    "chrf": TextMetric(
        functools.partial(_of_sacrebleu, "chrf"), "0 to 100", "chrF2 of characters, the best reference counts"
    ),
    "ter": TextMetric(
        functools.partial(_of_sacrebleu, "ter"),
        "0 upwards, 100 is as many edits as the references have words on average",
        "edits a word in lower case, words cut at white space, the closest reference counts",
        greater_is_better=False,
        greatest=None,
    ),
    "exact_match": TextMetric(
        _mean(_exact_match, 100.0),
        "0 to 100",
        "share of answers equal to a reference after SQuAD's normalization (case, punctuation, articles)",
    ),
    "token_f1": TextMetric(
        _mean(_token_f1, 100.0), "0 to 100", "mean F1 of tokens after SQuAD's normalization, the best reference counts"
    ),
    "coqa_f1": TextMetric(
        _mean(_coqa_f1, 100.0),
        "0 to 100",
        "CoQA's F1: each answer of several left out in turn, the best of the others counts, and the mean of these",
    ),
    "coqa_exact_match": TextMetric(
        _mean(_coqa_exact_match, 100.0), "0 to 100", "exact match in the same way as CoQA's F1"
    ),
    "comet": TextMetric(
        _comet,
        "as the model has it, about 0 to 1",
        "COMET of the model that FFNKIT_COMET names, mean of inputs, the best reference counts",
        reads_sources=True,
        ready=_comet_ready,
        greatest=1.0,
    ),
    "accuracy": TextMetric(
        _mean(_same, 1.0), "0 to 1", "share of texts equal to a reference, white space aside", greatest=1.0
    ),
}
"""By name, in the order of the documentation."""
