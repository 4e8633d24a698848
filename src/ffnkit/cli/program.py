"""The program: the application with all of its commands, which register themselves as they are imported."""

from __future__ import annotations

from ffnkit.cli import analyzing, compressing, lists, running, tuning
from ffnkit.cli.application import app

COMMANDS = (analyzing, compressing, lists, running, tuning)


def main() -> None:
    """The ``ffnkit`` program."""
    app(prog_name="ffnkit")
