"""A module of ffnkit at work in a process of its own, which ends when this one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])  # where the package lies
PATIENCE = 10  # seconds that a process has to end by itself


class Apart:
    """It watches a pipe that closes with us (``worker.watch``), and so never outlives us.

    Args:
        module: run by ``python -m``, with the words behind it. environment: variables beside ours.
        listened: whether what it writes to stderr is read here; else it goes to our stderr.
    """

    def __init__(
        self, module: str, words: Sequence[str], environment: Mapping[str, str], *, listened: bool = False
    ) -> None:
        paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A group of its own: Ctrl-C reaches us alone, and we end the child, which then prints no traceback.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE if listened else None,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            process_group=0,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait()

    def stop(self) -> None:
        """Give the process the time to end by itself, then end it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
