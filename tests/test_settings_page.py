"""docs/settings.md names every setting: of every method and tuner, with every score and every other choice."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ffnkit import methods
from ffnkit.tune import TUNERS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "tools" / "settings_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(page: str, part: str, name: str) -> str:
    """What a page says of one method or tuner."""
    here = page.partition(f"\n## {part}\n")[2].partition("\n## ")[0]
    return re.split(r"\n### ", here.partition(f"\n### {name}\n")[2])[0]


def missing(page: str, part: str, row: dict[str, Any]) -> list[str]:
    """Settings of a method or tuner, and choices of them, that its section of the page does not name."""
    told, found = section(page, part, row["name"]), []
    for name, each in row["settings"].items():
        lines = [line for line in told.splitlines() if line.startswith(f"| `{name}` |")]
        found += [f"{name}={one}" for one in TOOL.choices(each) if one not in lines[0]] if lines else [name]
    return found


TOOL = tool()
ROWS = {part: {row["name"]: row for row in rows} for part, rows in (
    ("Methods", TOOL.lists.method_rows()), ("Tuners", TOOL.lists.tuner_rows()),
)}  # fmt: skip


def test_the_page_is_that_of_the_declarations() -> None:
    assert TOOL.text() == PAGE, "run tools/settings_page.py"


@pytest.mark.parametrize("kind", methods.METHODS, ids=lambda kind: kind.name)
def test_every_setting_of_a_method_is_there(kind: Any) -> None:
    declared = {field.name for field in dataclasses.fields(kind) if field.init}
    assert set(ROWS["Methods"][kind.name]["settings"]) == declared
    assert missing(PAGE, "Methods", ROWS["Methods"][kind.name]) == []


@pytest.mark.parametrize("kind", TUNERS, ids=TOOL.lists.named)
def test_every_setting_of_a_tuner_is_there(kind: Any) -> None:
    row = ROWS["Tuners"][TOOL.lists.named(kind)]
    assert set(row["settings"]) == set(kind.model_fields) - {"name"}
    assert f"\n### {row['name']}\n" in PAGE.partition("\n## Tuners\n")[2] and missing(PAGE, "Tuners", row) == []


def test_a_setting_that_is_left_out_is_found() -> None:
    heads = ROWS["Methods"]["heads"]
    assert missing(PAGE.replace("| `remove` |", "| `x` |"), "Methods", heads) == ["remove"]
    assert missing(PAGE.replace("coefficients", ""), "Methods", heads) == ["by=coefficients"]
