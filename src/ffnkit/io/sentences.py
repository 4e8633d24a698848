"""Folders of sentence-transformers: a transformer and the modules behind it (pooling, dense layers, normalizing).

DIR/modules.json     the modules in their order, each with its folder
DIR/                 the transformer's files; in older folders they are in DIR/0_Transformer
DIR/1_Pooling, ...   the modules behind it
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json

MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
"""What the module that holds the transformer says of itself: its longest row, its task."""
OWN = (MODULES, "config_sentence_transformers.json", SETTINGS)
"""What such a folder holds beside the modules and the files of any transformer."""
_EACH = "Compress each of these folders by itself, and put the results in their places in a copy of the whole"


@dataclass(frozen=True)
class SentenceFolder:
    """Where the parts of a sentence-transformers model are.

    Attributes:
        root: the folder that holds modules.json.
        rows: the modules as that file says them, in their order.
        transformer: the path in ``root`` of the one with a transformers model; "" where it is the root itself.
    """

    root: Path
    rows: tuple[dict[str, Any], ...]
    transformer: str

    @property
    def behind(self) -> list[dict[str, Any]]:
        """The modules behind the transformer."""
        return [row for row in self.rows if row["path"] != self.transformer]

    def flat(self) -> list[dict[str, Any]]:
        """The rows of a folder that holds the transformer's files itself."""
        return [{**row, "path": "" if row["path"] == self.transformer else row["path"]} for row in self.rows]


def sentence_folder(folder: str | Path) -> SentenceFolder | None:
    """What a folder, or the one around it where it is named as its transformer, holds; None: no sentence-transformers.

    One of several transformers in a folder is a model by itself where it is named.

    Raises:
        FfnkitError: several of its modules hold a transformers model, or none of them does.
    """
    path = Path(folder)
    own = _read(path)
    if own is not None:
        return own
    try:
        above = _read(path.parent) if (path.parent / MODULES).is_file() else None
    except FfnkitError:
        return None
    return above if above is not None and above.transformer == path.name else None


def _read(root: Path) -> SentenceFolder | None:
    try:
        rows = json.loads((root / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _inside(row.get("path")) for row in rows):
        return None
    held = [row["path"] for row in rows if "model_type" in (read_json(root / row["path"] / "config.json") or {})]
    if len(held) > 1:
        found = f"several of its modules are transformers: {', '.join(held)}"
        raise FfnkitError(f"model {root}", found, _EACH)
    if not held and rows:
        _refuse_without_transformer(root, [row["path"] for row in rows])
    return SentenceFolder(root, tuple(rows), held[0]) if held else None


def _refuse_without_transformer(root: Path, paths: list[str]) -> None:
    """Raises FfnkitError where the transformer of a folder lies deeper than its modules, or is not in it."""
    configs = [path for path in sorted(root.glob("*/**/config.json")) if "model_type" in (read_json(path) or {})]
    deeper = [path.parent.relative_to(root).as_posix() for path in configs]
    missing = [path for path in paths if not (root / path).is_dir()]
    asked = f"model {root}"
    if deeper:
        found = f"its transformers lie inside of a module: {', '.join(deeper)}"
        raise FfnkitError(asked, found, _EACH)
    if missing:
        found = f"{MODULES} names {missing[0]}, and the folder holds no such folder"
        raise FfnkitError(asked, found, "Name the model that is meant, or put its files there")


def _inside(path: Any) -> bool:
    """Whether a module's path is one below the folder."""
    return isinstance(path, str) and not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts
