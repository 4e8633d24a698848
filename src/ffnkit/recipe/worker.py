"""Runs one unit in a process of its own: clean memory figures, and a crash that ends one unit only."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json
from ffnkit.io.progress import shown
from ffnkit.recipe.process import Apart
from ffnkit.recipe.schema import Recipe, facts_today, recipe_from
from ffnkit.recipe.state import Unit, digest, unit_of

FAILED, STOPPED = 1, 130


class Child(Apart):
    """A unit of the recipe stored in ``out``, at work in a process of its own.

    A second process for the same unit is refused by the lock on the unit's folder.

    Args:
        environment: variables beside ours, such as those that share out threads and GPUs.
        told: takes the lines that it prints; None: they go to our stderr.
    """

    def __init__(
        self,
        out: Path,
        unit: Unit,
        *,
        progress: bool,
        environment: Mapping[str, str] | None = None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self.unit = unit
        words = [str(out), unit.arm, str(unit.seed), *["--progress"] * progress]
        super().__init__("ffnkit.recipe.worker", words, environment or {}, listened=told is not None)
        if told is not None:
            self._reader = threading.Thread(target=self._read, args=(told,), daemon=True)
            self._reader.start()

    def ended(self) -> int | None:
        """The exit code, less than 0 where a signal ended it; None while it is at work."""
        code = self._process.poll()
        if code is not None:
            self._close()
        return code

    def stop(self) -> None:
        """Give the process the time to end by itself, then end it."""
        super().stop()
        self._close()

    def judge(self, code: int) -> bool:
        """Whether the unit is done; where it is not, the reason is in its folder."""
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            record(self.unit, f"the process was ended by {signal.Signals(-code).name}{hint}")
        elif code and self.unit.marker("failed") is None:
            record(self.unit, f"the process ended with code {code}")
        return code == 0

    def _read(self, told: Callable[[str], None]) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if text := line.decode(errors="replace").rstrip():
                told(text)

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stderr):
            if stream is self._process.stderr and stream is not None:
                self._reader.join(timeout=5)
            if stream is not None:
                stream.close()


def run_here(recipe: Recipe, unit: Unit, facts: dict[str, Any], say: Callable[[str], None], bars: bool) -> bool:
    """Run a unit in this process; False when it failed, and why is recorded."""
    from ffnkit.recipe.unit import run_unit

    try:
        with unit.held():
            run_unit(recipe, unit, facts, say, bars)
    except Exception as error:
        line = str(error) if isinstance(error, FfnkitError) else f"{type(error).__name__}: {error}"
        record(unit, " ".join(line.split()), traceback.format_exc())
        return False
    return True


def record(unit: Unit, error: str, trace: str = "") -> None:
    """Leave the reason of a failure in the unit's folder."""
    unit.mark("failed", {"error": error, "traceback": trace})


def watch(pipe: int) -> None:
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
    threading.Thread(target=watch, args=(sys.stdin.fileno(),), daemon=True).start()
    progress = "--progress" in arguments

    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr, flush=True)

    hush()
    stored = read_json(out / "run.json") or {}
    recipe = recipe_from(stored.get("recipe"), str(out / "run.json"))
    unit = unit_of(out, arm, seed)
    facts = stored["units"][f"{arm}/{seed}"]
    found = unit.marker("unit")
    if found is not None and digest(facts_today(found["facts"])) != digest(facts):
        record(unit, str(FfnkitError(unit.name, "is of another recipe", "Give another --out, or --restart")))
        return FAILED
    with shown(unit.name, quiet=not progress):
        return 0 if run_here(recipe, unit, facts, say, progress) else FAILED


def hush() -> None:
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
