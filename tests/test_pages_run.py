"""Every block of Python and of the shell on the pages runs as pasted, on models that stand in under the same names.

Only the tokens of calibration are fewer, where a line does not say how many.

Blocks that cannot run are listed with the reason, and the list is exact. The pages on deployment, on adding, the
walkthrough's order and the tutorials have tests of their own (test_deployment, test_docs, test_tutorials).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
import transformers
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit.cli.group import filled
from ffnkit.cli.program import app

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"deployment.md", "adding.md"}  # pages whose blocks other tests run
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in ELSEWHERE)]
SHELL = ("", "bash", "sh")
MINUTES = "takes minutes; tests/test_recipe_run.py runs small recipes"
HUB = "takes what only the hub has"
NOT_RUN = {  # of a page: a command or the first line of a Python block, and why it does not run here
    "README.md": {
        "pip install": "the environment has it; the session readme of noxfile.py installs the wheel",
    },
    "analysis.md": {
        "ffnkit analyze roberta-base --methods": "kernels of a task's rows take a minute: tests/test_analysis.py",
        "ffnkit analyze ./llama --methods all": "all methods, minutes: tests/test_analysis.py runs each",
        "ffnkit analyze quickstart": "the real model, a minute",
        "ffnkit analyze MODEL": "shown with what it printed",
    },
    "budgets.md": {
        "ffnkit compress ./llama --target latency": "measures speeds for minutes: tests/test_side_by_side.py",
    },
    "calibration.md": {"ffnkit calibrate ./model --merge": "more.safetensors is another machine's half"},
    "checkpoints.md": {"model = fk.load": "bitsandbytes has no kernels here: tests/test_tied_quantized.py"},
    "healing.md": {
        "ffnkit compress ./llama --set width=0.75 --text notes.txt --heal": "heals for minutes: tests/test_healing.py",
        "found = fk.heal": "heals for minutes: tests/test_healing.py",
    },
    "instructions.md": {"ffnkit tune ./llama --task oasst1": HUB},
    "merging.md": {
        "ffnkit tune merged --task sst2 --tuner lora": "4-bit kernels: tests/test_tied_quantized.py",
        "from ffnkit import tune": "4-bit kernels: tests/test_tied_quantized.py",
    },
    "pruning.md": {"fk.apply(model, fk.plan(model, fk.DSEE())": "after a training: tests/test_pruning.py"},
    "recipes.md": {"ffnkit run": MINUTES},
    "searching.md": {"ffnkit search": "takes minutes: tests/test_search.py"},
    "structured.md": {
        "fk.apply(model, fk.plan(model, fk.DSEE(targets=": "updates have to be tuned first: tests/test_structured.py",
    },
    "tasks.md": {
        "ffnkit eval tuned-mnli": "the rows of --split test are the hub's",
        "ffnkit eval tuned-cola": "the rows of --split test are the hub's",
        "python benchmarks/": "trains for minutes: tests/test_train_small.py",
    },
    "tuning.md": {
        "torchrun": "several processes: tests/test_sharding.py",
        "accelerate": "several processes: tests/test_sharding.py",
    },
}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block."""
    language: str | None = None
    body: list[str] = []
    for line in text.splitlines():
        if not line.startswith("```"):
            body.append(line)
        elif language is None:
            language, body = line[3:], []
        else:
            yield language, "\n".join(body)
            language = None


