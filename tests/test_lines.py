"""Mistakes of users give one line that names what they wrote and what to do; faults of our own a traceback."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from ffnkit.cli import app, describe
from ffnkit.errors import FfnkitError
from ffnkit.io.markdown import one_line, paragraphs
from ffnkit.methods import METHODS, build
from ffnkit.plans import Plan
from ffnkit.recipe.loading import load_recipe, parse
from ffnkit.recipe.sources import expand, expand_model
from ffnkit.report.formats import to_markdown
from ffnkit.report.table import summarize
from ffnkit.settings import settings_of
from ffnkit.tasks import GenerationSettings
from ffnkit.tasks.images.files import listed
from ffnkit.tasks.instructions.chat import check_template
from ffnkit.tasks.instructions.forms import columns_at
from ffnkit.tune import CalibrationSettings, DistilSettings, TrainSettings
from ffnkit.tune.tuners import TUNERS

FILES = ["--train-file", "t.csv", "--text-column", "sentence", "--label-column", "stars"]
TUNE = ["tune", "model", *FILES, "--out", "out"]
FUSION = ["compress", "model", "--method", "fusion", "--dry-run", "--set"]
RECIPE = "name: x\nmodel: model\ntask: {train: t.csv, text: sentence, label: stars}\n"
PYTHON = ("a str", "a bool", "a list.", "a dict", "Value error", "Its settings", "learning_rate", "Traceback")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a table."""
    folder = tmp_path_factory.mktemp("lines")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 24}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=15, **sizes)).save_pretrained(folder / "model")
    (folder / "t.csv").write_text("sentence,stars\ngood film,1\nbad film,0\n")
    return folder


