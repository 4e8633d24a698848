"""The pages are true: the package of docs/adding.md runs, names on the pages exist, the picture is that of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
