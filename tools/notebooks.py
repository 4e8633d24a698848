"""The tutorials as notebooks, from their pages: ``python tools/notebooks.py`` writes docs/tutorials/*.ipynb.

A block of Python becomes a cell of code, what stands between blocks a cell of text. The page is what is edited.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted(TUTORIALS.glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def cells(page: str) -> list[tuple[str, str]]:
    """(kind, text) of each cell of a page, in order; kinds are those of notebooks: markdown and code."""
    parts = _BLOCK.split(page)
    kinds = ("markdown", "code")
    found = [(kinds[number % 2], part.strip("\n")) for number, part in enumerate(parts)]
    return [(kind, text) for kind, text in found if text]


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page, without outputs."""
    made = []
    for number, (kind, text) in enumerate(cells(page)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell |= {"source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text(page: Path) -> str:
    """What the file of a page's notebook holds."""
    return json.dumps(notebook(page.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for page in PAGES:
        page.with_suffix(".ipynb").write_text(text(page), encoding="utf-8")
