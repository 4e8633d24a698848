"""The licence that a model's own card states."""

from __future__ import annotations

from pathlib import Path

import yaml

from ffnkit.io import quickstart
from ffnkit.io.snapshots import folder_of


def licence_of(model: str) -> str | None:
    """The licence in the front matter of a model's card, as the hub names it; None where none is stated there.

    "other" is none: it stands for terms that are written elsewhere.

    Args:
        model: a folder, a hub name or "quickstart".
    """
    folder = quickstart.model_path() if model == quickstart.NAME else folder_of(str(Path(model).expanduser()))
    try:
        text = (folder / "README.md").read_text(encoding="utf-8") if folder is not None else ""
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    stated = head.get("license") if isinstance(head, dict) else None
    return stated if isinstance(stated, str) and stated != "other" else None
