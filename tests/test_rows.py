"""Labels are decided once, a lone file is evaluated whole, what scores a search calibrates nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
import torch
import transformers
from test_cli import WORDS, bert, good, invoke, verbosity
from test_recipe_run import recipe_of, tiny
from test_recipe_run import run as run_recipe

from ffnkit import methods, tasks, tune
from ffnkit.cli.calibration import Calibration
from ffnkit.errors import FfnkitError, FfnkitWarning, RenamedWarning
from ffnkit.recipe.schema import facts_today, recipe_from
from ffnkit.recipe.state import measures
from ffnkit.tasks.instructions.forms import columns_at
from ffnkit.tasks.rows.files import read

_ = (bert, verbosity)  # fixtures
TEXT_FORMS, TYPED_FORMS = ("csv", "tsv"), ("json", "jsonl", "parquet", "arrow", "feather")


def write(path: Path, labels: list[Any], texts: list[str] | None = None) -> Path:
    """A file of 60 rows whose labels repeat ``labels``."""
    rows = 60 if texts is None else len(texts)
    frame = pandas.DataFrame(
        {
            "text": texts or [f"text {n}" for n in range(rows)],
            "label": [labels[n % len(labels)] for n in range(rows)],
        }
    )
    kind = path.suffix.removeprefix(".")
    if kind in TEXT_FORMS:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "feather":
        frame.to_feather(path)
    elif kind == "arrow":  # a stream, as datasets writes them
        table = pyarrow.Table.from_pandas(frame, preserve_index=False)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    return path


def decided(path: Path, **options: Any) -> tuple[str, ...]:
    """The classes; () for numbers."""
    return tasks.file_task(path, text=("text",), label="label", **options).label_names


# ---- what labels are


@pytest.mark.parametrize("kind", [*TEXT_FORMS, *TYPED_FORMS])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["007", "7", "12"], ("007", "7", "12")),
        (["1_0", "10"], ("10", "1_0")),
        (["1e1", "2e1"], ("1e1", "2e1")),
        (["Nan", "Bob"], ("Bob", "Nan")),
        (["Inf", "inf", "x"], ("Inf", "inf", "x")),
        (["NA", "na", "null"], ("NA", "na", "null")),
        (["+1", "1", "-1"], ("-1", "+1", "1")),
        (["٣", "3"], ("3", "٣")),
        ([" yes ", "no"], ("no", "yes")),
        (["10", "9"], ("9", "10")),
        (["True", "False"], ("False", "True")),
    ],
)
def test_text_stays_text_in_every_kind_of_file(kind: str, labels: list[str], names: tuple, tmp_path: Path) -> None:
    task = tasks.file_task(write(tmp_path / f"t.{kind}", labels), text=("text",), label="label")
    assert task.label_names == names and task.kind == "classification"
    splits = task.splits()
    rows = [*splits.train, *splits.dev, *splits.report]
    assert {(row["text"], names[row["label"]]) for row in rows} == {
        (f"text {n}", labels[n % len(labels)].strip()) for n in range(60)
    }
    assert splits.notes[0].startswith(f"labels: {len(names)} classes (")


@pytest.mark.parametrize("kind", [*TEXT_FORMS, *TYPED_FORMS])
def test_numbers_are_decided_by_one_rule(kind: str, tmp_path: Path) -> None:
    def of(labels: list[Any], **options: Any) -> tuple[str, ...]:
        return decided(write(tmp_path / f"t.{kind}", labels), **options)

    typed = kind in TYPED_FORMS
    assert of([0.0, 1.0]) == (("0", "1") if typed else ("0.0", "1.0"))
    assert of([3, 1, 20]) == ("1", "3", "20")
    assert of([0.5, 2.0, 1.5]) == of([0.5, 1e-5]) == ()
    assert of([0.5, 1.5], label_kind="class") == ("0.5", "1.5")
    assert of([0, 1, 2], label_kind="number") == ()
    assert of(["0.5", "1.5"], label_kind="number") == ()
    assert of(["0.5", "1.5"]) == ()  # of text: a column of fractions, however it is stored
    for wrong in (["0.5", "NA"], ["0.5", "1", "good"], ["1", "2", "nan"], ["1", "N/A"], ["3", "-"], ["1.5", "inf"]):
        with pytest.raises(FfnkitError, match="rows have no number in 'label', such as") as error:
            of(wrong)
        assert "label kind class" in str(error.value) and "\n" not in str(error.value)
        assert set(of(wrong, label_kind="class")) == set(wrong)
        with pytest.raises(FfnkitError, match="rows have no finite number"):
            of(wrong, label_kind="number")
    with pytest.raises(FfnkitError, match="rows have no label"):
        of(["yes", "no", ""])


def test_what_a_file_tells_apart_is_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "t {n}", "label": {[7, chr(34) + "7" + chr(34)][n % 2]}}}\n'
                                              for n in range(20)))  # fmt: skip
    with pytest.raises(FfnkitError, match="some labels in 'label' are numbers and some are names"):
        decided(tmp_path / "t.jsonl")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "t {n}", "label": {["true", "false"][n % 2]}}}\n'
                                              for n in range(20)))  # fmt: skip
    assert decided(tmp_path / "b.jsonl") == ("false", "true")


def test_the_decision_holds_for_further_files(tmp_path: Path) -> None:
    train, held = write(tmp_path / "t.csv", ["007", "7"]), write(tmp_path / "h.csv", ["7"], ["a", "b"])
    task = tasks.file_task(train, held, text=("text",), label="label")
    assert [row["label"] for row in task.splits().report] == [1, 1]
    with pytest.raises(FfnkitError, match="rows have a label that .*t.csv lacks, such as '07'"):
        tasks.file_task(train, write(tmp_path / "o.csv", ["07"], ["a", "b"]), text=("text",), label="label")
    scores = write(tmp_path / "s.csv", [0.5, 1.5])
    whole = tasks.file_task(
        scores, write(tmp_path / "w.csv", ["1", "2"], ["a", "b"]), text=("text",), label="label"
    ).splits()
    assert whole.report["label"][:2] == [1.0, 2.0]


def test_recipes_and_old_names_say_what_labels_are(tmp_path: Path) -> None:
    data: dict[str, Any] = {"name": "n", "model": "m", "arms": {"a": {}}}
    task: dict[str, Any] = {"train": str(write(tmp_path / "t.csv", ["1", "2"])), "text": "text", "label": "label"}
    new = recipe_from({**data, "task": {**task, "label_kind": "number"}})
    assert tasks.choose(**new.task.choice()).kind == "regression"
    with pytest.warns(RenamedWarning, match="label_kind"):
        assert recipe_from({**data, "task": {**task, "regression": True}}) == new
    with pytest.raises(FfnkitError, match="task.label_kind"):
        recipe_from({**data, "task": {**task, "label_kind": "words"}})
    stored = {"task": {**new.to_dict()["task"], "regression": True}, "seed": 0}
    del stored["task"]["label_kind"]
    assert facts_today(stored)["task"] == new.to_dict()["task"]


@pytest.mark.slow
def test_the_command_line_says_what_labels_are(bert: Path, tmp_path: Path) -> None:
    texts = [f"{a} {b} {c}" for a in WORDS[:6] for b in WORDS[6:] for c in "xy"]
    file = write(tmp_path / "t.csv", ["0", "1"], texts)
    words = ("--train-file", file, "--text-column", "text", "--label-column", "label")
    short = ("--steps", 1, "--batch-size", 8, "--max-length", 16)
    found = good("tune", bert, *words, *short, "--out", tmp_path / "classes")
    assert "labels: 2 classes (numbers): 0, 1" in found.stderr
    found = good("tune", bert, *words, *short, "--label-kind", "number", "--out", tmp_path / "numbers", "--json")
    assert "pearson" in json.loads(found.stdout)["metrics"] and "labels: numbers from 0 to 1" in found.stderr
    found = good("eval", tmp_path / "numbers", "--validation-file", file, *words[2:], "--json")  # as the model has it
    assert "pearson" in json.loads(found.stdout)["metrics"] and "labels: numbers" in found.stderr


# ---- which rows


@pytest.mark.slow
def test_a_lone_file_is_evaluated_whole(bert: Path, tmp_path: Path) -> None:
    texts = [f"{a} {b} {c}" for a in WORDS[:6] for b in WORDS[6:] for c in "xy"]
    file = write(tmp_path / "t.csv", ["yes", "no"], texts)
    columns = ("--text-column", "text", "--label-column", "label")
    train = ("--train-file", file, *columns)
    short = ("--steps", 2, "--batch-size", 8, "--max-length", 16, "--quiet", "--json")
    tuned = json.loads(good("tune", bert, *train, *short, "--out", tmp_path / "tuned").stdout)

    def evaluated(*given: object) -> dict[str, Any]:
        found = good("eval", tmp_path / "tuned", *given, "--max-length", 16, "--json")
        report = json.loads(found.stdout)
        assert f"{report['rows']} rows" in found.stderr
        assert f"{report['rows']} rows" in good("eval", tmp_path / "tuned", *given, "--max-length", 16).stdout
        return dict(report)

    whole = evaluated(*train)
    assert (whole["rows"], whole["split"]) == (48, "all")
    assert evaluated("--validation-file", file, *columns)["metrics"] == whole["metrics"]
    again = evaluated(*train, "--split", "report")
    assert again["rows"] == tuned["rows"] < 48 and again["metrics"] == pytest.approx(tuned["metrics"])
    assert evaluated(*train, "--split", "dev")["rows"] < 48
    one = write(tmp_path / "one.csv", ["yes"], texts[:5])  # classes are the model's, those that do not occur too
    assert evaluated("--validation-file", one, *columns)["rows"] == 5
    both = evaluated(*train, "--validation-file", write(tmp_path / "h.csv", ["yes", "no"], texts[:10]))
    assert (both["rows"], both["split"]) == (10, "report")
    for words, part in (
        (("--validation-file", file, *columns, "--split", "dev"), "training file"),
        ((*train, "--validation-file", one, "--split", "all"), "one file"),
        (("--task", "sst2", "--split", "all"), "one file"),
    ):
        assert part in invoke("eval", tmp_path / "tuned", *words).stderr
    alone = invoke("tune", bert, "--validation-file", file, *columns, "--out", tmp_path / "no")
    assert alone.exit_code == 2 and "nothing to train on" in alone.stderr


def test_every_kind_of_files_is_reported_whole(tmp_path: Path) -> None:
    from test_images import image_folder

    (tmp_path / "t.txt").write_text("\n\n".join(f"document {n}" for n in range(20)))
    pairs = [{"q": f"question {n}", "a": f"answer {n}"} for n in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    chats = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]
    (tmp_path / "c.json").write_text(json.dumps(chats))
    kinds: dict[str, tuple[Path, dict[str, Any], int]] = {
        "classification": (write(tmp_path / "l.tsv", ["a", "b"]), {"text": ("text",), "label": "label"}, 60),
        "language-modelling": (tmp_path / "t.txt", {}, 20),
        "generation": (tmp_path / "p.jsonl", {"inputs": ("q",), "target": "a"}, 20),
        "instruction": (tmp_path / "c.json", {}, 20),
        "image-classification": (image_folder(tmp_path / "images"), {}, 40),
    }
    for kind, (path, columns, rows) in kinds.items():
        for name in ("train", "validation"):
            task = tasks.choose(whole=True, **{name: path}, **columns)
            splits = task.splits()
            assert task.kind == kind and [len(splits.train), len(splits.dev), len(splits.report)] == [0, 0, rows]
        carved = tasks.choose(train=path, **columns).splits()
        assert len(carved.report) < rows  # the control: to train on it, a part is kept apart
        with pytest.raises(FfnkitError):
            tasks.choose(validation=path, **columns)
    with pytest.raises(FfnkitError, match="no file is named"):
        tasks.file_task(None, text=("text",), label="label")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split, rows in (("train", 200), ("validation", 20)):
        lines = [json.dumps({"sentence": f"{WORDS[n % 10]} {split} {n}", "label": n % 2}) for n in range(rows)]
        (tmp_path / "data" / "sst2" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize("seed", range(4))
def test_what_scores_a_search_calibrates_nothing(
    seed: int, bert: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}

    def note(name: str) -> Any:
        def take(*given: Any, rows: Any = None, **_: Any) -> Any:
            seen[name] = set((given[3] if rows is None else rows)["sentence"])
            return given[0]

        return take

    monkeypatch.setattr("ffnkit.tune.scoring.with_score", note("scored"))
    monkeypatch.setattr("ffnkit.tune.calibration.calibration_batches", note("calibrated"))
    calibration = Calibration("sst2", data_dir, tokens=10, seed=seed)
    inner = methods.build("merging", window=2, score="accuracy")
    calibration.scored(methods.Combined([inner, methods.build("magnitude", width=0.5)]), str(bert))
    calibration.batches(None, str(bert))
    assert seen["scored"] and seen["calibrated"] and not seen["scored"] & seen["calibrated"]
    fixed = set(tasks.get("sst2").splits(data_dir, seed=0).train["sentence"])
    assert not seed or seen["scored"] & fixed  # the control: with the rows of another seed they would meet


def test_recipes_score_on_dev_in_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny(tmp_path)
    scored: list[Any] = []
    own = tune.with_score

    def note(method: Any, task: Any, tokenizer: Any, rows: Any, **sizes: Any) -> Any:
        scored.append((method.name, getattr(method, "score", None), set(rows["text"])))
        return own(method, task, tokenizer, rows, **sizes)

    monkeypatch.setattr("ffnkit.tune.scoring.with_score", note)
    drop = {"method": "layer-drop", "window": 1, "score": "accuracy"}
    recipe = recipe_of(
        folder, stages=["compress", "tune", "prune", "evaluate"], arms={"a": {"method": "ffn-drop", **{
            "window": 1, "score": "accuracy", "prune": [drop]}}}, measure={"latency": False}, export="none",
    )  # fmt: skip
    results = run_recipe(recipe, tmp_path / "out")
    assert not results.failed, results.failed
    from ffnkit.recipe.sources import Source

    dev = set(Source(recipe).splits.dev["text"])
    assert [(name, score, rows == dev) for name, score, rows in scored] == [
        ("ffn-drop", "accuracy", True), ("layer-drop", "accuracy", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arm", "wanted"),
    [
        ({"method": "layer-drop", "layers": "last:1"}, False),
        ({"method": "layer-drop", "window": 1}, True),
        ({"method": "layer-drop", "window": 1, "score": "accuracy"}, False),
        ({"method": "merging", "layers": "0-1", "match": False}, False),
        ({"method": "merging", "layers": "0-1"}, False),
        ({"method": "merging", "layers": "0-1", "features": "up"}, True),
        ({"method": "calibrated-fusion", "width": 0.5}, True),
        ({"method": "calibrated-fusion", "budget": 0.5}, True),
        ({"method": "fusion", "width": 0.5}, False),
        ({}, False),
    ],
)
def test_whether_data_are_needed_is_asked_of_the_configured_method(arm: dict[str, Any], wanted: bool) -> None:
    recipe = recipe_from({"name": "n", "model": "m", "task": "sst2", "arms": {"a": arm}})
    assert measures(recipe.arms["a"]) is wanted


# ---- what files hold


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_cells_are_as_long_as_they_like(kind: str, tmp_path: Path) -> None:
    texts = [f"{n} " + "word, " * 40_000 for n in range(8)]
    task = tasks.file_task(write(tmp_path / f"t.{kind}", ["a", "b"], texts), text=("text",), label="label")
    splits = task.splits(dev=1)
    assert {*splits.train["text"], *splits.dev["text"], *splits.report["text"]} == {*texts}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_a_surrogate_pair_is_read_as_the_sign_for_it(kind: str, tmp_path: Path) -> None:
    rows = [f'{{"text": "a \\ud83d {n}", "other": ["\\udc00", {{"\\ud83d": 1}}], "label": {n % 2}}}' for n in range(9)]
    rows.append('{"text": "\\ud83d\\ude00 whole", "other": [], "label": 1}')
    content = "\n".join(rows) if kind == "jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / f"t.{kind}").write_text(content)
    with pytest.warns(FfnkitWarning, match="9 rows have half of a surrogate pair, row 1 first"):
        table = read(tmp_path / f"t.{kind}")
    assert table["text"][0] == "a \ufffd 0" and table["text"][9] == "\U0001f600 whole"
    assert table["other"][0] == ["\ufffd", {"\ufffd": 1}]
    json.dumps(table, ensure_ascii=False).encode()  # nothing is left that text cannot hold
    with pytest.warns(FfnkitWarning):
        assert len(tasks.file_task(tmp_path / f"t.{kind}", text=("text",), label="label").splits().train) > 3


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "feather"])
def test_columns_are_known_before_rows_are_read(kind: str, tmp_path: Path) -> None:
    assert columns_at(write(tmp_path / f"t.{kind}", ["a"])) == ["text", "label"]


def test_files_of_arrow_that_are_broken_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.arrow").write_bytes(b"ARROW1 cut short")
    with pytest.raises(FfnkitError, match="not a whole Arrow file"):
        read(tmp_path / "t.arrow")


# ---- standard streams


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed: str, tmp_path: Path) -> None:
    """And no file that is opened afterwards takes their place and gets our lines."""
    code = "import ffnkit.cli.program as p; p.open_streams(); f = open('written', 'w'); print('line'); f.write('own')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for command in (f'"{sys.executable}" -c "{code}"', f'"{sys.executable}" -m ffnkit tasks'):
        found = subprocess.run(f"{command} {closed}", shell=True, cwd=tmp_path, env=environment, timeout=60)
        assert found.returncode == 0
    assert (tmp_path / "written").read_text() == "own"


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    yield
