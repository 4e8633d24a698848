"""A further process at work on a search's folder."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from ffnkit.errors import FfnkitError
from ffnkit.io.files import disk_errors
from ffnkit.recipe.process import Apart
from ffnkit.recipe.worker import hush, watch


class Helper(Apart):
    """Does what is left of the search in a folder."""

    def __init__(self, out: Path, environment: Mapping[str, str]) -> None:
        super().__init__("ffnkit.search.helper", [str(out)], environment)


def help_with(out: Path) -> int:
    """Do what is left of the search in the folder, beside others; the exit code."""
    from ffnkit.search.job import run_of

    try:
        with disk_errors(out):
            run = run_of(out, say)
            run.prepare()
            run.work()
    except FfnkitError as error:  # whoever started us goes on, or comes to it as well
        say(f"a further process of the search ends: {error}")
        return 1
    return 0


def say(line: str) -> None:
    """A line of progress, beside those of others."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(sys.stdin.fileno(),), daemon=True).start()
    hush()
    code = help_with(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)
