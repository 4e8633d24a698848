"""The command line: every command on a tiny model, every bad input as one line, and a quick start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tolerance import assert_close, assert_differs
from typer.testing import CliRunner

from ffnkit.cli import app
from ffnkit.cli.describe import parse_settings
from ffnkit.cli.group import hoist
from ffnkit.errors import FfnkitError

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "book", "meal", "day"]


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """The command line quietens the libraries; later tests may want to hear them."""
    import datasets

    before, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    yield
    transformers.logging.set_verbosity(before)
    datasets.enable_progress_bars()
    if bars:
        transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head for two classes and a tokenizer of ten words."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
        num_labels=2,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    FAMILIES["llama"].model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv file of 40 distinct texts in two classes."""
    file = tmp_path_factory.mktemp("data") / "train.csv"
    rows = [f"{a} {b} {c},{'yes' if i < 3 else 'no'}" for i, a in enumerate(WORDS[:6]) for b in WORDS[6:] for c in "xy"]
    file.write_text("text,liked\n" + "\n".join(rows) + "\n")
    return file


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def good(*words: object) -> Any:
    """The result of a command that must succeed."""
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result


def bad(*words: object, code: int = 2, printed: bool = False) -> str:
    """The one line of a command that must fail; ``printed``: after it has printed something useful."""
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("ffnkit: error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0]), result.stderr
    assert bool(result.stdout) == printed
    return lines[0]


def fuse(model: Path, out: Path, *more: object) -> Any:
    return good(
        "compress", model, "--method", "fusion", "--set", "width=0.5", "--set", "restarts=1", "--out", out, *more
    )


# ------------------------------------------------------------------------------------------------ the program
def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['ffnkit', 'compress', '--help']\n"
        "from ffnkit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'sklearn', 'matplotlib', 'ffnkit.tune.settings'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_program_in_a_pipe_writes_one_unbroken_line(tmp_path: Path) -> None:
    long = tmp_path / ("long-" * 40)
    done = subprocess.run(
        [sys.executable, "-m", "ffnkit", "compress", "x", "--out", __file__, "--plan", str(long)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and __file__ in done.stderr


@pytest.mark.parametrize(
    "command", ["inspect", "compress", "tune", "eval", "export", "run", "methods", "tuners", "tasks"]
)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    output = good(command, "--help").output
    assert f"ffnkit {command}" in output and "Example" in output


def test_version_and_bare_call() -> None:
    assert good("--version").output.startswith("ffnkit ")
    assert "Usage" in good().output


def test_global_flags_work_anywhere() -> None:
    assert hoist(["inspect", "m", "--quiet", "--json"]) == ["--quiet", "inspect", "m", "--json"]
    assert hoist(["inspect", "--", "--quiet"]) == ["inspect", "--", "--quiet"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("inspect", tmp_path, "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compess"], "Did you mean 'compress'"),
        (["compress"], "Missing argument 'MODEL'"),
        (["compress", "m", "--seed", "x"], "--seed"),
        (["compress", "m", "--form", "zip"], "--form"),
        (["tune", "m", "--task", "sst2"], "--out"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], expected: str) -> None:
    assert expected in bad(*words)


# ---------------------------------------------------------------------------------------------------- what there is
@pytest.mark.parametrize(("command", "name"), [("methods", "fusion"), ("tuners", "lora"), ("tasks", "sst2")])
def test_lists(command: str, name: str) -> None:
    assert name in good(command).output
    rows = json.loads(good(command, "--json").stdout)
    assert name in [row["name"] for row in rows]


def test_settings_have_defaults_and_help() -> None:
    settings = json.loads(good("methods", "--json").stdout)[0]["settings"]
    assert "default" not in settings["width"] and settings["layers"]["default"] == "all"
    assert settings["width"]["help"].startswith("neurons left")


def test_values_are_read_as_yaml() -> None:
    pairs = ["width=0.25", "lr=2e-4", "name=last:8", "flag=true", "none=null", "betas=[0.9, 0.98]", "of-two=7"]
    values = [0.25, 2e-4, "last:8", True, None, [0.9, 0.98], 7]
    assert list(parse_settings(pairs).values()) == values
    assert "of_two" in parse_settings(pairs)
    for wrong in (["width"], ["=1"], ["a=1", "a=2"], ["a=[1"]):
        with pytest.raises(FfnkitError):
            parse_settings(wrong)


# ------------------------------------------------------------------------------------------------ inspect, compress
def test_inspect(bert: Path) -> None:
    assert "encoder.layer.2" in good("inspect", bert).output
    seen = json.loads(good("inspect", bert, "--json").stdout)
    assert len(seen["rows"]) == 3 and seen["rows"][0]["width"] == 40 and 0 < seen["ffn_share"] < 1


def test_dry_run_prints_the_plan_and_writes_nothing(bert: Path, tmp_path: Path) -> None:
    result = good("compress", bert, "--method", "fusion", "--set", "width=0.5", "--dry-run", "--out", tmp_path / "out")
    assert "20 neurons" in result.stdout and not list(tmp_path.iterdir())
    seen = json.loads(good("compress", bert, "-m", "fusion", "-s", "width=0.5", "--dry-run", "--json").stdout)
    assert seen["plan"]["method"] == "fusion" and "saved" not in seen


def test_compress_then_export_opens_plainly_with_equal_outputs(llama: Path, tmp_path: Path) -> None:
    import ffnkit

    fuse(llama, tmp_path / "compact", "--layers", "last:2")
    good("export", tmp_path / "compact", "--out", tmp_path / "standard")
    config = json.loads((tmp_path / "standard" / "config.json").read_text())
    assert "quantization_config" not in config and config["intermediate_size"] == 24
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        opened = [
            load(tmp_path / name).eval()(ids).logits
            for name, load in (
                ("compact", ffnkit.load),
                ("standard", transformers.AutoModelForCausalLM.from_pretrained),
            )
        ]
        before = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()(ids).logits
    assert_close(opened[1], opened[0], rel=1e-5, what="standard and compact")
    assert_differs(opened[0], before, what="compressed and uncompressed")


def test_both_forms_with_tokenizer_card_and_history(bert: Path, tmp_path: Path) -> None:
    report = json.loads(fuse(bert, tmp_path / "out", "--form", "both", "--json").stdout)
    assert report["after"]["parameters"] < report["before"]["parameters"]
    for form in ("compact", "standard"):
        folder = tmp_path / "out" / form
        assert report["saved"][form]["bytes"] == (folder / "model.safetensors").stat().st_size
        assert (folder / "tokenizer.json").exists()
        card = (folder / "README.md").read_text()
        assert "fusion" in card and "width: 0.5" in card and str(bert) not in card
        assert json.loads((folder / "ffnkit.json").read_text())["layers"][0][1:] == [40, 20]


def test_a_saved_plan_gives_the_same_model(bert: Path, tmp_path: Path) -> None:
    fuse(bert, tmp_path / "a", "--plan-out", tmp_path / "plan")
    good("compress", bert, "--plan", tmp_path / "plan", "--out", tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert "--method" in bad("compress", bert, "--plan", tmp_path / "plan", "-m", "fusion", "--dry-run")
    assert "40" in bad("compress", tmp_path / "a", "--plan", tmp_path / "plan", "--out", tmp_path / "c", printed=True)


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--set", "width=0"], "width"),
        (["--set", "width=41"], "40"),
        (["--set", "width=1.5"], "1.5"),
        (["--set", "width=-3"], "-3"),
        (["--set", "width=nan"], "nan"),
        (["--set", "width=wide"], "wide"),
        (["--set", "width=0.5", "--set", "colour=red"], "width, layers"),
        (["--set", "width=0.5", "--layers", "7-9"], "7-9"),
        (["--set", "width=0.5", "--layers", "last:9"], "last:9"),
        (["--set", "width=0.5", "--layers", "some"], "some"),
        (["--set", "width=0.5", "--layers", "decoder:all"], "decoder"),
        (["--set", "width=0.5", "--set", "seed=-1"], "seed"),
        (["--set", "width=0.5", "--set", "seed=1", "--seed", "1"], "--set seed"),
        (["--set", "width=0.5", "--device", "cuda:99"], "cuda:99"),
        (["--set", "width=0.5", "--dtype", "int3"], "int3"),
        ([], "width"),
    ],
)
def test_settings_that_do_not_fit(bert: Path, tmp_path: Path, settings: list[str], expected: str) -> None:
    line = bad("compress", bert, "--method", "fusion", "--out", tmp_path / "out", *settings)
    assert expected in line and not (tmp_path / "out").exists()


def test_unknown_names_list_the_known(bert: Path, tmp_path: Path) -> None:
    assert "fusion" in bad("compress", bert, "--method", "magic", "--dry-run")
    assert "fusion" in bad("compress", bert, "--dry-run")
    assert "lora" in bad("tune", bert, "--task", "sst2", "--tuner", "magic", "--out", tmp_path / "out")
    assert "sst2" in bad("eval", bert, "--task", "magic")


def test_no_output_is_named(bert: Path) -> None:
    assert "--out" in bad("compress", bert, "--method", "fusion", "--set", "width=0.5")


def test_models_that_cannot_be_read(bert: Path, tmp_path: Path) -> None:
    assert "no config.json" in bad("inspect", tmp_path)
    assert "no such folder" in bad("inspect", tmp_path / "nothing")
    assert "file" in bad("inspect", bert / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    assert str(tmp_path) in bad("inspect", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert str(tmp_path) in bad("inspect", tmp_path)


def test_a_model_without_ffns(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], num_channels=1, layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    assert "FFN" in bad("inspect", tmp_path / "resnet")
    assert "FFN" in bad("compress", tmp_path / "resnet", "-m", "fusion", "-s", "width=0.5", "--dry-run")


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_damaged_weights_leave_the_old_output(bert: Path, tmp_path: Path) -> None:
    fuse(bert, tmp_path / "out")
    old = (tmp_path / "out" / "model.safetensors").read_bytes()
    broken = copy(bert, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    line = bad("compress", broken, "-m", "fusion", "-s", "width=0.5", "--out", tmp_path / "out")
    assert str(broken) in line
    poisoned = load_file(bert / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    poisoned[name][3, 3] = float("nan")
    save_file(poisoned, broken / "model.safetensors", metadata={"format": "pt"})
    assert "NaN" in bad("compress", broken, "-m", "fusion", "-s", "width=0.5", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == old


def test_outputs_that_must_not_be_written(bert: Path, tmp_path: Path) -> None:
    words = ("compress", bert, "-m", "fusion", "-s", "width=0.5", "--out")
    file = tmp_path / "file"
    file.write_text("mine")
    assert "file" in bad(*words, file) and "file" in bad(*words, file / "below")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep me")
    assert "not written by ffnkit" in bad(*words, mine)
    good(*words, mine, "--overwrite")
    assert (mine / "notes.txt").read_text() == "keep me" and (mine / "model.safetensors").exists()
    theirs = tmp_path / "theirs"
    shutil.copytree(bert, theirs)
    for name in ("metrics.json", "results.json", "analysis.json", "recipe.yaml", "ffnkit.json", ".ffnkit-files.json"):
        (theirs / name).write_text("{}")  # a name of ours makes nothing ours
    good(*words, theirs / "compact")
    assert "not written by ffnkit" in bad(*words, theirs)
    assert (theirs / "model.safetensors").read_bytes() == (bert / "model.safetensors").read_bytes()
    assert "is read" in bad(*words, bert) and "is read" in bad(*words, bert.parent)
    good(*words, mine)  # an output of ffnkit by now


def test_single_files_take_the_place_of_nothing_else(bert: Path, tmp_path: Path) -> None:
    """Of inputs and of files of other kinds; those of their own kind are written anew, and empty ones filled."""
    text, rows, empty = (tmp_path / name for name in ("z.txt", "x.jsonl", "empty"))
    text.write_text("\n\n".join(["good fine great film"] * 90))
    rows.write_text('{"text": "good", "label": 1}\n')
    empty.touch()
    shutil.copytree(bert, tmp_path / "model")
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    before = {path: path.read_bytes() for path in (text, rows, weights, config)}
    calibrate = ("calibrate", bert, "--text", text, "--mix", 0, "--tokens", 50, "--out")
    plan = ("compress", bert, "-m", "magnitude", "-s", "width=0.5", "--dry-run", "--plan-out")
    assert "this file is read" in bad(*calibrate, text)
    for other in (rows, weights, config):
        assert "there is a file that is no" in bad(*calibrate, other)
        assert "there is a file that is no" in bad(*plan, other)
    good(*calibrate, empty)
    good(*calibrate, empty)
    assert "no saved plan" in bad(*plan, empty)
    merge = ("calibrate", bert, "--merge", empty, empty, "--out")
    assert "there is a file that is no" in bad(*merge, weights) and "this file is read" in bad(*merge, empty)
    good(*plan, tmp_path / "plan")
    good(*plan, tmp_path / "plan")
    again = ("compress", bert, "--plan", tmp_path / "plan", "--dry-run", "--plan-out")
    assert "this file is read" in bad(*again, tmp_path / "plan")
    measure = ("eval", bert, "--validation-file", rows, "--text-column", "text", "--label-column", "label")
    assert "this file is read" in bad(*measure, "--predictions", rows)
    assert "no file of predictions" in bad(*measure, "--predictions", text)
    assert before == {path: path.read_bytes() for path in before}


def test_a_full_disk_is_one_line(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    fuse(bert, tmp_path / "out")
    old = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr("ffnkit.save", full)
    monkeypatch.setattr("ffnkit.export", full)
    line = bad("compress", bert, "-m", "fusion", "-s", "width=0.25", "--out", tmp_path / "out", printed=True)
    assert "no space left" in line and (tmp_path / "out" / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_recipes_that_are_wrong(tmp_path: Path) -> None:
    assert "no such file" in bad("run", tmp_path / "none.yaml")
    file = tmp_path / "recipe.yaml"
    for text, expected in (
        ("name: x\nmodel: m\ntask: sst2\narms: {a: {}}\ncolour: red\n", "colour"),
        ("name: x\nmodel: m\ntask: sst2\narms: {a: {}, a: {}}\n", "twice"),
        ("name: x\nmodel: m\ntask: sst2\narms: {a: {}}\nseeds: many\n", "seeds"),
        ("name: [", "YAML"),
    ):
        file.write_text(text)
        assert expected in bad("run", file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ tune, eval
COLUMNS = ("--text-column", "text", "--label-column", "liked")


def test_tune_and_eval_on_a_table(bert: Path, table: Path, tmp_path: Path) -> None:
    fuse(bert, tmp_path / "small", "--layers", "last:2")
    data = ("--train-file", table, *COLUMNS)
    training = ("--steps", 4, "--batch-size", 8, "--eval-every", 2, "--lr", "1e-3", "--quiet")
    result = good("tune", tmp_path / "small", *data, *training, "--out", tmp_path / "tuned", "--json")
    report = json.loads(result.stdout)
    assert report["steps"] == 4 and "accuracy" in report["metrics"]
    assert json.loads((tmp_path / "tuned" / "metrics.json").read_text())["metrics"] == report["metrics"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "tuned"]  # no checkpoints are left
    again = json.loads(good("eval", tmp_path / "tuned", *data, "--json", "--quiet").stdout)
    assert again["metrics"] == pytest.approx(report["metrics"])
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "fusion" in card and "accuracy" in card
    assert "accuracy" in good("eval", tmp_path / "tuned", *data, "--split", "dev").stdout


def test_tune_a_compact_body_without_a_head(bert: Path, table: Path, tmp_path: Path) -> None:
    transformers.BertModel.from_pretrained(bert).save_pretrained(tmp_path / "body")
    fuse(tmp_path / "body", tmp_path / "small", "--layers", "last:2")
    words = ("--train-file", table, *COLUMNS, "--steps", 1, "--batch-size", 8, "--tokenizer", bert, "--quiet")
    good("tune", tmp_path / "small", *words, "--out", tmp_path / "tuned")
    rows = json.loads(good("inspect", tmp_path / "tuned", "--json").stdout)["rows"]
    assert [row["width"] for row in rows] == [40, 20, 20]


def test_distil_lora_and_no_fold(bert: Path, table: Path, tmp_path: Path) -> None:
    fuse(bert, tmp_path / "small")
    report = good(
        *(
            "tune",
            tmp_path / "small",
            "--train-file",
            table,
            *COLUMNS,
            "--out",
            tmp_path / "tuned",
            "--json",
            "--quiet",
        ),
        *("--steps", 2, "--batch-size", 8, "--tuner", "lora", "--tuner-set", "rank=2", "--no-fold"),
        *("--distil-from", bert, "--distil-set", "steps=2", "--distil-set", "batch_size=8"),
    )
    seen = json.loads(report.stdout)
    assert seen["tuner"]["rank"] == 2 and not seen["folded"]
    good("inspect", tmp_path / "tuned")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train-file", "TABLE", "--text-column", "words", "--label-column", "liked"], "words"),
        (["--train-file", "TABLE", "--text-column", "text", "--label-column", "rating"], "rating"),
        (["--train-file", "TABLE", "--label-column", "liked"], "--text-column"),
        (["--train-file", "TABLE", "--text-column", "text"], "--label-column"),
        (["--train-file", "no.csv", *COLUMNS], "no.csv"),
        (["--task", "sst2", "--train-file", "TABLE"], "--task"),
        ([], "--task"),
        (["--train-file", "TABLE", *COLUMNS, "--lr", "-1"], "--lr -1"),
        (["--train-file", "TABLE", *COLUMNS, "--set", "colour=red"], "colour"),
        (["--train-file", "TABLE", *COLUMNS, "--lr", "1e-3", "--set", "learning_rate=1"], "learning_rate"),
        (["--train-file", "TABLE", *COLUMNS, "--schedule", "zigzag"], "schedule"),
        (["--train-file", "TABLE", *COLUMNS, "--tuner-set", "rank=2"], "rank"),
        (["--train-file", "TABLE", *COLUMNS, "--distil-set", "steps=2"], "--distil-from"),
        (["--train-file", "TABLE", *COLUMNS, "--metric", "bleu"], "bleu"),
        (["--train-file", "TABLE", *COLUMNS, "--best-metric", "bleu"], "bleu"),
    ],
)
def test_tune_refuses_in_one_line(bert: Path, table: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    words = [str(table) if word == "TABLE" else word for word in words]
    assert expected in bad("tune", bert, *words, "--out", tmp_path / "out", "--quiet")
    assert not (tmp_path / "out").exists()


def test_eval_refuses_a_model_without_a_head(llama: Path, bert: Path, table: Path) -> None:
    words = ("--train-file", table, *COLUMNS, "--quiet")
    assert "head" in bad("eval", llama, *words, "--tokenizer", bert)
    assert "tokenizer" in bad("eval", llama, *words)


def test_run_a_recipe(bert: Path, table: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: tiny\nmodel: {bert}\ntask: {{train: {table}, text: text, label: liked}}\n"
        "arms: {half: {method: fusion, width: 0.5}}\n"  # each arm starts a process
        "tune: {steps: 2, batch_size: 8}\nmeasure: {latency: false}\n"
    )
    words = ("run", recipe, "--out", tmp_path / "out", "--quiet")
    first = good(*words)
    assert "half" in first.stdout
    report = json.loads(good(*words, "--json").stdout)
    assert [(row["arm"], row["status"]) for row in report["rows"]] == [("half", "done")]
    assert report == json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_search_tells_what_it_tried(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("\n".join(" ".join(WORDS[i:]) for i in range(6)))
    words = ("compress", bert, "-m", "merging", "--set", "features=up", "--text", tmp_path / "notes.txt", "--dry-run")
    shown = good(*words, "--set", "window=2").stdout
    assert "tried in" in shown and "0-1" in shown.split("tried in")[1]
    assert "tried in" not in good(*words, "-l", "0-1").stdout
    report = json.loads(good(*words, "--set", "window=2", "--json").stdout)
    assert set(report["search"]) >= {"search", "seconds", "groups"}
    assert "a metric needs a task" in bad(*words, "--set", "window=2", "--set", "score=accuracy")
