"""Metrics of generated text: known values, loops from the formulas, and inputs that are empty or odd."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from ffnkit.errors import FfnkitError
from ffnkit.tasks.metrics import greater_is_better
from ffnkit.tasks.metrics import labelled as metrics_of_labels
from ffnkit.tasks.metrics import texts as text_metrics
from ffnkit.tasks.metrics.answers import exact_match, normalized, token_f1
from ffnkit.tasks.metrics.cider import cider_d
from ffnkit.tasks.metrics.nist import nist
from ffnkit.tasks.metrics.texts import METRICS, check, labels, meteor_variant, score, tokens, words

# Papineni et al. 2002, as nltk's documentation has them.
CANDIDATE_1 = "It is a guide to action which ensures that the military always obeys the commands of the party"
CANDIDATE_2 = "It is to insure the troops forever hearing the activity guidebook that party direct"
REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
OWN = [name for name in METRICS if name != "comet"]  # that is of a model which somebody has to name
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "in", "house", "big", "small"]


def corpus(inputs: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Random sentences with one to three references an input."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))

    return [sentence() for _ in range(inputs)], [[sentence() for _ in range(1 + row % 3)] for row in range(inputs)]


def one_line(error: pytest.ExceptionInfo[FfnkitError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.mark.parametrize("name", OWN)
def test_a_perfect_prediction_is_better_than_a_wrong_one_and_order_of_references_does_not_matter(name: str) -> None:
    _, references = corpus(12)
    perfect = [several[-1] for several in references]
    wrong = [several[-1] for several in references[1:] + references[:1]]
    best, worse = (score(each, references, [name])[name] for each in (perfect, wrong))
    assert best > worse if METRICS[name].greater_is_better else best < worse
    turned = [list(reversed(several)) for several in references]
    assert score(wrong, turned, [name])[name] == pytest.approx(worse, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "best"),
    [("bleu", 100), ("bleu_lower", 100), ("chrf", 100), ("ter", 0), ("rougeL", 100), ("rouge1", 100), ("rouge2", 100)]
    + [("exact_match", 100), ("token_f1", 100), ("accuracy", 1)],
)
def test_scale(name: str, best: float) -> None:
    assert score(REFERENCES, [[each] for each in REFERENCES], [name])[name] == pytest.approx(best)


def test_meteor_is_that_of_nltk_s_documentation() -> None:
    value = score([CANDIDATE_1], [REFERENCES[:1]], ["meteor"])["meteor"]
    assert value == pytest.approx(0.6944, abs=5e-5)


def test_bleu_is_that_of_sacrebleu_s_documentation() -> None:
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    system = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    values = score(system, references, ["bleu", "chrf"])
    assert values["bleu"] == pytest.approx(48.530827, abs=1e-5)
    assert score(system[:1], references[:1], ["bleu"])["bleu"] == pytest.approx(100)


def test_rouge_is_that_of_the_package_s_documentation() -> None:
    fox = ["The quick brown dog jumps on the log."], [["The quick brown fox jumps over the lazy dog"]]
    values = score(*fox, ["rouge1", "rougeL"])
    # 6 of 9 and 8 words shared, 5 in order.
    assert values["rouge1"] == pytest.approx(100 * 2 * 6 / 17)
    assert values["rougeL"] == pytest.approx(100 * 2 * 5 / 17)


def test_nist_against_nltk_with_one_reference() -> None:
    from nltk.translate.nist_score import corpus_nist

    predictions, references = corpus(30)
    cut, first = [text.split() for text in predictions], [[several[0].split()] for several in references]
    assert nist(cut, first) == pytest.approx(corpus_nist(first, cut), rel=1e-9)
    for text in (CANDIDATE_1, CANDIDATE_2):
        pieces = [REFERENCES[0].split()]
        assert nist([text.split()], [pieces]) == pytest.approx(corpus_nist([pieces], [text.split()]), rel=1e-9)
    assert nist(cut, first[1:] + first[:1]) != pytest.approx(corpus_nist(first, cut), rel=1e-6)


def nist_loop(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    """Doddington's eq. 2 and 3, one n-gram after the other."""
    everything = [one for several in references for one in several]

    def occurs(gram: list[str], text: list[str]) -> int:
        return sum(text[start : start + len(gram)] == gram for start in range(len(text) - len(gram) + 1))

    def information(gram: list[str]) -> float:
        shorter = sum(map(len, everything)) if len(gram) == 1 else sum(occurs(gram[:-1], one) for one in everything)
        return math.log2(shorter / sum(occurs(gram, one) for one in everything))

    total = 0.0
    for n in range(1, 6):
        matched, predicted = 0.0, 0
        for output, several in zip(predictions, references, strict=True):
            grams = [output[start : start + n] for start in range(len(output) - n + 1)]
            predicted += len(grams)
            for gram in {tuple(each): each for each in grams}.values():
                hits = min(occurs(gram, output), max(occurs(gram, one) for one in several))
                matched += hits * information(gram) if hits else 0.0
        total += matched / predicted if predicted else 0.0
    ratio = sum(map(len, predictions)) / sum(sum(map(len, several)) / len(several) for several in references)
    return total * math.exp(-math.log(2) / math.log(1.5) ** 2 * math.log(min(1.0, ratio)) ** 2)


