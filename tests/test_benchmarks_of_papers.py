"""What the papers' tables need beside the tasks: CoQA, WebNLG's columns, rougeLsum, COMET, GLUE's score and server."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_across import row, run_of
from test_nlg import WEBNLG, folder, one_line
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
from typer.testing import CliRunner

from ffnkit import tasks
from ffnkit.cli.program import app
from ffnkit.errors import FfnkitError
from ffnkit.report.across import across
from ffnkit.tasks.classification import glue_server
from ffnkit.tasks.classification.glue import TASKS, benchmark_score
from ffnkit.tasks.generation import sets as nlg
from ffnkit.tasks.metrics import texts as text_metrics
from ffnkit.tasks.metrics.answers import normalized
from ffnkit.tasks.metrics.texts import score
from ffnkit.tasks.rows.splitting import size

# --- CoQA -------------------------------------------------------------------------------------------------------------


def official(answers: list[str], said: str) -> tuple[float, float]:
    """F1 and exact match of a turn as CoQA's evaluation script has them, written out."""

    def f1(gold: str) -> float:
        gold_tokens, tokens = normalized(gold).split(), normalized(said).split()
        same = sum((Counter(gold_tokens) & Counter(tokens)).values())
        if not gold_tokens or not tokens:
            return float(gold_tokens == tokens)
        if not same:
            return 0.0
        precision, recall = same / len(tokens), same / len(gold_tokens)
        return 2 * precision * recall / (precision + recall)

    def exact(gold: str) -> float:
        return float(normalized(gold) == normalized(said))

    if len(answers) == 1:
        return f1(answers[0]), exact(answers[0])
    sums = [0.0, 0.0]
    for left_out in range(len(answers)):
        rest = answers[:left_out] + answers[left_out + 1 :]
        sums = [sums[0] + max(map(f1, rest)), sums[1] + max(map(exact, rest))]
    return sums[0] / len(answers), sums[1] / len(answers)


TURNS = [
    (["white", "white", "a white cat", "it was white"], "White."),
    (["in a barn", "barn", "the farm", "unknown"], "the barn"),
    (["no"], "No"),
    (["", "nothing"], ""),
    (["two men", "two men"], "two women"),
    (["red", "blue"], "red"),
]


def test_coqa_f1_leaves_each_person_out_in_turn() -> None:
    said, answers = [text for _, text in TURNS], [several for several, _ in TURNS]
    found = score(said, answers, ["coqa_f1", "coqa_exact_match"])
    wanted = np.mean([official(several, text) for several, text in TURNS], axis=0) * 100
    assert [found["coqa_f1"], found["coqa_exact_match"]] == pytest.approx(list(wanted))
    assert score(["red"], [["red", "blue"]], ["coqa_f1"])["coqa_f1"] == pytest.approx(50)  # against one of the two
    assert score(["red"], [["red", "blue"]], ["token_f1"])["token_f1"] == 100  # the control: the best of all
    assert score(["red"], [["red", "red", "blue"]], ["coqa_f1"])["coqa_f1"] == 100  # answers that agree stay two


def story(number: int, people: int = 1) -> dict[str, Any]:
    turns = range(1, 4)
    said = [{"input_text": f"Answer {turn}", "turn_id": turn, "span_text": "x"} for turn in turns]
    made = {
        "story": f"Story {number} about a cat.\n",
        "questions": [{"input_text": f"What {number}.{turn}?", "turn_id": turn} for turn in turns],
        "answers": said,
    }
    others = {str(i): [{**each, "input_text": f"Other {i}"} for each in said] for i in range(people - 1)}
    return made | ({"additional_answers": others} if others else {})


def test_coqa_reads_the_official_files_and_keeps_stories_together(tmp_path: Path) -> None:
    (tmp_path / "coqa").mkdir()
    for name, rows in {"train": [story(n) for n in range(20)], "dev": [story(n, 4) for n in range(90, 93)]}.items():
        (tmp_path / "coqa" / f"coqa-{name}-v1.0.json").write_text(json.dumps({"version": "1.0", "data": rows}))
    splits = nlg.get("coqa").splits(tmp_path, dev=7)
    assert splits.report["prompt"][2] == (
        "Story 90 about a cat.\n\nQ: What 90.1?\nA: Answer 1\nQ: What 90.2?\nA: Answer 2\nQ: What 90.3?\nA:"
    )
    assert splits.report["references"][0] == ["Answer 1", "Other 0", "Other 1", "Other 2"]
    assert size(splits.dev) == 9 and size(splits.train) == 51  # whole stories, 7 rows or more
    assert not set(splits.train["story"]) & set(splits.dev["story"])
    assert not any("one answer" in note for note in splits.notes)
    prompts = tasks.get("coqa").splits(tmp_path, dev=7).report["prompt"]
    assert prompts == splits.report["prompt"]


