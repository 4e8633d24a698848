"""``ffnkit exec``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ffnkit.cli.application import app
from ffnkit.errors import FfnkitError

_AS_GIVEN = {"ignore_unknown_options": True, "allow_interspersed_args": False}
STARTUP = Path(__file__).parent / "startup"  # holds sitecustomize.py


@app.command("exec", rich_help_panel="Models", context_settings=_AS_GIVEN)
def execute(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="A command and its arguments, after --.")],
) -> None:
    """Run a tool with ffnkit imported in every Python that it starts, so that it opens compact checkpoints.

    Console scripts, python -m and child processes alike. The tool's exit code is that of this command.

    [bold]Examples[/bold]

      ffnkit exec -- lm_eval --model hf --model_args pretrained=./small --tasks hellaswag

      ffnkit exec -- python -m pytest tests
    """
    words, environment = command, with_hook(dict(os.environ))
    if (flag := ignoring(words)) is not None:
        found = f"-{flag} has Python start without what is imported at its start, ffnkit among it"
        raise FfnkitError(f"ffnkit exec -- {words[0]} -{flag}", found, "Leave that flag out")
    program = sys.executable if words[0] in ("python", "python3") else shutil.which(words[0])
    if program is None:
        beside = Path(sys.executable).with_name(words[0])  # scripts of an environment that is not activated
        program = str(beside) if beside.is_file() else None
    if program is None:
        do = "Install it, or give its path; a module runs as: ffnkit exec -- python -m NAME"
        raise FfnkitError(f"ffnkit exec -- {words[0]}", "there is no such command", do)
    sys.stdout.flush()
    if os.name == "nt":
        raise typer.Exit(subprocess.call([program, *words[1:]], env=environment))
    try:
        os.execve(program, [program, *words[1:]], environment)
    except OSError as error:
        found = f"it cannot be run ({error.strerror})"
        raise FfnkitError(f"ffnkit exec -- {words[0]}", found, "Give a program") from error


def ignoring(words: list[str]) -> str | None:
    """The flag of a Python command that keeps the hook from being imported (-E, -I, -S); None where there is none."""
    if re.fullmatch(r"python[\d.]*(\.exe)?", Path(words[0]).name) is None:
        return None
    rest = iter(words[1:])
    for word in rest:
        if not word.startswith("-") or word == "-":
            return None
        for place, letter in enumerate(word[1:] if not word.startswith("--") else ""):
            if letter in "EIS":
                return letter
            if letter in "cm":
                return None
            if letter in "WX":
                if place + 2 == len(word):
                    next(rest, None)
                break
    return None


def with_hook(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which every Python imports ffnkit as it starts (``startup/sitecustomize.py``)."""
    import ffnkit

    given = environment.get("PYTHONPATH", "")
    home = str(Path(ffnkit.__file__).resolve().parents[1])
    environment["FFNKIT_HOME"] = home
    environment["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *([given] if given else [])])
    return environment
