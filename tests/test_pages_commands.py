"""Commands on the pages and in the helps are ones that the command line takes; messages told are those of the code."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ffnkit import methods
from ffnkit.cli.group import filled
from ffnkit.cli.program import app
from ffnkit.recipe import shipped

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUP: Any = typer.main.get_command(app)
FENCE = re.compile(r"^```(?:bash|sh|)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of ffnkit in a piece of text, one a line that begins with it; continued lines are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (line.strip().removeprefix("$ ") for line in lines)
    return [line for line in found if re.match(r"(?:\w+=\S* )*ffnkit( |$)", line)]


def wrong(line: str) -> str:
    """What the command line would refuse of a command before it looks at any file; "" for nothing."""
    line = re.sub(r"\$COLUMNS\b", "--train-file a --text-column b", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    words = words[words.index("ffnkit") + 1 :]
    ends = [words.index(mark) for mark in ("|", ">", ";") if mark in words]
    words = words[: min(ends)] if ends else words
    if not words or words[0].startswith("-"):
        return ""
    words = filled(words)
    command = GROUP.commands.get(words[0])
    if command is None:
        return f"there is no command {words[0]}"
    try:
        values = command.make_context(words[0], words[1:]).params
    except Exception as error:  # of the parser: it names what it does not know
        if type(error).__name__ == "Exit":
            return ""
        return getattr(error, "message", "") or str(error)
    if (name := values.get("method")) and name not in {each.name for each in methods.known()}:
        return f"there is no method {name}"
    if words[0] == "run" and (name := str(values["recipe"] or "")) and "." not in name and name not in shipped.names():
        return f"there is no recipe {name}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken(page: Path) -> None:
    found = commands("\n".join(FENCE.findall(page.read_text(encoding="utf-8"))))
    assert {line: told for line in found if (told := wrong(line))} == {}


def test_commands_of_the_helps_are_taken() -> None:
    texts = [GROUP.help, *(command.help or command.callback.__doc__ for command in GROUP.commands.values())]
    plain = [re.sub(r"\[/?(?:bold|cyan|dim)\]", "", text).replace("\\[", "[") for text in texts]
    found = [line for text in plain for line in commands(re.sub(r"(\S)\n +(--)", r"\1 \2", text))]
    assert len(found) > 30
    assert {line: told for line in found if (told := wrong(re.sub(r"  +\S.*$", "", line)))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "ffnkit tuen small",
        "ffnkit tune small --task sst2",  # no --out: a line that lost its continuation
        "ffnkit compress m --widht 0.5 --out o",
        "ffnkit compress m --method fusoin --out o",
        "ffnkit compress m --form standart --out o",
        "ffnkit run recipes_of_old/sst2_minilm --out o",
    ],
)
def test_wrong_commands_are_found(line: str) -> None:
    assert wrong(line) != ""


MESSAGE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def test_messages_of_the_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    found = MESSAGE.findall(page)
    assert len(found) > 15
    assert [message for message in found if message not in source] == []
    assert "there is no such fiel" not in source


@pytest.mark.slow
def test_the_text_for_assistants_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("llms", ROOT / "tools" / "llms.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    told = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    assert told == tool.text(), "run tools/llms.py"
    assert all(f"### {tuner}\n" in told for tuner in map(str, (t["name"] for t in tool.lists.tuner_rows())))
