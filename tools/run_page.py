"""Run the blocks of a page as pasted, in an empty folder, with the ffnkit that is installed, and tell the seconds.

``python tools/run_page.py README.md [NAME=FOLDER ...]``: a folder may stand for a model of the hub. Lines of
``pip install`` are left out: the environment has what they install.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks of Python and of the shell."""
    found, language, body = [], "", list[str]()
    for line in text.splitlines():
        if not line.startswith("```"):
            body.append(line)
        elif not language:
            language, body = line[3:] or "text", []
        else:
            if language in ("bash", "python"):
                found.append((language, "\n".join(each for each in body if not each.startswith("pip install"))))
            language = ""
    return [(language, text) for language, text in found if text.strip()]


def main(page: str, *pairs: str) -> int:
    text = Path(page).read_text(encoding="utf-8")
    for pair in pairs:
        name, _, folder = pair.partition("=")
        text = text.replace(name, str(Path(folder).resolve()))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        for number, (language, block) in enumerate(blocks(text), 1):
            command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
            started = time.perf_counter()
            done = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path})
            print(
                f"block {number} of {page}: {time.perf_counter() - started:.0f} s, exit {done.returncode}", flush=True
            )
            if done.returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