def test_nist_with_many_references_against_a_loop() -> None:
    predictions, references = corpus(15, seed=1)
    cut, lists = (
        [text.split()[:4] for text in predictions],
        [[one.split() for one in several] for several in references],
    )
    assert nist(cut, lists) == pytest.approx(nist_loop(cut, lists), rel=1e-12)
    twice = [several + several[:1] for several in lists]
    assert nist(cut, twice) != pytest.approx(nist_loop(cut, lists), rel=1e-6)


def test_nist_s_length_penalty_halves_at_two_thirds() -> None:
    reference = [f"w{number}" for number in range(9)]
    whole, short = nist([reference], [[reference]], order=1), nist([reference[:6]], [[reference]], order=1)
    assert short == pytest.approx(whole / 2)


def cider_loop(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    """Equations of section 5 with counts as term frequencies, over the whole vocabulary of n-grams."""

    def count(gram: tuple[str, ...], text: list[str]) -> int:
        return sum(tuple(text[start : start + len(gram)]) == gram for start in range(len(text) - len(gram) + 1))

    total = 0.0
    for output, several in zip(predictions, references, strict=True):
        for n in range(1, 5):
            texts = [output, *(one for each in references for one in each)]
            grams = {tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)}
            weight = {
                gram: math.log(len(references))
                - math.log(max(1, sum(any(count(gram, one) for one in each) for each in references)))
                for gram in grams
            }
            for one in several:
                own = {gram: count(gram, output) * weight[gram] for gram in grams}
                other = {gram: count(gram, one) * weight[gram] for gram in grams}
                norm = math.sqrt(sum(v**2 for v in own.values()) * sum(v**2 for v in other.values()))
                if norm:
                    product = sum(min(own[gram], other[gram]) * other[gram] for gram in grams)
                    length = math.exp(-((len(output) - len(one)) ** 2) / (2 * 6.0**2))
                    total += length * product / norm / len(several) / 4
    return 10 * total / len(predictions)


def test_cider_against_a_loop_from_the_formula() -> None:
    predictions, references = corpus(10, seed=2)
    cut, lists = [text.split() for text in predictions], [[one.split() for one in several] for several in references]
    assert cider_d(cut, lists) == pytest.approx(cider_loop(cut, lists), rel=1e-12)
    assert cider_d(cut, lists, sigma=1.0) != pytest.approx(cider_loop(cut, lists), rel=1e-3)


def test_cider_by_hand() -> None:
    # Two inputs, so a word of one weighs log 2. Input 1: orders 1 and 2 match, 3 and 4 have no n-grams: 10 (1 + 1)/4.
    # Input 2: cosine of (c, e) and (c, d) is 1/2, order 2 does not match: 10 (1/2)/4.
    references = [[["a", "b"]], [["c", "d"]]]
    assert cider_d([["a", "b"], ["c", "e"]], references) == pytest.approx((5 + 1.25) / 2)
    # A third word in input 1: of 3 and of 2 pairs, cosines 2/sqrt(6) and 1/sqrt(2); lengths differ by one.
    longer = 10 * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert cider_d([["a", "b", "x"], ["c", "e"]], references) == pytest.approx((longer + 1.25) / 2)


def test_cider_is_that_of_the_released_code() -> None:
    # The value is that of pycocoevalcap 1.2 on the same tokens.
    predictions = ["a man rides a horse on the beach", "two dogs play with a red ball", "a plate of food on a table"]
    references = [
        ["a man riding a horse on a beach", "a person rides a brown horse by the sea"],
        ["two dogs are playing with a ball", "dogs play in the grass", "two brown dogs play with a red ball"],
        ["a plate of food sits on a wooden table"],
    ]
    assert score(predictions, references, ["cider"])["cider"] == pytest.approx(3.596838440826833, rel=1e-9)


def test_meteor_says_which_matches_it_made() -> None:
    assert meteor_variant() in ("meteor (exact+stem)", "meteor (exact+stem+wordnet)")
    assert meteor_variant() in labels(["meteor"])["meteor"]
    # Stems match, and a synonym does not without WordNet.
    stem, same, other = (
        score([text], [["the dogs"]], ["meteor"])["meteor"] for text in ("the dog", "the dogs", "the x")
    )
    assert stem == same > other


