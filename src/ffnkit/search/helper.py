"""A further process at work on a search's folder."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from ffnkit.io.files import read_json
from ffnkit.recipe.process import Apart
from ffnkit.recipe.worker import hush, watch
from ffnkit.search.state import FACTS


class Helper(Apart):
    """Does what is left of the search in a folder."""

    def __init__(self, out: Path, environment: Mapping[str, str]) -> None:
        super().__init__("ffnkit.search.helper", [str(out)], environment)


def help_with(out: Path) -> None:
    """Do what is left of the search in the folder, beside others."""
    from ffnkit.search.job import Run
    from ffnkit.search.settings import search_from

    facts = read_json(out / FACTS) or {}
    own = {name: value for name, value in facts.items() if name not in ("weights", "data")}
    run = Run(search_from(own, str(out / FACTS)), out, lambda line: print(line, file=sys.stderr, flush=True))
    run.prepare()
    run.work()


if __name__ == "__main__":
    threading.Thread(target=watch, args=(sys.stdin.fileno(),), daemon=True).start()
    hush()
    help_with(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)
