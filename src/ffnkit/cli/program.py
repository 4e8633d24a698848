"""The program: the application with all of its commands, which register themselves as they are imported."""

from __future__ import annotations

import os
import sys

from ffnkit.cli import (
    analyzing,
    calibrating,
    compressing,
    executing,
    exporting,
    lists,
    reporting,
    running,
    searching,
    tuning,
)
from ffnkit.cli.application import app

COMMANDS = (analyzing, calibrating, compressing, exporting, executing, lists, reporting, running, searching, tuning)


def main() -> None:
    """The ``ffnkit`` program."""
    open_streams()
    app(prog_name="ffnkit")


def open_streams() -> None:
    """Nothing in the place of standard streams that are closed: the next file would get their number, and our lines."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            setattr(sys, name, open(number, "r" if number == 0 else "w"))  # noqa: SIM115
