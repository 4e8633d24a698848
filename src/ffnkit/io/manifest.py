"""Which files of a folder an output of ours brought, and whether they are still as it wrote them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError

FILE = ".ffnkit-files.json"
_FORMAT = 1
_WHOLE = 1 << 20  # bytes; of larger files the size alone is compared
# Weights as from_pretrained looks for them, in whole or in shards.
_WEIGHTS = re.compile(r"(pytorch_)?model(\.[^.]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.[^.]+)?\.json)?")
# What is of one kind in a folder and turns what is of the other into a mixture of two: peft reads both of them.
_CLASHES = {"model": "adapter_config.json", "lora": "config.json"}

Files = dict[str, list[Any]]


def read(folder: Path) -> dict[str, Files]:
    """What the manifest of a folder says: files by output; nothing where there is none that can be read."""
    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        outputs = data["outputs"] if data["format"] == _FORMAT else {}
        return {str(kind): {str(name): list(told) for name, told in files.items()} for kind, files in outputs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def ours(folder: Path, kind: str) -> set[str]:
    """The files of the last output of this kind that are as it wrote them, by their path in the folder."""
    files = read(folder).get(kind, {})
    found = {name for name, told in files.items() if _told(folder / name) == told}
    if kind == "model" and not (folder / FILE).exists() and has_card(folder):  # from before there were manifests
        found.add("README.md")
    return found | ({FILE} if (folder / FILE).exists() else set())


def write(new: Path, old: Path, kind: str) -> None:
    """Note what ``new`` holds as the output of this kind, beside those of other kinds that ``old`` says."""
    files = {path.relative_to(new).as_posix(): _told(path) for path in sorted(new.rglob("*")) if not path.is_dir()}
    files.pop(FILE, None)
    outputs = read(old) | {kind: files}
    (new / FILE).write_text(json.dumps({"format": _FORMAT, "outputs": outputs}, indent=1) + "\n", encoding="utf-8")


def check_unmixed(folder: Path, kind: str) -> None:
    """Raises FfnkitError where what is not of an output of this kind would stay and be read together with it."""
    own = ours(folder, kind)
    found = [name for name in sorted(os.listdir(folder)) if name not in own and _mixes(name, kind)]
    if found:
        asked = f"output folder '{folder}'"
        what = f"{found[0]} is of something else, and would be read together with what is to be written"
        raise FfnkitError(asked, what, "Name another folder, or move that away")


def _mixes(name: str, kind: str) -> bool:
    if name == _CLASHES.get(kind):
        return True
    return kind == "model" and name != "model.safetensors" and _WEIGHTS.fullmatch(name) is not None


def is_replaced(name: str, kind: str) -> bool:
    """Whether a file that is not ours goes although the output brings none of its name: the model's own weights."""
    return kind == "model" and name == "model.safetensors"


def has_card(folder: Path) -> bool:
    """Whether ``folder`` holds a model card of ffnkit."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8")[:2000]
    except (OSError, UnicodeDecodeError):
        return False
    return head.startswith("---") and "ffnkit" in head.split("---")[1]


def _told(path: Path) -> list[Any] | None:
    """Size and, of small files, a digest; None where there is no such file."""
    try:
        if path.is_symlink() or not path.is_file():
            return None
        size = path.stat().st_size
        whole = size <= _WHOLE
        return [size, hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if whole else None]
    except OSError:
        return None
