"""The pages are true: the package of docs/adding.md runs, names on the pages exist, the picture is that of the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from families import FAMILIES

import ffnkit

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"```(?:python|toml)\n# (\S+\.(?:py|toml))\n(.*?)```", re.DOTALL)


def complete_blocks(text: str) -> dict[str, str]:
    """File name -> content of the blocks of a page that are whole files: their first line says which."""
    return dict(BLOCK.findall(text))


def install(text: str, folder: Path) -> None:
    """Write the package of a page as if it were installed there, with its entry points."""
    files = complete_blocks(text)
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
        (folder / name).with_name("__init__.py").touch()
    metadata = folder / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"]
    (metadata / "METADATA").write_text("".join(lines), encoding="utf-8")
    groups = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in rows.items())
        for group, rows in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")


WORKER = """
import sys, torch
torch.set_num_threads(1)
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from ffnkit import edits, methods
from small import test_contract
from small.edit import RoundNeurons
from small.method import Halve

assert methods.get("halve") is Halve and RoundNeurons in edits.known()
failed = 0
for name, check in vars(test_contract).items():
    if name.startswith("test_"):
        try:
            check()
            print(name, "passed")
        except AssertionError as error:
            print(name, "failed:", error)
            failed += 1
sys.exit(bool(failed))
"""


def run_package(text: str, folder: Path) -> tuple[int, str]:
    """Exit status and what was printed of the tests of a page's package, in a fresh process."""
    install(text, folder)
    source = Path(ffnkit.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{folder}"}
    done = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
def test_the_package_of_the_page_on_adding_keeps_the_contract(tmp_path: Path) -> None:
    status, printed = run_package((DOCS / "adding.md").read_text(encoding="utf-8"), tmp_path)
    assert status == 0, printed
    assert [line.split()[0] for line in printed.splitlines() if line.endswith(" passed")] == [
        "test_the_family",
        "test_the_method",
        "test_the_edit",
    ]


MISTAKES = {
    "return old.map(rounded)": "return old.map(lambda value: value.copy_(rounded(value)))",
    "return dataclasses.asdict(self)": 'return {"layer": self.layers}',
}


@pytest.mark.slow
def test_mistakes_in_the_package_of_the_page_are_found_by_name(tmp_path: Path) -> None:
    text = (DOCS / "adding.md").read_text(encoding="utf-8")
    for right, wrong in MISTAKES.items():
        assert right in text
        text = text.replace(right, wrong)
    status, printed = run_package(text, tmp_path)
    assert status == 1
    assert "test_the_family passed" in printed
    assert "test_the_edit failed: numbers are new tensors" in printed
    assert "test_the_method failed: settings round-trip" in printed


# --- one model's way through the code

STEP = re.compile(r"^\d+\. `([\w/]+\.py):([\w.]+)`", re.MULTILINE)


def sections(text: str) -> dict[str, list[str]]:
    """Call -> the functions named below it, of docs/walkthrough.md."""
    parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)[1:]
    return {
        name: [f"{file}:{function}" for file, function in STEP.findall(body)]
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def called(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and the functions of ffnkit in the order in which it called them first."""
    package = f"{Path(ffnkit.__file__).parent}{os.sep}"
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            found.setdefault(f"{code.co_filename.removeprefix(package)}:{code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        return run(), list(found)
    finally:
        sys.setprofile(before)


def disorder(named: list[str], made: list[str]) -> str:
    """What is wrong with the order of named calls; "" where they were made, in this order."""
    missing = [name for name in named if name not in made]
    if missing:
        return f"{missing[0]} is not called"
    places = [made.index(name) for name in named]
    late = [a for a, b, first, then in zip(named, named[1:], places, places[1:], strict=False) if first > then]
    return f"{late[0]} comes later" if late else ""


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("way")
    model: Any = FAMILIES["bert"].model()
    inputs = FAMILIES["bert"].inputs(model)
    vars(ffnkit).pop("inspect", None)  # loaded already, by other tests
    made: dict[str, list[str]] = {}

    def train() -> None:
        optimizer = torch.optim.AdamW(ffnkit.trainable_parameters(model), lr=1e-3)
        model(**inputs).logits.square().mean().backward()
        optimizer.step()

    fusion: Any = ffnkit.Fusion(width=0.5, layers="all")
    _, made["inspect"] = called(lambda: ffnkit.inspect(model))
    plan, made["plan"] = called(lambda: ffnkit.plan(model, fusion))
    _, made["apply"] = called(lambda: ffnkit.apply(model, plan))
    _, made["train"] = called(train)
    _, made["save"] = called(lambda: ffnkit.save(model, folder / "compact"))
    opened, made["load"] = called(lambda: ffnkit.load(folder / "compact"))
    _, made["export"] = called(lambda: ffnkit.export(opened, folder / "standard"))
    return made


WAY = sections((DOCS / "walkthrough.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("call", ["inspect", "plan", "apply", "train", "save", "load", "export"])
def test_the_walkthrough_names_the_calls_in_order(call: str, way: dict[str, list[str]]) -> None:
    assert set(WAY) == set(way)
    assert disorder(WAY[call], way[call]) == ""
    assert disorder(WAY[call][::-1], way[call])
    assert disorder([*WAY[call], "edits/masks.py:Mask.perform"], way[call])


# --- the picture


def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("picture", ROOT / "tools" / "picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["picture"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


PICTURE = picture()


@cache
def here() -> dict[str, Any]:
    return PICTURE.rooms()


def stale(svg: str, rooms: dict[str, Any]) -> str:
    """What a picture does not show of the code; "" where it is up to date. Sizes may be a quarter off."""
    shown = dict(re.findall(r'data-room="(\w+)" data-lines="(\d+)"', svg))
    if list(shown) != list(rooms):
        return f"rooms {list(shown)}"
    sizes = [n for n, room in rooms.items() if abs(int(shown[n]) - room.lines) > max(room.lines / 4, 100)]
    drawn = set(re.findall(r'data-from="(\w+)" data-to="(\w+)"', svg))
    odd = sorted(drawn ^ {(source, target) for source, target, _ in PICTURE.arrows(rooms)})
    return f"{sizes[0]}'s lines" if sizes else " to ".join(odd[0]) if odd else ""


def test_the_picture_is_that_of_the_code() -> None:
    odd = stale((DOCS / "architecture.svg").read_text(encoding="utf-8"), here())
    assert odd == "", f"{odd}: run tools/picture.py"


def test_the_picture_is_drawn_the_same_each_time() -> None:
    drawn = PICTURE.draw(here())
    assert drawn == PICTURE.draw(here())
    assert stale(drawn, here()) == ""
    ElementTree.fromstring(drawn)


def test_an_old_picture_is_found() -> None:
    drawn = PICTURE.draw(here())
    lost = re.sub(r'<path class="a" data-from="surgery" data-to="edits".*?</path>', "", drawn)
    assert stale(lost, here()) == "surgery to edits"
    assert stale(drawn.replace('data-room="budget"', 'data-room="costs"'), here()).startswith("rooms")
    assert stale(re.sub(r'(data-room="tasks" data-lines=)"\d+"', r'\1"9"', drawn), here()) == "tasks's lines"


def test_an_import_that_points_up_is_red(tmp_path: Path) -> None:
    for name, source in {"high": "from ffnkit.low import x", "low": "import ffnkit.high.more"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f'"""{name}."""\n{source}\n', encoding="utf-8")
    design = tmp_path / "design.md"
    design.write_text("## Layers\n\n```\nhigh/   above\nlow/    below\n```\n", encoding="utf-8")
    rooms = PICTURE.rooms(tmp_path, design)
    assert PICTURE.arrows(rooms) == [("high", "low", 1), ("low", "high", 1)]
    red = [line for line in PICTURE.draw(rooms).splitlines() if f'stroke="{PICTURE.UP}"' in line]
    assert len(red) == 1 and 'data-from="low"' in red[0]
    assert f'stroke="{PICTURE.UP}"' not in PICTURE.draw(here())


# --- names

NAME = re.compile(r"(?<![\w./-])((?:[a-z_]\w*/)+\w+\.py|[a-z_]\w*\.py)(?::(\w+(?:\.\w+)*))?(?![\w/])")
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]


def missing_names(text: str) -> list[str]:
    """Files, and functions in them, that a page names and that are not there; "file.py:name" or "file.py"."""
    text = BLOCK.sub("", text)
    found = []
    for file, name in NAME.findall(text):
        homes = [ROOT / file, ROOT / "src" / "ffnkit" / file, ROOT / "src" / file]
        home = next((path for path in homes if path.is_file()), None)
        if home is None:
            found.append(file)
        elif name and not defines(home, name):
            found.append(f"{file}:{name}")
    return found


def defines(file: Path, name: str) -> bool:
    """Whether a module defines a function or class by that qualified name."""
    body: Any = ast.parse(file.read_text(encoding="utf-8")).body
    for part in name.split("."):
        body = [n for each in body for n in (each.body if isinstance(each, ast.If) else [each])]
        kinds = ast.FunctionDef | ast.ClassDef
        node = next((n for n in body if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            return False
        body = node.body
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_functions_named_on_a_page_exist(page: Path) -> None:
    assert missing_names(page.read_text(encoding="utf-8")) == []


def test_names_that_do_not_exist_are_found() -> None:
    text = "`blocks.py`, `model/ffn.py:FFN.read`, `model/ffn.py:FFN.reads`, `surgery/apply.py:apply`, `edits/none.py`"
    assert missing_names(text) == ["blocks.py", "model/ffn.py:FFN.reads", "edits/none.py"]


DOTTED = re.compile(r"\bffnkit((?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?)(?![\w/])")
GROUPS = ("ffnkit.methods", "ffnkit.edits", "ffnkit.families", "ffnkit.attentions")  # of entry points
IMPORT = re.compile(r"^from (ffnkit[\w.]*) import ([\w, ]+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def missing_imports(text: str) -> list[str]:
    """Dotted names below ffnkit on a page, and what its code imports, that cannot be reached."""
    names = [f"ffnkit{path}" for path in DOTTED.findall(text)]
    names += [f"{module}.{name.strip()}" for module, names in IMPORT.findall(text) for name in names.split(",")]
    return [name for name in dict.fromkeys(names) if name not in GROUPS and not reached(name)]


def reached(name: str) -> bool:
    """Whether a dotted name is a module, or what one holds."""
    value: Any = ffnkit
    path = "ffnkit"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(path)
            except ImportError:
                return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_links_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_imports(text) == []
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_modules_that_do_not_exist_are_found() -> None:
    text = "`ffnkit.blocks`, `ffnkit.model.ffn.FFN`, `ffnkit.methods.heads.SCORES`\nfrom ffnkit.edits import Edit, Keep"
    assert missing_imports(text) == ["ffnkit.blocks", "ffnkit.methods.heads.SCORES", "ffnkit.edits.Keep"]