def test_coqa_in_the_hub_s_form_says_that_one_answer_is_not_the_official_f1(tmp_path: Path) -> None:
    def flat(number: int) -> dict[str, Any]:
        plain = story(number)
        texts = {name: [each["input_text"] for each in plain[name]] for name in ("questions", "answers")}
        return {**plain, "questions": texts["questions"], "answers": {"input_text": texts["answers"]}}

    rows = {"train": [flat(n) for n in range(9)], "validation": [flat(n) for n in range(9, 12)]}
    splits = nlg.get("coqa").splits(folder(tmp_path, "coqa", **rows))
    assert splits.report["references"][0] == ["Answer 1"] and any("one answer" in note for note in splits.notes)
    rows["train"][2]["answers"]["input_text"].pop()
    with pytest.raises(FfnkitError) as error:
        nlg.get("coqa").splits(folder(tmp_path / "b", "coqa", **rows))
    one_line(error, "story 3", "3 questions and 2 answers")


# --- WebNLG -----------------------------------------------------------------------------------------------------------


def test_webnlg_has_columns_for_seen_unseen_and_all(tmp_path: Path) -> None:
    rows = [{**each, "category": "Food" if n % 2 else "Artist"} for n, each in enumerate(WEBNLG[30:])]
    splits = {"train": WEBNLG[:25], "validation": WEBNLG[25:30], "test": rows}
    found = nlg.get("webnlg").splits(folder(tmp_path, "webnlg", **splits)).extra
    assert {name: size(table) for name, table in found.items()} == {"test": 10, "test_seen": 5, "test_unseen": 5}
    assert sorted(found["test_seen"]["prompt"] + found["test_unseen"]["prompt"]) == sorted(found["test"]["prompt"])
    assert found["test_seen"]["prompt"][0] == found["test"]["prompt"][1]
    own = nlg.get("webnlg").splits(folder(tmp_path / "b", "webnlg", **splits, test_unseen=rows[:2])).extra
    assert size(own["test_unseen"]) == 2  # a file of its own is taken as it is
    bare = [{k: v for k, v in each.items() if k != "category"} for each in rows]
    plain = nlg.get("webnlg").splits(folder(tmp_path / "c", "webnlg", **{**splits, "test": bare})).extra
    assert set(plain) == {"test"}


# --- ROUGE-Lsum -------------------------------------------------------------------------------------------------------


def test_rouge_lsum_is_that_of_sentences_on_lines() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    said = 'The cat sat. "It slept!" A dog ran away'
    right = ["A dog ran. The cat sat down (it slept.) Nobody came", "The dog\nran."]
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    lined = ["A dog ran.\nThe cat sat down (it slept.)\nNobody came", "The dog\nran."]
    wanted = 100 * scorer.score_multi(lined, 'The cat sat.\n"It slept!"\nA dog ran away')["rougeLsum"].fmeasure
    found = score([said], [right], ["rougeLsum", "rougeL"])
    assert found["rougeLsum"] == pytest.approx(wanted) and found["rougeLsum"] > found["rougeL"] + 10
    assert text_metrics.sentences("Mr. X is 3.5 m.  He left") == "Mr.\nX is 3.5 m.\nHe left"


# --- COMET ------------------------------------------------------------------------------------------------------------

FAKE = """#!{python}
import json, os, sys
given = sys.argv[1:]
files = {{n: open(given[given.index('-' + n) + 1]).read().splitlines() for n in 'str'}}
model = given[given.index('--model') + 1]
if 'broken' in model:
    sys.exit('RuntimeError: no such model')
columns = (files[n] for n in 'str')
rows = [dict(src=s, mt=t, ref=r, COMET=(s == 'S ' + t) / 2 + (t == r) / 2) for s, t, r in zip(*columns)]
json.dump({{'t': rows}}, open(given[given.index('--to_json') + 1], 'w'))
told = [model, os.environ.get('HF_HUB_OFFLINE'), os.environ.get('PYTHONPATH')]
open(os.environ['SEEN'], 'a').write(json.dumps(told) + '\\n')
"""


