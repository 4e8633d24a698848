"""The public types: what a user writes passes strict checks, and what is wrong in it does not."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What the pages' examples take for granted.
GIVEN = """\
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

import ffnkit as fk
from ffnkit import tasks, tune

__all__ = ["BitsAndBytesConfig", "fk", "torch", "tune"]
Batches = list[dict[str, torch.Tensor]]
model: PreTrainedModel
tokenizer: PreTrainedTokenizerBase
task: tasks.Task
splits: tasks.Splits[Any]
batches: Batches
train: Batches
test: Batches
fresh: Batches
predictions: list[str]
plan: fk.Plan
"""

HEAD = "import ffnkit as fk\nfrom ffnkit import tasks, tune\nfrom given import model, plan\n"

# Lines that both checkers have to refuse, and a part of what mypy says of each.
WRONG = {
    "fk.Fusion(widht=0.25)": "Unexpected keyword",
    "fk.Fusion(width='a quarter')": "incompatible type",
    "fk.Merging(take='median')": "incompatible type",
    "fk.plan(model, 3)": "incompatible type",
    "fk.plan(model, fk.Fusion)": "incompatible type",
    "tune.TrainSettings(learning_rat=1e-4)": "Unexpected keyword",
    "tune.TrainSettings(learning_rate='high')": "incompatible type",
    "tasks.GenerationSettings(num_beams=[4])": "incompatible type",
    "fk.load('out').no_such_method(3)": "",
    "fk.apply(model, plan).no_such_method(3)": "",
    "fk.allocat(model)": "",
}


# Examples that fail by other packages' types.
OTHERS = (
    "moe_1",  # decoder_start_token_id is missing in transformers
    "deployment_2",  # trl says that its trainer's model may be none
)


def examples() -> dict[str, str]:
    """The complete examples of the pages whose packages are all here, by a name for a file."""
    found = {}
    for page in PAGES:
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)):
            needed = re.findall(r"^(?:import|from) (\w+)", block, re.M)
            if re.match(r"(import|from) ", block) and all(map(importlib.util.find_spec, needed)):
                found[f"{page.stem.lower()}_{number}"] = block
    return {name: block for name, block in found.items() if name not in OTHERS}


def standing_alone(block: str) -> str:
    """An example with what it takes for granted before it."""
    tree = ast.parse(block)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {(a.asname or a.name).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    made |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    free = sorted({node.id for node in names} - made - set(dir(builtins)))
    return "".join(f"from given import {name}\n" for name in free) + block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project: the pages' examples, and the lines that are wrong."""
    folder = tmp_path_factory.mktemp("project")
    for name, block in examples().items():
        (folder / f"{name}.py").write_text(standing_alone(block))
    (folder / "given.py").write_text(GIVEN)
    (folder / "wrong.py").write_text(HEAD + "\n".join(WRONG) + "\n")
    return folder


def said(folder: Path, command: list[str]) -> str:
    environment = os.environ | {"MYPYPATH": str(SRC), "PYTHONPATH": str(SRC)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # found errors: those of wrong.py at least
    return done.stdout


def by_mypy(folder: Path) -> dict[tuple[str, int], str]:
    """What mypy says, without any plugin, by file and line."""
    cache = ROOT / ".mypy_cache" / "strict"
    options = [
        "--strict",
        "--untyped-calls-exclude=transformers",
        "--config-file=",
        "--follow-imports=silent",
        "--no-error-summary",
        f"--cache-dir={cache}",
    ]
    text = said(folder, [sys.executable, "-m", "mypy", *options, "."])
    found: dict[tuple[str, int], str] = {}
    for name, line, what in re.findall(r"^(.+?)\.py:(\d+): error: (.*)$", text, re.M):
        found[name, int(line)] = found.get((name, int(line)), "") + what
    return found


def by_basedpyright(folder: Path) -> dict[tuple[str, int], str]:
    """What basedpyright reports as errors, by file and line."""
    settings = {"pythonVersion": "3.11", "extraPaths": [str(SRC)], "include": ["."]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    text = said(folder, [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable])
    found: dict[tuple[str, int], str] = {}
    for each in json.loads(text)["generalDiagnostics"]:
        if each["severity"] == "error":
            place = Path(each["file"]).stem, each["range"]["start"]["line"] + 1
            found[place] = found.get(place, "") + each["message"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checker", [by_mypy, by_basedpyright])
def test_what_users_write_is_typed(checker, folder: Path) -> None:
    pytest.importorskip("mypy" if checker is by_mypy else "basedpyright")
    found = checker(folder)
    first = HEAD.count("\n") + 1
    missed = [line for number, line in enumerate(WRONG, first) if ("wrong", number) not in found]
    assert not missed  # the negative control: both refuse what is wrong
    assert not {place: what for place, what in found.items() if place[0] != "wrong"}
    if checker is by_mypy:
        for number, expected in enumerate(WRONG.values(), first):
            assert expected in found["wrong", number]