def commands(text: str) -> list[str]:
    """The commands of a block, one a line; comments and what was printed are left out."""
    lines = [line.removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(ffnkit|python|pip|torchrun|accelerate) ", line + " ")]


def pieces(page: Path) -> list[tuple[str, str]]:
    """What a page lets its reader run, in order: a block of Python, a command, or a whole block of the shell."""
    found = []
    for language, text in blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            found.append(("python", text))
        elif language in SHELL and commands(text):
            whole = "<<" in text or "COLUMNS" in text
            found += [("bash", text)] if whole else [("shell", line) for line in commands(text)]
    return found


def reason(page: Path, piece: str) -> str | None:
    known = NOT_RUN.get(page.name, {})
    return next((known[start] for start in known if piece.startswith(start)), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_list_of_what_does_not_run_is_exact(page: Path) -> None:
    starts = list(NOT_RUN.get(page.name, {}))
    found = [piece for _, piece in pieces(page)]
    assert [start for start in starts if not any(piece.startswith(start) for piece in found)] == []


def test_what_stands_in_a_block_is_found() -> None:
    text = "```python\na = 1\n```\n\nwords ```\n\n```\n$ ffnkit inspect MODEL \\\n  --json  # why\ntable\n```\n"
    found = list(blocks(text.replace("words ```", "words")))
    assert [language for language, _ in found] == ["python", ""]
    assert commands(found[1][1]) == ["ffnkit inspect MODEL    --json  # why"]


# --- what a page takes as there already

GIVEN = """
import copy, torch, transformers
import ffnkit as fk
from ffnkit import tasks, tune
from ffnkit.tasks.classification.label_words import WordsTask
from transformers import AutoTokenizer, AutoModelForCausalLM, AutoModelForSequenceClassification

def classifier():
    return AutoModelForSequenceClassification.from_pretrained("roberta-base").eval()

tokenizer = AutoTokenizer.from_pretrained("roberta-base")
model = classifier()
texts = ["a cat sat", "a dog ran far", "it was late", "she sang a song"] * 3
batches = [dict(tokenizer(texts, padding=True, return_tensors="pt"), labels=torch.tensor([0, 1] * 6))] * 4
train, test, fresh = batches, batches, batches
settings = tune.TrainSettings(steps=2, batch_size=4)
"""
WRITER = """
model = AutoModelForCausalLM.from_pretrained("./model").eval()
words = AutoTokenizer.from_pretrained("./model")
batches = [dict(input_ids=words("Once upon a time there was a cat", return_tensors="pt").input_ids)] * 2
"""
MORE = {  # (page, number of its Python block): what is there by then
    ("budgets.md", 0): WRITER,
    ("calibrated.md", 1): "model = classifier()",
    ("calibration.md", 0): WRITER,
    ("composition.md", 1): "model = classifier()",
    ("checkpoints.md", 1): "fk.apply(model, fk.plan(model, fk.DSEE()))",
    ("generation.md", 0): "predictions = ['a cat'] * 12",
    ("healing.md", 0): "compressed = fk.apply(classifier(), plan := fk.plan(model, fk.Fusion(width=0.5)))",
    ("merging.md", 1): "model = classifier()",
    ("pruning.md", 1): "model = classifier()",
    ("pruning.md", 2): "model = classifier()\nfk.apply(model, fk.plan(model, fk.DSEE()))",
    ("structured.md", 2): "model = classifier()",
    ("tuning.md", 1): "model, plan = classifier(), fk.plan(classifier(), fk.Fusion(width=0.25))",
    ("walkthrough.md", 0): "inputs = {k: v for k, v in batches[0].items() if k != 'labels'}",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path, models_dir: Path, data_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("world")
    transformers.utils.logging.disable_progress_bar()
    standins.stand_in(root, minilm_path, models_dir / "stories260K", data_dir)
    return root


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one page's own."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FFNKIT_DATA", str(folder / "data"))
    return folder


def in_a_process(text: str) -> None:
    for out in re.findall(r"--out (\S+)", text):
        shutil.rmtree(out, ignore_errors=True)  # what stands in under that name
    text = text.replace("quickstart", "MODEL")  # the real one: the session readme of noxfile.py
    program = f'ffnkit() {{ {shlex.quote(sys.executable)} -m ffnkit "$@"; }}\n'
    program += f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = ["bash", "-ec", program + text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1700)
    assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def command(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    out = words[words.index("--out") + 1] if "--out" in words else ""
    if out and out not in words[: words.index("--out")]:  # what stands in, or what another line of a choice wrote
        shutil.rmtree(out, ignore_errors=True)
    if words[0] in ("compress", "calibrate") and "--tokens" not in words and {"--text", "--task"} & {*words}:
        words += ["--tokens", "512"]
    if "--energy" in words:  # as many rows as there are
        words += ["--batches", "2", "--fresh", "1", "--batch-size", "8"]
    with contextlib.ExitStack() as kept:
        kept.callback(torch.set_rng_state, torch.get_rng_state())
        done = CliRunner().invoke(app, filled(words))
    assert done.exit_code == 0, f"{line}\n{done.output[-2000:]}\n{done.exception!r}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs_as_pasted(page: Path, here: Path) -> None:
    run(page)


def run(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    found = pieces(page)
    if any(kind == "python" and not reason(page, text) for kind, text in found):
        exec(compile(GIVEN, "given", "exec"), names)
    number = 0
    for kind, text in found:
        if kind == "python":
            exec(compile(MORE.get((page.name, number), ""), "given", "exec"), names)
            number += 1
        if reason(page, text):
            continue
        if kind == "python":
            exec(compile(text, f"{page.name}, block {number} of Python", "exec"), names)
        elif kind == "bash" or not text.startswith("ffnkit"):
            in_a_process(text)
        else:
            command(text)


@pytest.mark.slow
def test_a_block_that_fails_is_found(here: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\nffnkit inspect roberta-base\n```\n\n```python\nfk.plan(model, fk.Fusion(width=2.0))\n```\n")
    with pytest.raises(fk.FfnkitError, match="width"):
        run(page)
    page.write_text("```\nffnkit inspect no-such-folder\n```\n")
    with pytest.raises(AssertionError, match="no-such-folder"):
        run(page)
