"""Runs one unit in a process of its own: clean memory figures, and a crash that ends one unit only."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json
from ffnkit.io.progress import shown
from ffnkit.recipe.schema import Recipe, facts_today, recipe_from
from ffnkit.recipe.state import Unit, digest, unit_of

FAILED, STOPPED = 1, 130


def run_apart(out: Path, unit: Unit, *, progress: bool) -> bool:
    """Run a unit of the recipe stored in ``out`` in a new process; False when it failed.

    The child ends when this process does: it watches a pipe that closes with us.
    """
    command = [sys.executable, "-m", "ffnkit.recipe.worker", str(out), unit.arm, str(unit.seed)]
    command += ["--progress"] * progress
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # A group of its own: Ctrl-C reaches us alone, and we end the child, which then prints no traceback.
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, process_group=0) as child:
        try:
            code = child.wait()
        except BaseException:
            _stop(child)
            raise
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        record(unit, f"the process was ended by {signal.Signals(-code).name}{hint}")
    elif code and unit.marker("failed") is None:
        record(unit, f"the process ended with code {code}")
    return code == 0


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Give the child the time to end by itself, then end it."""
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def run_here(recipe: Recipe, unit: Unit, facts: dict[str, Any], say: Callable[[str], None], bars: bool) -> bool:
    """Run a unit in this process; False when it failed, and why is recorded."""
    from ffnkit.recipe.unit import run_unit

    try:
        run_unit(recipe, unit, facts, say, bars)
    except Exception as error:
        line = str(error) if isinstance(error, FfnkitError) else f"{type(error).__name__}: {error}"
        record(unit, " ".join(line.split()), traceback.format_exc())
        return False
    return True


def record(unit: Unit, error: str, trace: str = "") -> None:
    """Leave the reason of a failure in the unit's folder."""
    unit.mark("failed", {"error": error, "traceback": trace})


def _watch(pipe: int) -> None:
    """End this process when the parent is gone."""
    while os.read(pipe, 1):
        pass
    os._exit(STOPPED)


def main(arguments: list[str]) -> int:
    """The child's side; where not even a failure can be recorded, the parent says why."""
    try:
        return _main(arguments)
    except (FfnkitError, OSError):
        return FAILED


def _main(arguments: list[str]) -> int:
    out, arm, seed = Path(arguments[0]), arguments[1], int(arguments[2])
    threading.Thread(target=_watch, args=(sys.stdin.fileno(),), daemon=True).start()
    _hush()
    progress = "--progress" in arguments
    stored = read_json(out / "run.json") or {}
    recipe = recipe_from(stored.get("recipe"), str(out / "run.json"))
    unit = unit_of(out, arm, seed)
    facts = stored["units"][f"{arm}/{seed}"]
    found = unit.marker("unit")
    if found is not None and digest(facts_today(found["facts"])) != digest(facts):
        record(unit, str(FfnkitError(unit.name, "is of another recipe", "Give another --out, or --restart")))
        return FAILED

    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr, flush=True)

    with shown(unit.name, quiet=not progress):
        return 0 if run_here(recipe, unit, facts, say, progress) else FAILED


def _hush() -> None:
    """Leave the screen to our own lines: no logs of libraries."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # threads of libraries must not hold a finished unit
