"""A further process at work on a search's folder."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from ffnkit.recipe.process import Apart
from ffnkit.recipe.worker import hush, watch


class Helper(Apart):
    """Does what is left of the search in a folder."""

    def __init__(self, out: Path, environment: Mapping[str, str]) -> None:
        super().__init__("ffnkit.search.helper", [str(out)], environment)


def help_with(out: Path) -> None:
    """Do what is left of the search in the folder, beside others."""
    from ffnkit.search.job import run_of

    run = run_of(out, lambda line: print(line, file=sys.stderr, flush=True))
    run.prepare()
    run.work()


if __name__ == "__main__":
    threading.Thread(target=watch, args=(sys.stdin.fileno(),), daemon=True).start()
    hush()
    help_with(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)