def test_several_references_count_as_the_best_one() -> None:
    for name in ("meteor", "rougeL", "rouge1", "rouge2", "chrf", "exact_match", "token_f1", "accuracy"):
        alone = [score(["the big cat sat"], [[one]], [name])[name] for one in ("a dog", "the big cat ran")]
        assert score(["the big cat sat"], [["a dog", "the big cat ran"]], [name])[name] == pytest.approx(max(alone))


def test_squad_normalization() -> None:
    assert normalized("The  Cat's, an EAGLE!") == "cats eagle"
    assert exact_match("the Eiffel Tower.", ["Eiffel tower", "Paris"]) == 1.0
    assert exact_match("Eiffel", ["Eiffel tower", "Paris"]) == 0.0
    assert token_f1("the red Eiffel tower", ["Paris", "Eiffel tower"]) == pytest.approx(2 * 2 / 5)
    assert token_f1("", [""]) == 1.0 and token_f1("", ["Paris"]) == 0.0 and token_f1("a", ["an"]) == 1.0


@pytest.mark.parametrize("name", OWN)
def test_empty_predictions_score_as_a_miss(name: str) -> None:
    references = [["the cat sat on the mat"], ["one big dog ran", "the big dog ran"]]
    value = score(["", ""], references, [name])[name]
    assert value == (100.0 if name == "ter" else 0.0)
    part = score(["the cat sat on the mat", ""], references, [name])[name]
    assert math.isfinite(part) and (part > value if METRICS[name].greater_is_better else part < value)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("text", ["   ", "!?", "...", "日本語", "\n", "x" * 3000, "\N{PILE OF POO}", "<unk>"])
def test_odd_texts_do_not_crash(name: str, text: str) -> None:
    assert math.isfinite(score([text, "a cat"], [["a b", text], ["a cat"]], [name])[name])
    assert math.isfinite(score(["a b"], [[""]], [name])[name])


def test_errors_are_one_line() -> None:
    with pytest.raises(FfnkitError) as error:
        score(["a"], [["a"]], ["blue"])
    one_line(error, "'blue'", "bleu")
    for predictions, references, part in (
        ([], [], "0 predictions"),
        (["a"], [["a"], ["b"]], "1 predictions for 2"),
        (["a", "b"], [["a"], []], "input 2 has no reference"),
        (["a"], ["a"], "not in a list"),
        ([None], [["a"]], "not strings"),
        (["a"], [[None]], "not strings"),
    ):
        with pytest.raises(FfnkitError) as error:
            score(predictions, references, ["bleu"])  # type: ignore[arg-type]
        one_line(error, part)


def test_labels_name_variant_scale_and_signature() -> None:
    lines = labels(list(METRICS), [["a", "b"], ["c", "d"]])
    assert list(lines) == list(METRICS)
    assert (
        "nrefs:2|case:mixed" in lines["bleu"] and "tok:13a" in lines["bleu"] and "nrefs:var" in labels(["ter"])["ter"]
    )
    assert "less is better" in lines["ter"] and all("\n" not in line for line in lines.values())


def test_the_signature_is_that_of_the_score() -> None:
    import sacrebleu

    metric = sacrebleu.BLEU(force=True)
    metric.corpus_score(["a b c"], [["a b c"], ["d"]])
    assert str(metric.get_signature()) in labels(["bleu"], [["a b c", "d"]])["bleu"]


def test_which_direction_is_better_is_known_of_every_metric() -> None:
    better = greater_is_better
    assert not any(map(better, ("ter", "loss", "perplexity", "mse")))
    assert all(map(better, ("bleu", "accuracy", "f1", "cider", "meteor", "pearson")))
    shared = set(METRICS) & set(metrics_of_labels.METRICS)
    assert all(METRICS[name].greater_is_better == metrics_of_labels.METRICS[name].greater_is_better for name in shared)
    assert check("bleu") == "bleu"


def test_tokens_and_words() -> None:
    assert tokens("The Mill, 5.5 (Café).") == ["the", "mill", ",", "5.5", "(", "café", ")", "."]
    assert words("The Mill, 5.5 (Café) -- £30.") == ["the", "mill", "5.5", "café", "£30"]
    assert Counter(tokens("it's A.B.")) == Counter(["it's", "a", ".", "b", "."])


def test_scores_do_not_depend_on_the_global_state() -> None:
    predictions, references = corpus(8, seed=3)
    first = score(predictions, references, OWN)
    text_metrics._tokenizer.cache_clear()
    assert score(predictions, references, OWN) == first
