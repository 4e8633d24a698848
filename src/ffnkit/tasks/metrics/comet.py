"""COMET, by its authors' own command.

The package unbabel-comet wants transformers below 5 and numpy below 2, so it lives in an environment of its own, and
its command ``comet-score`` is run. Which model it loads is said by the user alone: in FFNKIT_COMET.

Source: Rei et al., COMET: A Neural Framework for MT Evaluation, EMNLP 2020.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError

MODEL, COMMAND = "FFNKIT_COMET", "FFNKIT_COMET_SCORE"
"""Environment variables: the model, a .ckpt file or a name that comet-score may download; and where the command is."""

_ASKED = "metric comet"


def comet(predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> float:
    """The mean over inputs of the score against the best reference.

    Args:
        predictions, sources: (n,). references: (n,) lists of one or more.

    Raises:
        FfnkitError: no model is named, the command is not there, or it fails.
    """
    command, model = check()
    counts = [len(several) for several in references]
    columns = {
        "s": [source for source, count in zip(sources, counts, strict=True) for _ in range(count)],
        "t": [text for text, count in zip(predictions, counts, strict=True) for _ in range(count)],
        "r": [one for several in references for one in several],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, texts in columns.items():
            (Path(folder) / name).write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
        scores = _run(
            [command, *["-s", "s", "-t", "t", "-r", "r", "--quiet", "--to_json", "out.json", "--gpus"]],
            model,
            Path(folder),
        )
    if len(scores) != sum(counts):
        raise FfnkitError(_ASKED, f"{len(scores)} scores for {sum(counts)} texts", "Check the version of comet-score")
    ends = list(accumulate(counts))
    return math.fsum(max(scores[end - n : end]) for n, end in zip(counts, ends, strict=True)) / len(counts)


def check() -> tuple[str, str]:
    """The command and the model. Raises FfnkitError where one of them is missing."""
    model = os.environ.get(MODEL, "")
    if not model:
        do = f"Set {MODEL} to a .ckpt file, or to a name such as Unbabel/wmt22-comet-da, which is downloaded then"
        raise FfnkitError(_ASKED, "no model is named, and none is downloaded unasked", do)
    wanted = os.environ.get(COMMAND, "comet-score")
    command = shutil.which(wanted)
    if command is None:
        do = f"Install unbabel-comet in an environment of its own, and set {COMMAND} to its comet-score"
        raise FfnkitError(_ASKED, f"there is no command {wanted}", do)
    if model.endswith(".ckpt"):
        model = str(Path(model).expanduser().absolute())
        if not os.path.isfile(model):
            raise FfnkitError(_ASKED, f"{MODEL} names {model}, and there is no such file", "Check the path")
    return command, model


def _run(arguments: list[str], model: str, folder: Path) -> list[float]:
    import torch

    gpus = "1" if torch.cuda.is_available() else "0"
    local = {"HF_HUB_OFFLINE": "1"} if model.endswith(".ckpt") else {}  # its tokenizer would be looked for on the hub
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    how: dict[str, Any] = {"cwd": folder, "env": own | local, "capture_output": True, "errors": "replace"}
    done = subprocess.run([*arguments, gpus, "--model", model], text=True, check=False, **how)
    try:
        if done.returncode:
            raise ValueError(_last_line(done.stderr) or f"exit code {done.returncode}")
        (rows,) = json.loads((folder / "out.json").read_text(encoding="utf-8")).values()  # of the one file of texts
        return [float(row["COMET"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"comet-score failed ({' '.join(str(error).split())[:200]})"
        raise FfnkitError(_ASKED, found, f"Run {arguments[0]} by hand with --model {model}") from error


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
