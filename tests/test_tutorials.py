"""The tutorials run as they stand: their notebooks are those of the pages, and every cell runs on small models."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NOTEBOOKS = loaded("notebooks")
RUN = """
import sys
import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

book = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(book)
manager = AsyncKernelManager(kernel_name="python3")
manager.kernel_spec.argv[0] = sys.executable  # not that of a kernel installed for the user
NotebookClient(book, km=manager, timeout=800).execute()
print("".join(out.get("text", "") for cell in book.cells for out in cell.get("outputs", [])))
"""


@pytest.mark.parametrize("page", NOTEBOOKS.PAGES, ids=lambda page: page.stem)
def test_a_notebook_is_that_of_its_page(page: Path) -> None:
    stored = page.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert stored == NOTEBOOKS.text(page), "run tools/notebooks.py"
    assert NOTEBOOKS.text(page) != stored.replace("import ffnkit as fk", "import ffnkit", 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", NOTEBOOKS.PAGES, ids=lambda page: page.stem)
def test_a_notebook_runs(page: Path, minilm_path: Path, models_dir: Path, tmp_path: Path) -> None:
    for name in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(name)
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"MODEL": str(models_dir / "stories260K"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    command = [sys.executable, "-c", RUN, str(page.with_suffix(".ipynb"))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "neurons" in done.stdout
