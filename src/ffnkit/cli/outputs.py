"""Checks of the output folder, made before the expensive work starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ffnkit.errors import FfnkitError
from ffnkit.io import formats

MARKERS = (
    "ffnkit.json",
    "results.json",
    "metrics.json",
    "analysis.json",
    "similarity.json",
    "energy.json",
    "recipe.yaml",
)


def check_output(out: Path, *, overwrite: bool = False, source: str | None = None) -> Path:
    """Return ``out`` when a result may be put there.

    Raises:
        FfnkitError: ``out`` is a file, a folder of something else (without ``overwrite``), the model that is being
            read, or in a place that cannot be written.
    """
    asked = f"--out {out}"
    if out.exists() and not out.is_dir():
        raise FfnkitError(asked, "this is a file", "Name a folder that does not exist yet")
    target = out.resolve()
    if source is not None and Path(source).is_dir():
        read = Path(source).resolve()
        if target == read or read.is_relative_to(target):
            raise FfnkitError(asked, f"the model that is read, {source}, is in that folder", "Choose another --out")
    if out.is_dir() and any(out.iterdir()) and not overwrite and not is_ffnkit_output(out):
        found = "the folder is not empty and was not written by ffnkit"
        raise FfnkitError(asked, found, "Choose another folder, or add --overwrite to replace it")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise FfnkitError(asked, f"{parent} is a file", "Name a folder that can be made")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FfnkitError(asked, f"no permission to write in {parent}", "Choose another folder")
    return out


def is_ffnkit_output(folder: Path) -> bool:
    """Whether ffnkit wrote ``folder``: a compact checkpoint, a folder of them, or one with results of ffnkit."""
    if any((folder / name).is_file() for name in MARKERS):
        return True
    if any(is_ffnkit_output(folder / name) for name in ("compact", "standard") if (folder / name).is_dir()):
        return True
    return is_compact(folder) or has_card(folder)


def is_compact(folder: Path) -> bool:
    """Whether ``folder`` holds a compact checkpoint of ffnkit."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return formats.is_compact(quantization)


def has_card(folder: Path) -> bool:
    """Whether ``folder`` holds a model card of ffnkit."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8")[:2000]
    except (OSError, UnicodeDecodeError):
        return False
    return head.startswith("---") and "ffnkit" in head.split("---")[1]
