"""Tasks: reading, checking, splitting, encoding, metrics, models with a head."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import assert_close

from ffnkit import tasks
from ffnkit.errors import FfnkitError
from ffnkit.io import loading
from ffnkit.tasks.metrics.labelled import METRICS, check, compute
from ffnkit.tasks.rows.splitting import carve, share

GLUE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
WORDS = ["red", "green", "blue", "warm", "cold", "old", "new", "far", "near", "slow"]


def sentence(number: int) -> str:
    """A sentence of its own for each number."""
    return f"{WORDS[number % 10]} {WORDS[number // 10 % 10]} thing {number}"


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def glue_folder(folder: Path, name: str, train: int = 200, validation: int = 20) -> Path:
    """A folder with made-up rows of a GLUE task."""
    task = tasks.get(name)
    for split, count, first in (("train", train, 0), ("validation", validation, 10_000)):
        rows = []
        for n in range(count):
            row: dict = {column: f"{sentence(first + n)} {column}" for column in task.text}
            row["label"] = n % task.num_labels if task.label_names else n % 11 / 2
            rows.append(row)
        write_lines(folder / name / f"{split}.jsonl", rows)
    return folder


def rows_of(dataset) -> list[tuple]:
    return [tuple(row.values()) for row in dataset]


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


# ---- names


def test_names_lists_every_kind() -> None:
    written = ["e2e", "webnlg", "dart", "multi30k", "multi30k-de-en", "coqa", "alpaca_demo", "oasst1"]
    written += ["wikitext2", "wikitext103", "tinystories"]
    assert tasks.names() == [*GLUE, "docstrings", *written, "cifar10", "mnist", "digits"]
    assert all(tasks.get(name).name == name for name in tasks.names())
    with pytest.raises(FfnkitError) as error:
        tasks.get("sst3")
    one_line(error, "sst3", "sst2")


def test_labels_and_metrics_of_glue() -> None:
    assert tasks.get("rte").id2label == {0: "entailment", 1: "not_entailment"}
    assert tasks.get("wnli").id2label == {0: "not_entailment", 1: "entailment"}
    assert tasks.get("mnli").label_names == ("entailment", "neutral", "contradiction")
    assert tasks.get("cola").metrics == ("matthews", "accuracy")
    assert tasks.get("mrpc").metrics == tasks.get("qqp").metrics == ("accuracy", "f1")
    assert tasks.get("stsb").metrics == ("pearson", "spearman") and tasks.get("stsb").num_labels == 1


# ---- splits


@pytest.mark.parametrize("name", GLUE)
def test_splits_are_disjoint_and_deterministic(name: str, tmp_path: Path) -> None:
    task, folder = tasks.get(name), glue_folder(tmp_path, name)
    first, again, other = (task.splits(folder, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.dev), len(first.report)) == (150, 50, 20)
    assert rows_of(first.train) == rows_of(again.train) and rows_of(first.dev) == rows_of(again.dev)
    assert rows_of(first.dev) != rows_of(other.dev)
    texts = [{tuple(row[c] for c in task.text) for row in part} for part in (first.train, first.dev, first.report)]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert first.train.column_names == [*task.text, "label"]


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFNKIT_DATA", str(glue_folder(tmp_path, "rte")))
    assert len(tasks.get("rte").splits().report) == 20


def test_repeated_texts_and_texts_of_report_are_dropped(tmp_path: Path) -> None:
    folder = glue_folder(tmp_path, "sst2")
    file = folder / "sst2" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    leaked = json.loads((folder / "sst2" / "validation.jsonl").read_text().splitlines()[0])
    repeated = {"sentence": f"  {rows[0]['sentence']} ", "label": 1 - rows[0]["label"]}
    write_lines(file, [*rows, repeated, rows[1], leaked])
    splits = tasks.get("sst2").splits(folder)
    assert len(splits.train) + len(splits.dev) == 200
    assert leaked["sentence"] not in {*splits.train["sentence"], *splits.dev["sentence"]}
    assert "2 repeated texts dropped, 1 of them" in " ".join(splits.notes)
    assert "1 rows dropped that are in report" in " ".join(splits.notes)
    clean = tasks.get("sst2").splits(glue_folder(tmp_path / "clean", "sst2"))
    assert "dropped" not in " ".join(clean.notes)


def test_dev_keeps_the_proportions_of_the_classes() -> None:
    table = {"y": [0] * 900 + [1] * 90 + [2] * 10}
    rest, dev = carve(table, "y", 100, 0, stratified=True)
    assert [dev["y"].count(label) for label in range(3)] == [90, 9, 1]
    assert [rest["y"].count(label) for label in range(3)] == [810, 81, 9]
    drawn = [carve(table, "y", 100, seed, stratified=False)[1]["y"].count(0) for seed in range(5)]
    assert set(drawn) != {90}, "an unstratified draw keeps the proportions too: the check above shows nothing"


def test_a_class_never_leaves_train() -> None:
    rest, dev = carve({"y": [0] * 20 + [1]}, "y", 15, 3, stratified=True)
    assert len(dev["y"]) == 15 and rest["y"].count(1) == 1


@pytest.mark.parametrize(
    ("rows", "wanted", "count"),
    [
        (67_000, None, 1000),
        (8_000, None, 400),
        (600, None, 64),
        (100, None, 25),
        (4, None, 1),
        (9, 7, 7),
        (50, 0.2, 10),
    ],
)
def test_size_of_dev(rows: int, wanted: int | float | None, count: int) -> None:
    assert share(rows, wanted, "dev") == count


@pytest.mark.parametrize("wanted", [0, 100, 1.0, 0.0, -3])
def test_size_of_dev_refused(wanted: int | float) -> None:
    with pytest.raises(FfnkitError):
        share(100, wanted, "dev")


def test_limits_draw_nested_subsamples_and_leave_dev_alone(tmp_path: Path) -> None:
    task, folder = tasks.get("cola"), glue_folder(tmp_path, "cola")
    whole = task.splits(folder)
    small, large = task.splits(folder, train_limit=10, report_limit=5), task.splits(folder, train_limit=30)
    assert (len(small.train), len(small.report)) == (10, 5)
    assert set(rows_of(small.train)) < set(rows_of(large.train)) < set(rows_of(whole.train))
    assert rows_of(small.dev) == rows_of(whole.dev)
    with pytest.raises(FfnkitError):
        task.splits(folder, dev_limit=0)


def test_mismatched_genres_are_reported_beside(tmp_path: Path) -> None:
    folder = glue_folder(tmp_path, "mnli")
    matched = folder / "mnli" / "validation.jsonl"
    matched.rename(matched.with_name("validation_matched.jsonl"))
    write_lines(matched.with_name("validation_mismatched.jsonl"), [{"premise": "a b", "hypothesis": "c", "label": 2}])
    splits = tasks.get("mnli").splits(folder)
    assert len(splits.report) == 20 and splits.extra["mismatched"]["label"][:] == [2]


# ---- bad GLUE data


def _break(folder: Path, change: str) -> None:
    file = folder / "rte" / "train.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[2])
    if change == "json":
        lines[2] = lines[2][:-3]
    elif change == "list":
        lines[2] = "[1]"
    elif change == "column":
        lines = [line.replace("sentence2", "sentence3") for line in lines]
    elif change == "empty":
        lines = []
    elif change == "gone":
        file.unlink()
        return
    else:
        lines[2] = json.dumps({**row, "label": {"unlabelled": -1, "outside": 2, "word": "yes", "null": None}[change]})
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("json", ["line 3", "not JSON"]),
        ("list", ["line 3", "object"]),
        ("column", ["'sentence2'", "'sentence3'"]),
        ("empty", ["no rows"]),
        ("gone", ["no such file"]),
        ("unlabelled", ["1 of 200 rows have no label"]),
        ("null", ["1 of 200 rows have no label"]),
        ("outside", ["outside 0 to 1", "2"]),
        ("word", ["'yes'"]),
    ],
)
def test_bad_rows_give_one_line_that_names_the_file(change: str, parts: list[str], tmp_path: Path) -> None:
    folder = glue_folder(tmp_path, "rte")
    tasks.get("rte").splits(folder)
    _break(folder, change)
    with pytest.raises(FfnkitError) as error:
        tasks.get("rte").splits(folder)
    one_line(error, "train.jsonl", *parts)


def test_scores_of_stsb_stay_in_their_range(tmp_path: Path) -> None:
    folder = glue_folder(tmp_path, "stsb")
    write_lines(folder / "stsb" / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 5.5}])
    with pytest.raises(FfnkitError) as error:
        tasks.get("stsb").splits(folder)
    one_line(error, "outside 0 to 5", "5.5")


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FfnkitError) as error:
        tasks.get("rte").splits(tmp_path / "none")
    one_line(error, "rte", "no such folder")
    with pytest.raises(FfnkitError) as error:
        tasks.get("rte").splits(tmp_path)
    one_line(error, "no folder rte", "train.jsonl")


def test_no_source_within_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFNKIT_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    with pytest.raises(FfnkitError) as error:
        tasks.get("rte").splits()
    one_line(error, "nyu-mll/glue", "--data-dir", "FFNKIT_DATA")


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def rows(first: int, label: int | None = None) -> datasets.Dataset:
        numbers = range(first, first + 30)
        labels = [number % 3 if label is None else label for number in numbers]
        texts = [sentence(number) for number in numbers]
        return datasets.Dataset.from_dict({"premise": texts, "hypothesis": texts, "label": labels, "idx": labels})

    def load_dataset(*arguments: str) -> datasets.DatasetDict:
        asked.append(arguments)
        parts = {"train": rows(0), "validation_matched": rows(100), "validation_mismatched": rows(200)}
        return datasets.DatasetDict({**parts, "test_matched": rows(300, -1)})

    monkeypatch.delenv("FFNKIT_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = tasks.get("mnli").splits()
    assert asked == [("nyu-mll/glue", "mnli")] and splits.source.startswith("hub")
    assert splits.report["premise"][0] == sentence(100) and list(splits.extra) == ["mismatched"]
    assert splits.extra["mismatched"]["premise"][0] == sentence(200)
    assert len(splits.train) + len(splits.dev) == 30


# ---- files of the user


def table(count: int = 60, label=lambda n: ["no", "yes"][n % 2]) -> list[dict]:
    return [{"a": sentence(n), "b": f"other {n}", "y": label(n)} for n in range(count)]


def write_table(path: Path, rows: list[dict]) -> Path:
    import pandas

    frame = pandas.DataFrame(rows)
    if path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_lines(path, rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_task(kind: str, tmp_path: Path) -> None:
    rows = [{**row, "a": row["a"] + ', "quoted"\nNA'} for row in table()]
    task = tasks.file_task(write_table(tmp_path / f"t.{kind}", rows), text=("a", "b"), label="y")
    splits = task.splits()
    assert task.label_names == ("no", "yes") and task.kind == "classification"
    assert (len(splits.train), len(splits.dev), len(splits.report)) == (34, 11, 15)
    expected = {(row["a"], row["b"], int(row["y"] == "yes")) for row in rows}
    assert {*rows_of(splits.train), *rows_of(splits.dev), *rows_of(splits.report)} == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_kinds_of_labels(kind: str, tmp_path: Path) -> None:
    def of(label, **options):
        path = write_table(tmp_path / f"t.{kind}", table(label=label))
        return tasks.file_task(path, text=("a",), label="y", **options)

    assert of(lambda n: [10, 9, -1][n % 3]).label_names == ("-1", "9", "10")
    assert of(lambda n: n % 4 + 0.5).kind == "regression"
    assert of(lambda n: float(n % 2)).label_names == (("0.0", "1.0") if kind == "csv" else ("0", "1"))
    assert of(lambda n: n % 4 + 0.5, label_kind="class").label_names == ("0.5", "1.5", "2.5", "3.5")
    assert of(lambda n: n, label_kind="number").main_metric == "pearson"
    assert not of(lambda n: n % 5 / 2, metric="mse").greater_is_better
    assert of(lambda n: n % 2, metric="f1").metrics == ("f1", "accuracy", "macro_f1")


def test_validation_and_test_files(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.csv", table(60))
    held = write_table(tmp_path / "held.jsonl", table(70)[50:])
    test = write_table(tmp_path / "test.csv", table(75)[70:])
    splits = tasks.file_task(train, held, text=("a",), label="y", test=test).splits()
    assert (len(splits.report), len(splits.extra["test"])) == (20, 5)
    assert len(splits.train) + len(splits.dev) == 50, "ten rows of train are in the validation file"


def test_the_carved_report_is_the_same_for_every_seed(tmp_path: Path) -> None:
    task = tasks.file_task(write_table(tmp_path / "t.csv", table()), text=("a",), label="y")
    first, second = task.splits(seed=0), task.splits(seed=1)
    assert rows_of(first.report) == rows_of(second.report) and rows_of(first.dev) != rows_of(second.dev)


def _with(position: int, **change) -> list[dict]:
    rows = table()
    rows[position] = {**rows[position], **change}
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "parts"),
    [
        (table(), {"text": ("c",)}, ["'c'", "'a'", "'b'", "'y'"]),
        (table(), {"label": "z"}, ["'z'", "'y'"]),
        (table(), {"text": ()}, ["one or two"]),
        (table(), {"text": ("a", "y")}, ["one or two"]),
        (_with(3, y=None), {}, ["1 of 60 rows have no label", "row 4"]),
        (_with(3, a=" "), {}, ["1 of 60 rows have no text", "row 4"]),
        (table(label=lambda _: "no"), {}, ["all 60 rows", "'no'"]),
        (table(label=lambda _: 0.5), {}, ["every label is 0.5"]),
        (table(label=lambda n: f"id{n}"), {}, ["60 different labels"]),
        (table(), {"metric": "bleu"}, ["no such metric", "accuracy"]),
        (table(), {"metric": "pearson"}, ["classification"]),
        (table(), {"label_kind": "number"}, ["no finite number", "'no'"]),
        (table(label=lambda n: n % 3), {"metric": "f1"}, ["3 labels", "macro_f1"]),
        (table(1), {}, ["all 1 rows"]),
    ],
)
def test_bad_files_of_the_user(rows: list[dict], options: dict, parts: list[str], tmp_path: Path) -> None:
    for kind in ("csv", "jsonl"):
        path = write_table(tmp_path / f"t.{kind}", rows)
        with pytest.raises(FfnkitError) as error:
            tasks.file_task(path, **{"text": ("a",), "label": "y", **options})
        one_line(error, *parts)


def test_nan_labels_of_json_and_parquet(tmp_path: Path) -> None:
    for kind in ("jsonl", "json", "parquet"):
        path = write_table(tmp_path / f"t.{kind}", table(label=lambda n: math.nan if n == 5 else n / 2))
        with pytest.raises(FfnkitError) as error:
            tasks.file_task(path, text=("a",), label="y")
        one_line(error, "1 of 60 rows have no label")


def test_labels_that_train_lacks(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.csv", table())
    held = write_table(tmp_path / "held.csv", table(9, lambda n: ["no", "maybe"][n % 2]))
    with pytest.raises(FfnkitError) as error:
        tasks.file_task(train, held, text=("a",), label="y")
    one_line(error, "held.csv", "4 of 9 rows", "'maybe'", "no, yes")


def test_train_as_validation(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.csv", table())
    with pytest.raises(FfnkitError) as error:
        tasks.file_task(train, train, text=("a",), label="y").splits()
    one_line(error, "0 training rows are left of 60")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("t.csv", b"a,y\nx,1\nx,1,2\n", ["line 3", "3 fields", "2"]),
        ("t.csv", b'a,y\n"x,1\n', ["line", "CSV"]),
        ("t.csv", b"", ["no rows"]),
        ("t.csv", b"a,y\n", ["no rows"]),
        ("t.csv", b"a,a\n1,2\n", ["one name"]),
        ("t.csv", b"a,y\n\xff\xfe,1\n", ["UTF-8"]),
        ("t.json", b'[{"a": 1},\n {"a" 2}]', ["line 2", "JSON"]),
        ("t.json", b'{"a": 1}', ["list of objects"]),
        ("t.parquet", b"PAR1 cut short", ["parquet"]),
        ("t.xlsx", b"x", [".xlsx", ".csv"]),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FfnkitError) as error:
        tasks.file_task(path, text=("a",), label="y")
    one_line(error, name, *parts)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, part in ((tmp_path / "none.csv", "no such file"), (tmp_path, "folder")):
        with pytest.raises(FfnkitError) as error:
            tasks.file_task(path, text=("a",), label="y")
        one_line(error, part)


# ---- metrics


def test_metrics_against_their_formulas() -> None:
    labels, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 0])
    tp, tn, fp, fn = 2, 3, 1, 2
    f1, f0 = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = {"accuracy": 5 / 8, "f1": f1, "macro_f1": (f1 + f0) / 2, "matthews": mcc}
    logits = np.eye(2)[predicted] * 3 - 1
    for given in (predicted, logits, (logits, np.zeros((8, 4)))):
        found = compute(list(expected), "classification", given, labels)
        assert_close(torch.tensor(list(found.values())), torch.tensor(list(expected.values())), rel=1e-6)


def test_correlations_against_their_formulas() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(50)
    predicted = np.exp(3 * labels) + rng.normal(size=50)
    ranks = [np.argsort(np.argsort(each)) for each in (predicted, labels)]
    expected = [np.corrcoef(predicted, labels)[0, 1], np.corrcoef(*ranks)[0, 1], np.mean((predicted - labels) ** 2)]
    found = compute(["pearson", "spearman", "mse"], "regression", predicted[:, None], labels)
    assert_close(torch.tensor(list(found.values())), torch.tensor(np.array(expected)).float(), rel=1e-6)
    assert abs(found["pearson"] - found["spearman"]) > 1e-3


def test_constant_predictions_score_zero() -> None:
    assert compute(["pearson", "spearman"], "regression", np.zeros(4), np.arange(4.0)) == {"pearson": 0, "spearman": 0}
    assert compute(["matthews", "f1"], "classification", np.zeros(4, int), np.array([0, 1, 0, 1])) == {
        "matthews": 0,
        "f1": 0,
    }


def test_predictions_that_cannot_be_scored() -> None:
    for predictions in (np.array([[0.0, math.nan], [1.0, 0.0]]), np.zeros((3, 2)), np.zeros((0, 2))):
        with pytest.raises(FfnkitError):
            compute(["accuracy"], "classification", predictions, np.array([0, 1]))
    with pytest.raises(FfnkitError):
        check("f1", "classification", 3)
    assert all(check(name, metric.kind, 2) for name, metric in METRICS.items())


# ---- encoding and models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny BERT and a tiny GPT-2 with a tokenizer of whole words each, and a BERT without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("models")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS, "thing", "other"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = Tokenizer.from_str(words.to_str())
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "model_max_length": 64}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    bert = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=inputs,
        **names,
    )
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[SEP]", **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    body = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes))
    config = GPT2Config(vocab_size=len(vocabulary), n_embd=8, n_layer=1, n_head=2, bos_token_id=3, eos_token_id=3)
    for name, model, tokenizer in (("bert", body, bert), ("bare", body, None), ("gpt2", GPT2LMHeadModel(config), gpt2)):
        model.save_pretrained(root / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def test_encode_a_pair(tiny: dict[str, Path], tmp_path: Path) -> None:
    task = tasks.get("rte")
    splits = task.splits(glue_folder(tmp_path, "rte"))
    tokenizer = task.load_tokenizer(tiny["bert"])
    encoded = task.encode(splits.report, tokenizer, max_length=7)
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    row, text = encoded[4], splits.report[4]
    whole = tokenizer(text["sentence1"], text["sentence2"], truncation=True, max_length=7)
    assert row["input_ids"] == whole["input_ids"] and len(row["input_ids"]) == 7
    assert encoded["labels"][:] == splits.report["label"][:]
    assert len(task.encode(splits.report, tokenizer)[4]["input_ids"]) > 7
    with pytest.raises(FfnkitError):
        task.encode(splits.report, tokenizer, max_length=4)


def test_encode_a_regression_and_collate(tiny: dict[str, Path], tmp_path: Path) -> None:
    from transformers import DataCollatorWithPadding

    task = tasks.get("stsb")
    tokenizer = task.load_tokenizer(tiny["bert"])
    encoded = task.encode(task.splits(glue_folder(tmp_path, "stsb")).train, tokenizer)
    batch = DataCollatorWithPadding(tokenizer)([encoded[index] for index in range(4)])
    assert batch["labels"].dtype == torch.float32 and batch["input_ids"].dtype == torch.int64
    model = task.load_model(tiny["bert"]).eval()
    assert model.config.problem_type == "regression" and model(**batch).logits.shape == (4, 1)
    assert torch.isfinite(model(**batch).loss)


def test_a_decoder_gets_a_padding_token(tiny: dict[str, Path], tmp_path: Path) -> None:
    from transformers import DataCollatorWithPadding

    task = tasks.get("cola")
    tokenizer = task.load_tokenizer(tiny["gpt2"])
    assert tokenizer.pad_token_id == 3 and tokenizer.padding_side == "right"
    for model in (task.load_model(tiny["gpt2"], tokenizer=tokenizer), task.load_model(tiny["gpt2"])):
        model.eval()
        assert model.config.pad_token_id == 3
        rows = task.encode(task.splits(glue_folder(tmp_path, "cola")).report, tokenizer)
        short, long = {**rows[0], "input_ids": [5, 6], "attention_mask": [1, 1]}, rows[1]
        together = model(**DataCollatorWithPadding(tokenizer)([short, long])).logits[0]
        alone = model(**DataCollatorWithPadding(tokenizer)([short])).logits[0]
        assert_close(together, alone, rel=1e-5)


def test_texts_without_tokens_get_one(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = glue_folder(tmp_path, "cola")
    write_lines(folder / "cola" / "validation.jsonl", [{"sentence": "", "label": 0}, {"sentence": "red", "label": 1}])
    task = tasks.get("cola")
    rows = task.encode(task.splits(folder).report, task.load_tokenizer(tiny["gpt2"]))
    assert rows["input_ids"][:] == [[3], [4]] and rows["attention_mask"][:] == [[1], [1]]


def test_load_model_sets_head_labels_and_dtype(tiny: dict[str, Path]) -> None:
    model = tasks.get("mnli").load_model(tiny["bert"])
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.classifier.out_features == 3 and model.dtype == torch.float32
    assert tasks.get("mnli").load_model(tiny["bert"], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_new_head_makes_no_report_and_a_new_body_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    import logging

    import safetensors.torch
    from transformers import BertModel

    seen: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # a command that ran before may have made the library quiet
    try:
        tasks.get("cola").load_model(tiny["bert"])
        assert not [each for each in seen if "LOAD REPORT" in str(each)]
        BertModel.from_pretrained(tiny["bert"]).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        weights = safetensors.torch.load_file(file)
        weights.pop("encoder.layer.0.intermediate.dense.weight")
        safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(FfnkitError, match=r"its files lack bert\.encoder\.layer\.0\.intermediate\.dense\.weight"):
            tasks.get("cola").load_model(tmp_path)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_trained_heads(tiny: dict[str, Path], tmp_path: Path) -> None:
    task = tasks.get("rte")
    with pytest.raises(FfnkitError) as error:
        task.load_model(tiny["bert"], trained_head=True)
    one_line(error, "no trained head")
    task.load_model(tiny["bert"]).save_pretrained(tmp_path)
    assert task.load_model(tmp_path, trained_head=True).config.num_labels == 2
    with pytest.raises(FfnkitError) as error:
        tasks.get("mnli").load_model(tmp_path, trained_head=True)
    one_line(error, "other labels")
    assert tasks.get("mnli").load_model(tmp_path).config.num_labels == 3
    with pytest.raises(FfnkitError) as error:  # the same two labels the other way round
        tasks.get("wnli").load_model(tmp_path, trained_head=True)
    one_line(error, "orders the labels")


def test_models_without_a_tokenizer(tiny: dict[str, Path]) -> None:
    with pytest.raises(FfnkitError) as error:
        tasks.get("rte").load_tokenizer(tiny["bare"])
    one_line(error, "--tokenizer", "no tokenizer files")


def test_a_tokenizer_of_another_model(tiny: dict[str, Path]) -> None:
    tokenizer = tasks.get("rte").load_tokenizer(tiny["bert"])
    tokenizer.add_tokens([f"new{index}" for index in range(5)])
    with pytest.raises(FfnkitError) as error:
        tasks.get("rte").load_model(tiny["bert"], tokenizer=tokenizer)
    one_line(error, "21 tokens", "16")


# ---- loading


def _damaged(source: Path, folder: Path, how: str) -> Path:
    import shutil

    import safetensors.torch

    shutil.copytree(source, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = safetensors.torch.load_file(weights)
    key = "encoder.layer.0.output.dense.weight"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "garbage":
        weights.write_bytes(b"garbage" * 50)
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    elif how == "bad config":
        config.write_text("{bad")
    elif how == "strange":
        config.write_text('{"model_type": "nosuchmodel"}')
    elif how == "width":
        config.write_text(config.read_text().replace('"intermediate_size": 16', '"intermediate_size": 12'))
    else:
        tensors[key][1, 2] = {"nan": math.nan, "inf": math.inf}[how]
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("cut", ["corrupted or cut short"]),
        ("garbage", ["corrupted or cut short"]),
        ("no weights", ["model.safetensors"]),
        ("no config", ["no config.json"]),
        ("bad config", ["JSON"]),
        ("strange", ["nosuchmodel"]),
        ("nan", ["1 of 128 numbers", "encoder.layer.0.output.dense.weight"]),
        ("inf", ["1 of 128 numbers", "encoder.layer.0.output.dense.weight"]),
        ("width", ["(16, 8)", "(12, 8)"]),
    ],
)
def test_damaged_checkpoints_give_one_line(how: str, parts: list[str], tiny: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModel

    loading.load_pretrained(AutoModel, tiny["bare"])
    folder = _damaged(tiny["bare"], tmp_path / "m", how)
    for load in (lambda: loading.load_pretrained(AutoModel, folder), lambda: tasks.get("rte").load_model(folder)):
        with pytest.raises(FfnkitError) as error:
            load()
        one_line(error, str(folder), *(parts if how != "width" else []))


@pytest.mark.parametrize(
    ("name", "part"),
    [("/no/such/dir", "no such folder"), ("./none", "no such folder"), ("", "empty"), ("a/b/c", "no such"),
     ("some-org/some-model", "cannot be reached"), ("bad name", "")],
)  # fmt: skip
def test_models_that_are_not_there(name: str, part: str) -> None:
    from transformers import AutoModel

    with pytest.raises(FfnkitError) as error:
        loading.load_pretrained(AutoModel, name)
    one_line(error, part)


def test_large_half_precision_weights_pass_the_check() -> None:
    module = torch.nn.Linear(100, 100, dtype=torch.float16)
    with torch.no_grad():
        module.weight.fill_(60_000.0)
    assert not torch.isfinite(module.weight.sum())
    loading.check_weights(module, "m")
    module.register_buffer("mask", torch.tensor([-math.inf, math.inf]))
    loading.check_weights(module, "m")
    with torch.no_grad():
        module.weight[3, 4] = math.nan
    with pytest.raises(FfnkitError) as error:
        loading.check_weights(module, "m")
    one_line(error, "weight", "1 of 10000")


# ---- real data


@pytest.mark.parametrize("name", GLUE)
def test_real_rows(name: str, data_dir: Path, minilm_path: Path) -> None:
    task = tasks.get(name)
    splits = task.splits(data_dir, train_limit=200)
    assert len(splits.dev) >= 64 and len(splits.report) >= 71
    tokenizer = task.load_tokenizer(minilm_path)
    encoded = task.encode(splits.report, tokenizer)
    labels = np.array(encoded["labels"])
    perfect = labels if task.kind == "regression" else np.eye(task.num_labels)[labels]
    assert all(value > 0.999999 for value in task.compute_metrics(perfect, labels).values())
    wrong = np.random.default_rng(0).permutation(perfect)
    assert all(value < 0.95 for value in task.compute_metrics(wrong, labels).values())
