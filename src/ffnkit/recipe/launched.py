"""One of several processes that a stage is trained in: each makes the unit's model, and the first one writes."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path

from ffnkit.errors import FfnkitError
from ffnkit.io import processes
from ffnkit.io.files import read_json
from ffnkit.io.progress import shown
from ffnkit.recipe.launching import FAILED, figures
from ffnkit.recipe.schema import recipe_from
from ffnkit.recipe.state import unit_of, write_json
from ffnkit.recipe.unit import run_stage
from ffnkit.recipe.worker import hush, watch


def main(arguments: list[str]) -> int:
    """Train the stage; the exit code."""
    out, arm, seed, stage = Path(arguments[0]), arguments[1], int(arguments[2]), arguments[3]
    progress = "--progress" in arguments
    threading.Thread(target=watch, args=(sys.stdin.fileno(),), daemon=True).start()
    hush()
    recipe = recipe_from((read_json(out / "run.json") or {}).get("recipe"), str(out / "run.json"))
    unit = unit_of(out, arm, seed)
    try:
        with shown(unit.name, quiet=not progress):
            found = run_stage(recipe, unit, stage, progress)
    except Exception as error:
        line = str(error) if isinstance(error, FfnkitError) else f"{type(error).__name__}: {error}"
        write_json(unit.work / FAILED, {"error": " ".join(line.split()), "traceback": traceback.format_exc()})
        return 1
    if processes.is_first():
        write_json(figures(unit, stage), found)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # as a unit's process ends
