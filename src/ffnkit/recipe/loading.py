"""Reading a recipe: YAML in which a key stands once, then the schema."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from ffnkit.errors import FfnkitError
from ffnkit.io.yaml_text import read_yaml
from ffnkit.recipe.schema import Recipe, recipe_from

LONGEST = 1 << 17  # bytes of a recipe: seconds of reading, and more than anybody writes


def parse(text: str, where: str) -> Recipe:
    """The recipe in ``text``; ``where`` names it in errors.

    Raises:
        FfnkitError: text that is not YAML, a key given twice, or a field that is wrong.
    """
    data = read_yaml(text, where)
    if data is None:
        raise FfnkitError(where, "the file is empty", "Write `name:`, `model:`, `task:`, `arms:`")
    recipe = recipe_from(data, where)
    asked = isinstance(data.get("measure"), dict) and data["measure"].get("latency") is True
    if asked and (recipe.export == "none" or "export" not in recipe.stages):
        what = "no checkpoint would be kept that it could be measured on"
        raise FfnkitError(f"{where}: measure.latency", what, "Give the stage export, and export: compact")
    return recipe


def load_recipe(path: str | Path, *, any_template: bool = False) -> Recipe:
    """Read and check a YAML recipe.

    Args:
        any_template: let it name a chat template outside of its own folder and the working folder; what a template
            says is saved with the models, so that a recipe of somebody else could carry a file away.

    Raises:
        FfnkitError: the file is missing or wrong; the line names the field.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise FfnkitError(f"recipe {path}", "there is no such file", "Give the path of a YAML recipe") from None
    except (OSError, ValueError) as error:
        found = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise FfnkitError(f"recipe {path}", found, "Give the path of a YAML recipe") from None
    if len(content) > LONGEST:
        raise FfnkitError(f"recipe {path}", f"it is larger than {LONGEST >> 10} KiB", "Give the path of a YAML recipe")
    recipe = parse(text, str(path))
    if not any_template:
        _check_template(recipe, path)
    return recipe


def _check_template(recipe: Recipe, path: Path) -> None:
    from ffnkit.tasks.chat import template_file

    if (file := template_file(recipe.task.template)) is None:
        return
    real = Path(os.path.realpath(file))
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in (path.parent, ".")):
        found = f"{recipe.task.template} is neither below the recipe's folder nor below the working folder"
        raise FfnkitError(f"{path}: task.template", found, "Copy it there, or allow it: ffnkit run --any-template")


def quickstart() -> Recipe:
    """The embedded recipe that ``ffnkit run`` takes when none is given."""
    text = (resources.files("ffnkit") / "quickstart.yaml").read_text(encoding="utf-8")
    return parse(text, "the quickstart recipe")