@pytest.fixture(autouse=True)
def here(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    monkeypatch.setattr("ffnkit.io.loading.hub_reachable", lambda timeout=3.0: False)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the process where something hangs, which pytest could not tell."""
    alarm = threading.Timer(seconds, lambda: os._exit(99))
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def line(*words: str) -> str:
    """The one line of a command that is wrong."""
    with within(150):
        result = CliRunner().invoke(app, list(words))
    errors = [each for each in result.stderr.splitlines() if each.startswith("ffnkit: error: ")]
    assert (result.exit_code, len(errors)) == (2, 1), result.stderr
    assert len(errors[0]) < 2000 and "Traceback" not in result.stderr
    return errors[0]


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "an option's number": ([*TUNE, "--lr", "-1"], ["--lr -1", "above 0|greater than 0", "5e-05"]),
    "not finite": ([*TUNE, "--epochs", "inf"], ["--epochs inf", "finite"]),
    "a truth value": ([*TUNE, "--set", "eval_batch_size=true"], ["--set eval_batch_size=true", "a number"]),
    "options together": (
        [*TUNE, "--early-stopping", "2", "--set", "keep_best=no"],
        ["--early-stopping needs keep_best"],
    ),
    "a tuner's": ([*TUNE, "--tuner", "lora", "--tuner-set", "rank=true"], ["--tuner-set rank=true", "number", "8"]),
    "no setting of a tuner": ([*TUNE, "--tuner", "lora", "--tuner-set", "rnak=4"], ["--tuner-set rnak", "rank?"]),
    "of distillation": (
        [*TUNE, "--distil-from", "model", "--distil-set", "temperature=.nan"],
        ["--distil-set temperature=nan", "finite"],
    ),
    "of decoding": ([*TUNE, "--generation-set", "num_beams=0"], ["--generation-set num_beams=0", "greater than 0"]),
    "a word for a number": ([*FUSION, "width=half"], ["width 'half'", "no number", "width=0.5"]),
    "no date": ([*FUSION, "width=2024-13-45"], ["width '2024-13-45'", "no number"]),
    "no digits": ([*FUSION, "width=0b_"], ["'0b_'"]),
    "nested": ([*FUSION, "width=" + "[" * 5000], ["within one another"]),
    "a long range": ([*FUSION, "width=0.5", "--layers", "0-999999999999"], ["layer 999999999999 has no FFN", "0-2"]),
    "many layers": ([*FUSION, "width=0.5", "--layers", "last:999999999999"], ["asks for 999999999999", "0-2"]),
    "many digits": ([*FUSION, "width=0.5", "--layers", "first:" + "9" * 5000], ["not a layer expression"]),
    "a budget": (["compress", "model", "--budget", "1.5", "--dry-run"], ["--budget 1.5", "between 0 and 1"]),
    "no budget": (["compress", "model", "--budget", "inf", "--dry-run"], ["--budget inf", "between 0 and 1"]),
    "columns": (["tune", "model", *FILES[:2], "--out", "out"], ["--text-column", "'sentence', 'stars'"]),
    "a label": (["tune", "model", *FILES[:4], "--out", "out"], ["--label-column", "'sentence', 'stars'"]),
    "a target": (
        ["tune", "model", *FILES[:2], "--input-column", "sentence", "--out", "out"],
        ["--target-column", "'sentence', 'stars'"],
    ),
    "a mistyped folder": (["inspect", "modle"], ["no such folder", "Did you mean the folder model?"]),
    "a mistyped path": (["inspect", "./modle"], ["no such folder", "Did you mean the folder model?"]),
    "no folder": (["inspect", "some/thing"], ["no such folder", "hub"]),
    "a parser's number": ([*TUNE, "--limit", "many"], ["--limit", "a whole number"]),
    "a parser's choice": ([*TUNE, "--head", "zzz"], ["--head", "'zzz' is not one of"]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_mistake_is_told_in_the_words_of_the_command(case: str) -> None:
    words, parts = COMMANDS[case]
    said = line(*words)
    assert all(any(each in said for each in part.split("|")) for part in parts), said
    assert not any(each in said for each in PYTHON), said


RECIPES: dict[str, tuple[str, list[str]]] = {
    "all mistakes": (
        "name: 1\nmodel: 2\ntask: nope\nseeds: []\narms: {a: {method: zz}}\n"
        "tune: {learning_rate: -1, steps: 0, bogus: 3}",
        ["name: 1", "model: 2", "'nope'", "seeds", "arms.a.method", "learning_rate", "tune.steps", "tune.bogus"],
    ),
    "of arms": (
        RECIPE + "arms: {a: {tune: {learning_rate: .nan, steps: true}}, b: {recover: {steps: 0}}}",
        ["a.tune.learning_rate", "a.tune.steps", "b.recover.steps"],
    ),
    "numbers": (
        RECIPE + "arms: {a: {}}\ntune: {steps: true, eps: .inf}\nlimits: {dev: true}\ntuner: {name: lora, alpha: .nan}",
        ["tune.steps", "tune.eps", "limits.dev", "tuner.alpha"],
    ),
    "no digits": ("name: 0x_", ["line 1", "'0x_'"]),
    "a tag": ("name: !!int x", ["line 1", "'x'"]),
    "a date that is none": ("name: 2024-13-45", ["model: is missing"]),
    "many digits": (f"seeds: [{'9' * 6000}]", ["line 1", "999"]),
    "deep": ("name: " + "[" * 20000, ["within one another"]),
    "deep mappings": ("name: " + "{a: " * 3000 + "}" * 3000, ["within one another"]),
    "aliases": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)) + "name: *a39",
        ["100000 values"],
    ),
    "itself": ("name: &a [*a]", ["recursive"]),
    "many mistakes": ("seeds: [" + "x, " * 10000 + "x]", ["seeds", "And "]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_is_refused_with_all_that_is_wrong(case: str) -> None:
    text, parts = RECIPES[case]
    with within(150), pytest.raises(FfnkitError) as error:
        parse(text, "r.yaml")
    said = str(error.value)
    assert all(part in said for part in parts) and len(said) < 2000 and "\n" not in said, said


def test_a_file_that_never_ends_is_no_recipe() -> None:
    with within(150), pytest.raises(FfnkitError, match="larger than"):
        load_recipe("/dev/zero")


def numbers(kind: Any) -> list[str]:
    return [name for name, info in describe.fields(kind).items() if set(info["type"].split(" | ")) & {"int", "float"}]


SETTINGS = [TrainSettings, DistilSettings, CalibrationSettings, GenerationSettings, *TUNERS]


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_no_number_is_a_truth_value_or_without_end(kind: Any) -> None:
    for name in numbers(kind):
        for wrong in (True, float("nan"), float("inf"), "inf"):
            with pytest.raises((FfnkitError, ValueError)):
                kind(**{name: wrong})


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_nor_is_one_of_a_method(kind: Any) -> None:
    for each in settings_of(kind):
        if {int, float} & set(each.kinds) and bool not in each.kinds:
            for wrong in (True, float("nan"), float("inf")):
                with pytest.raises(FfnkitError):
                    each.check(wrong)


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_the_value_that_a_line_tells_to_give_is_one(kind: Any) -> None:
    for each in settings_of(kind):
        if each.kinds == (float,):
            with pytest.raises(FfnkitError) as error:
                each.check(float("nan"))
            each.check(float(str(error.value).rpartition(f"such as {each.name}=")[2]))


def test_the_environment_is_put_in_in_paths_only(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    monkeypatch.setenv("PLACE", str(base))
    for name in ("$SECRET", "org/$SECRET", "x${SECRET}"):
        with pytest.raises(FfnkitError) as error:
            expand_model(name)
        assert "s3cret" not in str(error.value)
    assert expand("hub:$SECRET") == "hub:$SECRET"  # a data set's name
    assert expand_model("$PLACE/model") == expand("$PLACE/model") == str(base / "model")
    assert expand_model("org/model") == "org/model"
    monkeypatch.setenv("KIND", "model")
    assert expand_model("$KIND") == "model"  # a folder that is there


def test_a_recipe_reads_templates_that_are_near(tmp_path: Path, base: Path) -> None:
    outside, inside = tmp_path / "outside.jinja", tmp_path / "recipes" / "near.jinja"
    inside.parent.mkdir()
    for path in (outside, inside):
        path.write_text("{{ messages }}")
    link = base / "link.jinja"
    link.symlink_to(outside)
    recipe = inside.with_name("r.yaml")
    for template, near in ((outside, False), (link, False), (inside, True), ("alpaca", True), ("{{ x }}", True)):
        task = f"{{train: t.csv, kind: instruction, template: '{template}'}}"
        recipe.write_text(f"name: x\nmodel: model\ntask: {task}\narms: {{a: {{}}}}\n")
        if near:
            load_recipe(recipe)
        else:
            with pytest.raises(FfnkitError, match=r"task\.template.*--any-template"):
                load_recipe(recipe)
        load_recipe(recipe, any_template=True)
    outside.write_text("root:x:0:0")
    with pytest.raises(FfnkitError, match="holds no chat template"):
        check_template(str(outside))


@pytest.mark.parametrize("text", ["<script>", "a|b", "a\n# b", "[x](http://y)", "`x`", "*x*", "__x__", "&lt;"])
def test_tables_show_what_is_written_in_them(text: str) -> None:
    import xml.etree.ElementTree as ElementTree

    from markdown_it import MarkdownIt

    def shown(source: str) -> list[str]:
        root = ElementTree.fromstring(f"<all>{MarkdownIt().enable('table').render(source)}</all>")
        return [each.text or "" for each in root.iter() if each.tag in ("p", "li", "td") and not len(each)]

    wanted = " ".join(text.split())
    assert wanted in shown(one_line(text)) and wanted in shown(f"- {one_line(text)}")
    rows = [{"arm": text, "seed": 0, "status": "done", "metrics": {"accuracy": 0.5}}]
    rows.append({"arm": "bad", "seed": 0, "status": "failed", "error": text})
    table = to_markdown(summarize(rows, "accuracy"))
    assert wanted in shown(table)
    assert any(wanted in each and each.startswith("bad, seed 0") for each in shown(table)), table
    assert paragraphs("# a\n\n- b\n\n1. c") == "\\# a\n\n\\- b\n\n1\\. c\n\n"


def images(folder: Path) -> Path:
    from PIL import Image

    for name, colour in (("cats", "red"), ("dogs", "blue")):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), colour).save(folder / name / "a.png")
    return folder


def ladder(folder: Path) -> None:
    """Thirty folders of two links each: a thousand million ways down."""
    for number in range(30):
        (folder / "deep" / str(number)).mkdir(parents=True)
        for name in ("l", "r") if number else ():
            (folder / "deep" / str(number - 1) / name).symlink_to(folder / "deep" / str(number))


IN_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to itself": (lambda folder: (folder / "cats" / "up").symlink_to(folder), ""),
    "many ways": (ladder, ""),
    "a pipe": (lambda folder: os.mkfifo(folder / "cats" / "b.png"), "cats/b.png is no regular file"),
    "a device": (lambda folder: (folder / "cats" / "b.png").symlink_to("/dev/zero"), "cats/b.png is no regular file"),
    "no end": (lambda folder: (folder / "cats" / "b.png").symlink_to("gone"), "cats/b.png"),
    "huge": (lambda folder: os.truncate(folder / "cats" / "a.png", 1 << 40), "cats/a.png has"),
}


@pytest.mark.parametrize("case", IN_FOLDERS)
def test_folders_of_images_may_hold_anything(case: str, tmp_path: Path) -> None:
    change, said = IN_FOLDERS[case]
    folder = images(tmp_path / "images")
    change(folder)
    with within(150):
        if said:
            with pytest.raises(FfnkitError, match=said):
                listed(folder)
        else:
            assert listed(folder)[0]["label"] == ["cats", "dogs"]


def test_archives_of_images_may_hold_anything(tmp_path: Path) -> None:
    image = (images(tmp_path / "images") / "cats" / "a.png").read_bytes()
    names = ["cats/a.png", "dogs/b.png", "../../out/c.png", "/etc/d.png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed, tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            packed.writestr(name, image)
            (info := tarfile.TarInfo(name)).size = len(image)
            tar.addfile(info, io.BytesIO(image))
    for kind in ("zip", "tar"):
        table, passed = listed(tmp_path / f"a.{kind}")
        assert table["label"] == ["cats", "dogs"] and passed == 2
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[raw.index(b"PK\1\2") + 8] |= 1  # the first member is encrypted
    (tmp_path / "b.zip").write_bytes(raw)
    head = bytearray((tmp_path / "a.tar").read_bytes())
    head[124:136] = b"\x80" + b"\x7f" * 11  # the size of the first member
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    (tmp_path / "b.tar").write_bytes(head)
    for name in ("b.zip", "b.tar"):
        with pytest.raises(FfnkitError, match=f"images .*{name}"):
            listed(tmp_path / name)
    with pytest.raises(FfnkitError, match="unknown kind of file"):
        listed("/dev/zero")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.plan", "a.csv", "a.jsonl"):
        os.mkfifo(tmp_path / name)
    with within(150):
        with pytest.raises(FfnkitError, match="no regular file"):
            Plan.load(tmp_path / "a.plan")
        assert columns_at(tmp_path / "a.csv") == columns_at(tmp_path / "a.jsonl") == []


def test_a_fault_of_our_own_is_a_traceback_and_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any) -> Any:
        raise AttributeError("a fault\nof ours " + "x" * 5000)

    monkeypatch.setattr("ffnkit.inspect", broken)
    result = CliRunner().invoke(app, ["inspect", "model"])
    *before, last = result.stderr.rstrip().splitlines()
    assert result.exit_code == 1 and any(each.startswith("Traceback") for each in before)
    assert last.startswith("ffnkit: error: AttributeError: a fault of ours") and "please report it" in last
    assert len(last) < 1000


def test_sparse_settings_still_build() -> None:
    """What is refused above is no more than that: numbers of either kind, words where they are settings."""
    assert build("fusion", width=3).width == 3 and build("fusion", width=0.5).width == 0.5
    assert (
        TrainSettings(steps=3, warmup=0, schedule="cosine_with_restarts", schedule_options={"num_cycles": 1}).warmup
        == 0
    )
