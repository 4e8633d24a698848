"""Readers of E2E, WebNLG, DART, of plain text, and of the user's own files for generation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ffnkit.errors import FfnkitError
from ffnkit.tasks.generation import sets as nlg
from ffnkit.tasks.generation.data2text import clean, dart_segments, e2e_segments, webnlg_segments
from ffnkit.tasks.language_modelling import sets as language
from ffnkit.tasks.metrics import texts as text_metrics
from ffnkit.tasks.rows.splitting import size

Rows = list[dict[str, Any]]
E2E: Rows = [
    {"meaning_representation": f"name[Inn {n}], area[riverside]", "references": [f"Inn {n}.", f"The Inn {n}."]}
    for n in range(40)
]
WEBNLG: Rows = [
    {"category": "Food", "triples": [f'Dish_{n} | region | "Rome, Italy"'], "refs": [f"Dish {n} is from Rome."]}
    for n in range(40)
]
DART: Rows = [{"tripleset": [[f"Team {n}", "WON_IN", "1990"]], "references": [f"Team {n} won."]} for n in range(40)]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def folder(path: Path, name: str, **splits: Rows) -> Path:
    for split, rows in splits.items():
        write(path / name / f"{split}.jsonl", rows)
    return path


def one_line(error: pytest.ExceptionInfo[FfnkitError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_webnlg_linearisation() -> None:
    segments = webnlg_segments(['Abilene_Airport | cityServed | "Abilene, Texas"', "A | b | C"], "row 1")
    assert " ".join(text for text, _ in segments) == (
        "<bos_webnlg> <subject> Abilene Airport <property> cityServed <object> Abilene, Texas"
        " <subject> A <property> b <object> C <target_webnlg>"
    )
    assert [kind for _, kind in segments] == ["<bos_webnlg>", *["<subject>", "<property>", "<object>"] * 2] + [
        "<target_webnlg>"
    ]
    assert all(text.startswith(kind) for text, kind in segments)
    assert {kind for _, kind in segments} | {nlg.get("webnlg").eos} == set(nlg.get("webnlg").special_tokens)
    assert segments != webnlg_segments(["A | b | C", 'Abilene_Airport | cityServed | "Abilene, Texas"'], "row 1")


def test_other_linearisations() -> None:
    assert e2e_segments("name[The Inn], customer rating[5 out of 5], near[A, B]", "row 1") == [
        ("name: The Inn | customer rating: 5 out of 5 | near: A, B ||", "")
    ]
    assert dart_segments([["A", "WON_IN", "1990"], ["[TABLECONTEXT]", "TITLE", "X"]], "row 1") == [
        ("A : WON IN : 1990 | [TABLECONTEXT] : TITLE : X ||", "")
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [('"Rome, Italy"', "Rome, Italy"), ("A_b__c", "A b c"), ('"a" or "b"', '"a" or "b"'), ('"', '"'), ('""', "")],
)
def test_clean(text: str, wanted: str) -> None:
    assert clean(text) == wanted


@pytest.mark.parametrize(
    ("of", "meaning"),
    [(e2e_segments, "The Inn"), (e2e_segments, "name[a"), (e2e_segments, None), (e2e_segments, "name[a] x")]
    + [
        (webnlg_segments, []),
        (webnlg_segments, ["a | b"]),
        (dart_segments, [["a", "b"]]),
        (dart_segments, [[1, 2, 3]]),
    ],
)
def test_meanings_that_cannot_be_read(of: Any, meaning: Any) -> None:
    with pytest.raises(FfnkitError) as error:
        of(meaning, "file, row 7")
    one_line(error, "row 7")


@pytest.mark.parametrize(
    ("name", "rows"), [("e2e", E2E), ("webnlg", WEBNLG), ("dart", DART)], ids=["e2e", "webnlg", "dart"]
)
def test_splits_of_a_data_folder(tmp_path: Path, name: str, rows: Rows) -> None:
    path = folder(tmp_path, name, train=rows[:30], validation=rows[30:35], test=rows[35:])
    data = nlg.get(name)
    splits = data.splits(path, dev=5)
    assert (size(splits.train), size(splits.dev), size(splits.report)) == (25, 5, 5)
    assert size(splits.extra["test"]) == 5 and str(path) in splits.source
    for table in (splits.train, splits.dev, splits.report, *splits.extra.values()):
        assert set(table) == {"prompt", "references", "segments"}
        assert [" ".join(text for text, _ in each) for each in table["segments"]] == table["prompt"]
    again, other = data.splits(path, dev=5), data.splits(path, dev=5, seed=1)
    assert again.dev == splits.dev != other.dev and other.report == splits.report
    assert all(text_metrics.check(metric) for metric in data.metrics)


def test_the_folder_of_the_environment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFNKIT_DATA", str(folder(tmp_path, "e2e", train=E2E[:20], validation=E2E[20:])))
    assert str(tmp_path) in nlg.get("e2e").splits().source


def test_pairs_are_one_a_reference(tmp_path: Path) -> None:
    rows = [*E2E[:19], {**E2E[19], "references": ["One.", "One.", "Two."]}]
    table = nlg.pairs(nlg.get("e2e").splits(folder(tmp_path, "e2e", train=rows, validation=E2E[20:])).report)
    assert size(table) == 40 and set(table) == {"prompt", "target", "segments"}
    assert nlg.pairs({"prompt": ["p"], "references": [["a", "a", "b"]], "segments": [[("p", "")]]}) == {
        "prompt": ["p", "p"],
        "target": ["a", "b"],
        "segments": [[("p", "")]] * 2,
    }


def test_prompts_of_the_reported_splits_leave_train_and_repeated_ones_are_joined(tmp_path: Path) -> None:
    again = {**WEBNLG[0], "refs": ["Rome has dish 0."]}
    clean_rows = WEBNLG[:30]
    path = folder(
        tmp_path,
        "webnlg",
        train=[*clean_rows, again, WEBNLG[31], WEBNLG[36], WEBNLG[39]],
        validation=WEBNLG[30:35],
        test=WEBNLG[35:],
        test_unseen=WEBNLG[38:],
    )
    splits = nlg.get("webnlg").splits(path, dev=3)
    seen = {*splits.train["prompt"], *splits.dev["prompt"]}
    assert len(seen) == size(splits.train) + size(splits.dev) == 30
    assert not seen & {*splits.report["prompt"], *splits.extra["test"]["prompt"]}
    joined = [several for several in [*splits.train["references"], *splits.dev["references"]] if len(several) == 2]
    assert joined == [["Dish 0 is from Rome.", "Rome has dish 0."]]
    notes = " ".join(splits.notes)
    assert "1 rows joined" in notes and "1 prompts dropped that are in report" in notes
    assert "2 prompts dropped that are in test" in notes
    quiet = nlg.get("webnlg").splits(folder(tmp_path / "b", "webnlg", train=clean_rows, validation=WEBNLG[30:]))
    assert "dropped" not in " ".join(quiet.notes) and "joined" not in " ".join(quiet.notes)


def test_reported_rows_of_e2e_are_joined_and_those_of_webnlg_count_as_they_are(tmp_path: Path) -> None:
    e2e = nlg.get("e2e").splits(folder(tmp_path, "e2e", train=E2E[:30], validation=[*E2E[30:], E2E[30]]))
    webnlg = nlg.get("webnlg").splits(
        folder(tmp_path, "webnlg", train=WEBNLG[:30], validation=[*WEBNLG[30:], WEBNLG[30]])
    )
    assert size(e2e.report) == 10 and size(webnlg.report) == 11


def test_without_a_train_file_all_is_carved_out_of_validation(tmp_path: Path) -> None:
    splits = nlg.get("dart").splits(folder(tmp_path, "dart", validation=DART[:30], test=DART[28:]))
    parts = [set(table["prompt"]) for table in (splits.train, splits.dev, splits.report)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 28
    assert "no train split" in " ".join(splits.notes)


def test_empty_references_are_left_out(tmp_path: Path) -> None:
    rows = [{**DART[30], "references": [None, " ", "Won."]}, {**DART[31], "references": [None]}, *DART[32:]]
    splits = nlg.get("dart").splits(folder(tmp_path, "dart", train=DART[:30], validation=rows))
    assert splits.report["references"][0] == ["Won."] and size(splits.report) == 9
    assert "3 empty references" in " ".join(splits.notes)


def test_limits_hold_and_are_noted(tmp_path: Path) -> None:
    path = folder(tmp_path, "e2e", train=E2E[:30], validation=E2E[30:], test=E2E[35:])
    splits = nlg.get("e2e").splits(path, train_limit=7, dev_limit=2, report_limit=3)
    assert [size(each) for each in (splits.train, splits.dev, splits.report, splits.extra["test"])] == [7, 2, 3, 3]
    assert "train: 7 of" in " ".join(splits.notes)
    with pytest.raises(FfnkitError) as error:
        nlg.get("e2e").splits(path, train_limit=0)
    one_line(error, "limit of train")


def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FfnkitError) as error:
        nlg.get("e2e").splits(tmp_path)
    one_line(error, "no folder e2e", "train.jsonl")
    with pytest.raises(FfnkitError) as error:
        nlg.get("e2e").splits(folder(tmp_path, "e2e", train=E2E))
    one_line(error, "no validation")
    with pytest.raises(FfnkitError) as error:
        nlg.get("e2e").splits(folder(tmp_path, "e2e", train=E2E, validation=[{"mr": "x"}]))
    one_line(error, "'meaning_representation'", "'mr'")
    with pytest.raises(FfnkitError) as error:
        nlg.get("squad")
    one_line(error, "'squad'", "webnlg")


class Hub:
    """Stands for ``load_dataset``: remembers what was asked, and gives tables."""

    def __init__(self, **splits: Rows) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.splits = splits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from datasets import Dataset

        self.asked.append((*args, *sorted(kwargs.items())))
        return {split: Dataset.from_list(rows) for split, rows in self.splits.items()}


def test_webnlg_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FFNKIT_DATA", raising=False)

    def row(n: int) -> dict[str, Any]:
        triples = {"mtriple_set": [[f"Dish_{n} | region | Rome"]]}
        return {"modified_triple_sets": triples, "lex": {"comment": ["good", "bad"], "text": [f"Dish {n}.", "No."]}}

    empty = {"modified_triple_sets": {"mtriple_set": [["a | b | c"]]}, "lex": {"comment": [], "text": []}}
    hub = Hub(train=[row(n) for n in range(20)], dev=[row(n) for n in range(20, 25)], test=[empty])
    monkeypatch.setattr("datasets.load_dataset", hub)
    splits = nlg.get("webnlg").splits(dev=3)
    assert hub.asked[0][:2] == ("webnlg-challenge/web_nlg", "webnlg_challenge_2017")
    assert splits.report["references"][0] == ["Dish 20."] and size(splits.report) == 5 and not splits.extra
    assert "Dish 20" in splits.report["prompt"][0] and "test: left out" in " ".join(splits.notes)


def test_e2e_from_the_hub_has_a_row_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FFNKIT_DATA", raising=False)
    rows = [
        {"meaning_representation": row["meaning_representation"], "human_reference": one}
        for row in E2E
        for one in row["references"]
    ]
    monkeypatch.setattr("datasets.load_dataset", Hub(train=rows[:60], validation=rows[60:]))
    splits = nlg.get("e2e").splits(dev=3)
    assert size(splits.report) == 10 and splits.report["references"][0] == E2E[30]["references"]


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FFNKIT_DATA", raising=False)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", fail)
    for data in (nlg.get("dart"), language.get("wikitext2")):
        with pytest.raises(FfnkitError) as error:
            data.splits()
        one_line(error, data.hub[0], "--data-dir", "FFNKIT_DATA")


def own_rows(count: int = 40) -> Rows:
    return [{"question": f"Who is {n}?", "context": f"{n} is Ann.", "answer": f"Ann {n}"} for n in range(count)]


def test_own_files_with_the_default_template(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", own_rows())
    data = nlg.file_data(path, inputs=["question", "context"], target="answer", metrics=["exact_match", "token_f1"])
    splits = data.splits(dev=4)
    assert size(splits.train) + size(splits.dev) + size(splits.report) == 40
    assert "question: Who is 0? context: 0 is Ann. answer:" in [
        *splits.train["prompt"],
        *splits.dev["prompt"],
        *splits.report["prompt"],
    ]
    assert data.metrics == ("exact_match", "token_f1") and data.eos == "" and not data.special_tokens


def test_own_template_lists_of_targets_and_nested_columns(tmp_path: Path) -> None:
    rows = [{"pair": {"en": f"dog {n}", "de": [f"Hund {n}", "Hund"]}} for n in range(20)]
    train, test = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:2])
    template = "{{en}} {pair.en} =>"
    data = nlg.file_data(train, train, inputs=["pair.en"], target="pair.de", template=template, test=test)
    source = data.load(None)
    assert source.train["prompt"][3] == "{en} dog 3 =>" and source.train["references"][3] == ["Hund 3", "Hund"]
    assert list(source.extra) == ["test"]
    with pytest.raises(FfnkitError) as error:
        data.splits()
    one_line(error, "0 training prompts")


def test_own_csv_and_squad_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,summary\n" + "".join(f'"long, {n}",short {n}\n' for n in range(9)), encoding="utf-8")
    assert (
        nlg.file_data(path, inputs=["text"], target="summary").load(None).train["prompt"][0] == "text: long, 0 summary:"
    )
    squad = write(tmp_path / "s.jsonl", [{"q": f"q{n}", "answers": {"text": ["a", "b"]}} for n in range(9)])
    assert nlg.file_data(squad, inputs=["q"], target="answers").load(None).train["references"][0] == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"inputs": []}, ("inputs none",)),
        ({"inputs": ["answer"]}, ("inputs answer and target answer",)),
        ({"inputs": ["q"]}, ("no column 'q'", "'question'")),
        ({"target": "label"}, ("no column 'label'",)),
        ({"template": "{question}"}, ("leaves out context",)),
        ({"template": "{question} {context} {other}"}, ("names other",)),
        ({"template": "{question} {context"}, ("braces do not match",)),
        ({"template": "{question!r} {context}"}, ("something else",)),
        ({"template": "{question:>9} {context}"}, ("something else",)),
        ({"template": "{} {question} {context}"}, ("something else",)),
        ({"metrics": ["blue"]}, ("'blue'", "bleu")),
        ({"metrics": []}, ("no metric",)),
        ({"max_new_tokens": 0}, ("at most 0 tokens",)),
    ],
)
def test_settings_of_own_files_that_cannot_be_used(tmp_path: Path, settings: Any, parts: tuple[str, ...]) -> None:
    path = write(tmp_path / "qa.jsonl", own_rows())
    with pytest.raises(FfnkitError) as error:
        nlg.file_data(path, **{"inputs": ["question", "context"], "target": "answer", **settings})
    one_line(error, *parts)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"answer": ""}, ("1 of 41 rows", "'answer'", "row 41")),
        ({"answer": []}, ("'answer'",)),
        ({"answer": ["a", " "]}, ("'answer'",)),
        ({"answer": 7}, ("'answer'",)),
        ({"question": 7}, ("no string in 'question'",)),
        ({"question": None}, ("no string in 'question'",)),
        ({"question": " ", "context": ""}, ("no text in 'question', 'context'",)),
    ],
)
def test_rows_of_own_files_that_cannot_be_used(tmp_path: Path, row: Any, parts: tuple[str, ...]) -> None:
    path = write(tmp_path / "qa.jsonl", [*own_rows(), {**own_rows(1)[0], **row}])
    with pytest.raises(FfnkitError) as error:
        nlg.file_data(path, inputs=["question", "context"], target="answer")
    one_line(error, *parts)


def test_one_of_several_inputs_may_be_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", [*own_rows(), {"question": "Why?", "context": "", "answer": "So."}])
    table = nlg.file_data(path, inputs=["question", "context"], target="answer").load(None).train
    assert table["prompt"][-1] == "question: Why? context:  answer:"


def byte_level_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_special_tokens_make_segments_and_prompt_agree(tmp_path: Path) -> None:
    table = nlg.get("webnlg").splits(folder(tmp_path, "webnlg", train=WEBNLG[:30], validation=WEBNLG[30:])).report
    tokenizer = byte_level_tokenizer([row["refs"][0] for row in WEBNLG])

    def agree() -> bool:
        whole = [tokenizer(prompt)["input_ids"] for prompt in table["prompt"]]
        cut = [[i for text, _ in each for i in tokenizer(text)["input_ids"]] for each in table["segments"]]
        return whole == cut

    assert not agree()
    tokens = nlg.get("webnlg").special_tokens
    before = len(tokenizer)
    assert nlg.add_special_tokens(tokenizer, tokens) == 6 == len(tokenizer) - before
    assert nlg.add_special_tokens(tokenizer, tokens) == 0 and nlg.add_special_tokens(tokenizer, ()) == 0
    assert agree()
    ids = tokenizer(table["prompt"][0])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["<bos_webnlg>", "<subject>"]
    assert "<" not in tokenizer.decode(ids, skip_special_tokens=True)


WIKI = (
    " \n = One = \n \n Text of one . \n x \n = 1 k and a nominal = \n y \n"
    " \n = = Part = = \n \n More . \n \n = Two = \n \n Text ."
)


def test_documents_of_wikitext_are_articles_and_make_up_the_file() -> None:
    parts = language.documents(WIKI)
    assert len(parts) == 2 and "".join(parts) == WIKI
    assert parts[1].strip().startswith("= Two =") and "= = Part = =" in parts[0]


def test_documents_of_plain_text_are_parted_by_blank_lines() -> None:
    assert language.documents("a\nb\n\n \nc = d =\n\n= x =\n") == ["a\nb", "c = d =", "= x ="]
    assert language.documents("a\r\nb".replace("\r", "")) == ["a\nb"]


def test_read_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text("text\none\ntwo\n", encoding="utf-8")
    write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}, {"text": None}, {"text": "two"}])
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]', encoding="utf-8")
    for kind in ("txt", "csv", "jsonl", "json"):
        assert language.read_texts(tmp_path / f"a.{kind}") == ["one", "two"]


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write(tmp_path / "a.jsonl", [{"text": 7}])
    for name, part in (
        ("none.txt", "no such file"),
        ("blank.txt", "no text"),
        ("latin.txt", "not UTF-8"),
        ("a.jsonl", "no string in 'text'"),
    ):
        with pytest.raises(FfnkitError) as error:
            language.read_texts(tmp_path / name)
        one_line(error, part)
    with pytest.raises(FfnkitError) as error:
        language.read_texts(tmp_path / "a.jsonl", "story")
    one_line(error, "'story'")
    with pytest.raises(FfnkitError) as error:
        language.get("c4")
    one_line(error, "wikitext2")


def test_own_text_files_are_disjoint(tmp_path: Path) -> None:
    train, report = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text("\n\n".join([*(f"text {n}" for n in range(30)), "text 3", "both"]), encoding="utf-8")
    report.write_text("both\n\nother", encoding="utf-8")
    splits = language.file_data(train, report).splits(dev=4)
    assert (len(splits.train), len(splits.dev), splits.report) == (26, 4, ["both", "other"])
    assert "both" not in splits.train + splits.dev and not set(splits.train) & set(splits.dev)
    assert "1 repeated texts" in " ".join(splits.notes) and "1 texts dropped" in " ".join(splits.notes)
    alone = language.file_data(train).splits(dev=4, train_limit=5)
    assert len(alone.train) == 5 and len(alone.report) >= 1 and not set(alone.report) & set(alone.train + alone.dev)


def test_wikitext_without_train_reports_on_test(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    for split in ("validation", "test"):
        text = "".join(f" \n = {split} {n} = \n \n Text {split} {n} . \n" for n in range(8))
        (tmp_path / "wikitext2" / f"{split}.txt").write_text(text, encoding="utf-8")
    splits = language.get("wikitext2").splits(tmp_path, dev=2)
    assert (len(splits.train), len(splits.dev), len(splits.report)) == (6, 2, 8)
    assert "validation" in splits.train[0] and "test" in splits.report[0] and "no train split" in splits.notes[0]


def test_wikitext_from_the_hub_joins_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FFNKIT_DATA", raising=False)
    lines = [line for n in range(6) for line in ("", f" = Title {n} = \n", "", f" Text {n} . \n")]
    hub = Hub(train=[{"text": line or "\n"} for line in lines], validation=[{"text": " = V = \n"}, {"text": "\n"}])
    monkeypatch.setattr("datasets.load_dataset", hub)
    splits = language.get("wikitext2").splits(dev=1)
    assert len(splits.train) == 5 and len(splits.report) == 1 and hub.asked[0][0] == "Salesforce/wikitext"


needs_data = pytest.mark.skipif("FFNKIT_DATA" not in os.environ, reason="FFNKIT_DATA names no data folder")


@needs_data
@pytest.mark.parametrize(
    ("name", "report", "extra"),
    [
        ("e2e", 547, {"test": 630}),
        ("webnlg", 872, {"test": 1862, "test_unseen": 891, "test_seen": 971}),
        ("dart", 544, {"test": 5097}),
    ],
)
def test_real_data(name: str, report: int, extra: dict[str, int]) -> None:
    splits = nlg.get(name).splits()
    assert size(splits.report) == report and {key: size(table) for key, table in splits.extra.items()} == extra
    known = {prompt for table in (splits.report, *splits.extra.values()) for prompt in table["prompt"]}
    assert not known & {*splits.train["prompt"], *splits.dev["prompt"]}
    assert all(all(one.strip() for one in several) and several for several in splits.train["references"])
    assert size(nlg.pairs(splits.train)) > size(splits.train)


@needs_data
def test_real_texts() -> None:
    # WikiText-2 has 60 articles in validation and 60 in test.
    wiki = language.get("wikitext2").splits()
    assert len(wiki.train) + len(wiki.dev) == 60 and len(wiki.report) == 60
    path = Path(os.environ["FFNKIT_DATA"]) / "wikitext2" / "test.txt"
    assert "".join(wiki.report) == path.read_text(encoding="utf-8")
    assert len(language.get("tinystories").splits().report) == 106


@needs_data
def test_people_agree_with_each_other_on_e2e() -> None:
    table = nlg.get("e2e").splits(report_limit=60).report
    own, others = [each[0] for each in table["references"]], [each[1:] for each in table["references"]]
    wrong = own[1:] + own[:1]
    for name in nlg.get("e2e").metrics:
        assert text_metrics.score(own, others, [name])[name] > 1.3 * text_metrics.score(wrong, others, [name])[name]