@pytest.fixture
def comet_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in the place of COMET's own."""
    command = tmp_path / "comet-score"
    command.write_text(FAKE.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("FFNKIT_COMET_SCORE", str(command))
    monkeypatch.setenv("FFNKIT_COMET", "Unbabel/wmt22-comet-da")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return command


def test_comet_is_asked_for_each_reference_and_the_best_counts(comet_score: Path, tmp_path: Path) -> None:
    found = score(["a b", "c"], [["x", "a  b"], ["y"]], ["comet"], sources=["S a\nb", "no"])
    assert found["comet"] == pytest.approx((1.0 + 0.0) / 2)
    assert json.loads((tmp_path / "seen").read_text())[0] == "Unbabel/wmt22-comet-da"
    with pytest.raises(FfnkitError) as error:
        score(["a"], [["b"]], ["comet"])
    one_line(error, "comet", "0 sources for 1 predictions")


def test_comet_loads_nothing_that_nobody_named(comet_score: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FFNKIT_COMET", "broken")
    with pytest.raises(FfnkitError) as error:
        score(["a"], [["b"]], ["comet"], sources=["s"])
    one_line(error, "comet-score failed", "no such model")
    for value, said in ((str(tmp_path / "no.ckpt"), "no such file"), ("", "no model is named")):
        monkeypatch.setenv("FFNKIT_COMET", value)
        with pytest.raises(FfnkitError) as error:
            tasks.get("multi30k").with_metrics(["comet", "bleu"])  # before anything is trained
        one_line(error, "metric comet", said)
    monkeypatch.setenv("FFNKIT_COMET", "a-model")
    monkeypatch.setenv("FFNKIT_COMET_SCORE", "no-such-comet-score")
    with pytest.raises(FfnkitError) as error:
        text_metrics.check("comet")
    one_line(error, "no command no-such-comet-score", "environment of its own")
    assert not (tmp_path / "seen").exists()


# --- GLUE -------------------------------------------------------------------------------------------------------------

GLUE = {
    "cola": {"matthews": 0.6, "accuracy": 0.9},
    "sst2": {"accuracy": 0.9},
    "mrpc": {"accuracy": 0.8, "f1": 0.9},
    "stsb": {"pearson": 0.9, "spearman": 0.8},
    "qqp": {"accuracy": 0.9, "f1": 0.7},
    "mnli": {"accuracy": 0.8, "accuracy (mismatched)": 0.9},
    "qnli": {"accuracy": 0.9},
    "rte": {"accuracy": 0.7},
    "wnli": {"accuracy": 0.5},
}
SCORES = [0.6, 0.9, 0.85, 0.85, 0.8, 0.85, 0.9, 0.7, 0.5]


def test_the_score_of_glue_is_that_of_the_benchmark() -> None:
    assert benchmark_score(GLUE) == pytest.approx(sum(SCORES) / 9)
    assert benchmark_score({"mnli": {"accuracy": 0.8}}) == 0.8  # data without the mismatched rows
    for metrics, said in (
        ({"mrpc": {"accuracy": 0.8}}, "mrpc has not accuracy and f1"),
        ({"e2e": {}}, "e2e"),
        ({}, "no task"),
    ):
        with pytest.raises(FfnkitError, match=said):
            benchmark_score(metrics)


def test_a_table_over_glue_has_its_score_beside_the_average(tmp_path: Path) -> None:
    runs = []
    for task in TASKS:
        rows = [row("full", 0, 0.0) | {"metrics": GLUE[task.name]}]
        rows += [row("lora", 0, 0.0) | {"metrics": {**GLUE[task.name], "f1": None}}]
        runs.append(run_of(tmp_path / task.name, task.name, rows, task.main_metric))
    found = across(runs)
    full, lora = found.rows
    assert full["metrics"]["glue"] == pytest.approx(sum(SCORES) / 9)
    assert full["metrics"]["average"] == pytest.approx(np.mean([GLUE[t.name][t.main_metric] for t in TASKS]))
    assert found.metric == "average" and "glue" not in lora["metrics"]
    assert any("over 9 of its 9 tasks; of mrpc, qqp, stsb, mnli" in note for note in found.notes)
    other = run_of(tmp_path / "e2e", "e2e", [row("full", 0, 9.0, "bleu")], "bleu")
    assert "glue" not in across([runs[0], other]).rows[0]["metrics"]
    assert "glue" not in across(runs[:1]).rows[0]["metrics"]


MNLI = [{"premise": f"w{n % 7} w{n % 5}", "hypothesis": f"w{n % 3}"} for n in range(12)]


@pytest.fixture(scope="module")
def judge_of_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head for MNLI."""
    path = tmp_path_factory.mktemp("glue") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(7))]
    torch.manual_seed(0)
    names = dict(enumerate(tasks.get("mnli").label_names))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        initializer_range=2.0, id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return path


def test_predictions_for_the_test_server(judge_of_pairs: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{**each, "label": -1, "idx": n} for n, each in enumerate(MNLI)]
    data = folder(tmp_path / "data", "mnli", test_matched=rows[::-1], test_mismatched=rows[:5])
    folder(data, "ax", test=MNLI[:3])
    out = tmp_path / "out"
    given = ["--task", "mnli", "--data-dir", str(data), "--split", "test", "--predictions", str(out), "--json"]
    done = CliRunner().invoke(app, ["eval", str(judge_of_pairs), *given])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == {"MNLI-m.tsv": 12, "MNLI-mm.tsv": 5, "AX.tsv": 3}
    tokenizer = BertTokenizer.from_pretrained(judge_of_pairs)
    model = BertForSequenceClassification.from_pretrained(judge_of_pairs).eval()
    with torch.no_grad():
        ids = [int(model(**tokenizer(*each.values(), return_tensors="pt")).logits.argmax()) for each in MNLI]
    assert len(set(ids)) > 1
    names = [tasks.get("mnli").label_names[i] for i in ids]
    for file, count in (("MNLI-m.tsv", 12), ("MNLI-mm.tsv", 5), ("AX.tsv", 3)):
        lines = [f"{n}\t{name}" for n, name in enumerate(names[:count])]  # by idx, however the file had them
        assert (out / file).read_text().splitlines() == ["index\tprediction", *lines]


def test_what_the_server_is_not_given(judge_of_pairs: Path, tmp_path: Path) -> None:
    data = folder(tmp_path, "mnli", test_matched=MNLI)
    for more, said in (
        (["--task", "e2e"], "no task of GLUE"),
        (["--task", "mnli"], "--predictions FOLDER"),
        (["--task", "mnli", "--predictions", str(tmp_path / "o"), "--limit", "3"], "wants every row"),
        (["--task", "mnli", "--predictions", str(tmp_path / "o")], "test_mismatched.jsonl is not there"),
    ):
        done = CliRunner().invoke(app, ["eval", str(judge_of_pairs), "--split", "test", "--data-dir", str(data), *more])
        assert done.exit_code == 2 and said in done.output + str(done.exception), (said, done.output)


def test_answers_are_written_as_the_server_reads_them() -> None:
    outputs = np.array([[0.1, 0.9], [2.0, 1.0]])
    assert glue_server.answers_of(tasks.get("rte"), outputs) == ["not_entailment", "entailment"]
    assert glue_server.answers_of(tasks.get("wnli"), outputs) == ["1", "0"]
    assert glue_server.answers_of(tasks.get("stsb"), np.array([[5.3], [-0.2], [2.0]])) == ["5.000", "0.000", "2.000"]
    files = {file for each in glue_server.FILES.values() for file in each}
    assert len(files) == 11 and set(glue_server.FILES) == {task.name for task in TASKS}


@pytest.mark.skipif("FFNKIT_DATA" not in os.environ, reason="FFNKIT_DATA names no data folder")
def test_the_real_seen_and_unseen_rows() -> None:
    extra = nlg.get("webnlg").splits().extra
    seen, unseen = set(extra["test_seen"]["prompt"]), set(extra["test_unseen"]["prompt"])
    assert size(extra["test_seen"]) == 971 and not seen & unseen
    assert seen | unseen == set(extra["test"]["prompt"])


def test_comet_stays_offline_for_a_file(comet_score: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "model.ckpt").touch()
    for model in (str(tmp_path / "model.ckpt"), "Unbabel/wmt22-comet-da"):
        monkeypatch.setenv("FFNKIT_COMET", model)
        score(["a"], [["b"]], ["comet"], sources=["s"])
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [line[1:] for line in seen] == [["1", None], [None, None]]  # ours would be imported by an older Python
