"""docs/settings.md, every setting of every method and tuner: ``python tools/settings_page.py`` writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ffnkit.cli import lists

TARGET = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
START = """# All settings

Of every method (`--set NAME=VALUE`, a keyword in Python, `arms:` of a recipe) and tuner (`--tuner-set NAME=VALUE`),
as `ffnkit methods` and `ffnkit tuners` print them. This page is written by `tools/settings_page.py` from the
declarations in the code, which are checked when a setting is given; what a method does, and when to take which value,
is on its own page.
"""


def text() -> str:
    """The whole page."""
    parts = [START]
    for title, rows in (("Methods", lists.method_rows()), ("Tuners", lists.tuner_rows())):
        parts += [f"## {title}\n", *(_section(row) for row in rows)]
    return "\n".join(parts).rstrip() + "\n"


def _section(row: dict[str, Any]) -> str:
    head = f"### {row['name']}\n\n{row['description'][:1].upper()}{row['description'][1:]}.\n"
    settings = row["settings"]
    if not settings:
        return f"{head}\nNo settings.\n"
    table = [f"| `{name}` | {_default(one)} | {_cell(_meaning(one))} |" for name, one in settings.items()]
    return "\n".join(
        [head, "<!-- given: *: settings -->\n", "| setting | default | meaning |", "|---|---|---|", *table, ""]
    )


def choices(setting: dict[str, Any]) -> list[str]:
    """What a setting may be, where its type lists it."""
    return re.findall(r"'([^']+)'", setting["type"]) if "Literal[" in setting["type"] else []


def _meaning(setting: dict[str, Any]) -> str:
    said = setting.get("help") or ""
    open_ones = [each for each in choices(setting) if each not in said]
    return f"{said} One of {', '.join(choices(setting))}." if open_ones else said


def _default(setting: dict[str, Any]) -> str:
    if "default" not in setting:
        return "required"
    value = setting["default"]
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _cell(words: str) -> str:
    return words.replace("``", "`").replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
