"""The recipes that come with ffnkit (``files/``): by name wherever the path of a recipe is wanted."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ffnkit.errors import FfnkitError

FOLDER = Path(str(files("ffnkit.recipe"))) / "files"
"""Where they lie; a name is the path below it without ``.yaml``, such as ``papers/dsee_glue``."""


def names() -> list[str]:
    """All names: recipes for a machine at hand first, then those of the papers' tables."""
    found = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")]
    return sorted(found, key=lambda name: (name.count("/"), name))


def path(name: str) -> Path:
    """The file of a name.

    Raises:
        FfnkitError: there is none of that name.
    """
    if name not in names():
        raise FfnkitError(f"recipe {name}", "none of that name comes with ffnkit", "List them: ffnkit recipes")
    return FOLDER / f"{name}.yaml"


def about(name: str) -> str:
    """What a recipe says of itself in its first comment."""
    first = path(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip()
