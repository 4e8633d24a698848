"""Reading recipes and tables of recipes: YAML in which a key stands once, then the schema."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.yaml_text import read_yaml
from ffnkit.recipe import shipped
from ffnkit.recipe.schema import Recipe, recipe_from
from ffnkit.recipe.tables import Table, is_table, table_from, variant

LONGEST = 1 << 17  # bytes of a recipe: seconds of reading, and more than anybody writes


def parse(text: str, where: str, *, small: bool = False) -> Recipe:
    """The recipe in ``text``; ``where`` names it in errors.

    Raises:
        FfnkitError: text that is not YAML, a key given twice, or a field that is wrong.
    """
    return _one(parse_any(text, where, small=small), where)


def parse_any(text: str, where: str, *, small: bool = False) -> Recipe | Table:
    """The recipe in ``text``, or the table of them where it lists models or tasks. Raises as :func:`parse`."""
    data = read_yaml(text, where)
    if data is None:
        raise FfnkitError(where, "the file is empty", "Write `name:`, `model:`, `task:`, `arms:`")
    data = variant(data, where, small=small)
    if is_table(data):
        table = table_from(data, where)
        for name, recipe in table.cells.items():
            _check_measured(recipe, data, f"{where} ({name})")
        return table
    recipe = recipe_from(data, where)
    _check_measured(recipe, data, where)
    return recipe


def _one(found: Recipe | Table, where: str) -> Recipe:
    if isinstance(found, Table):
        do = "Run it by `ffnkit run`, or read it by load_any"
        raise FfnkitError(where, f"it is a table of {len(found.cells)} recipes", do)
    return found


def _check_measured(recipe: Recipe, data: dict[str, Any], where: str) -> None:
    asked = isinstance(data.get("measure"), dict) and data["measure"].get("latency") is True
    if asked and (recipe.export == "none" or "export" not in recipe.stages):
        what = "no checkpoint would be kept that it could be measured on"
        raise FfnkitError(f"{where}: measure.latency", what, "Give the stage export, and export: compact")


def load_recipe(path: str | Path, *, any_template: bool = False, small: bool = False) -> Recipe:
    """Read and check a YAML recipe.

    Args:
        path: of the file, or the name of a recipe that comes with ffnkit (``ffnkit recipes``).
        any_template: let it name a chat template outside of its own folder and the working folder; what a template
            says is saved with the models, so that a recipe of somebody else could carry a file away.
        small: its small variant.

    Raises:
        FfnkitError: the file is missing or wrong, the line names the field; or it is a table of recipes.
    """
    return _one(load_any(path, any_template=any_template, small=small), str(path))


def load_any(path: str | Path, *, any_template: bool = False, small: bool = False) -> Recipe | Table:
    """Read and check a YAML recipe, or a table of recipes; arguments and errors as :func:`load_recipe`."""
    if (name := str(path)) in shipped.names() and not Path(path).exists():
        path = shipped.path(name)
    found = parse_any(read_text(path), str(path), small=small)
    if not any_template:
        for recipe in found.cells.values() if isinstance(found, Table) else (found,):
            _check_template(recipe, Path(path))
    return found


def read_text(path: str | Path) -> str:
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        do = "Give the path of a YAML recipe, or a name of `ffnkit recipes`"
        raise FfnkitError(f"recipe {path}", "there is no such file", do) from None
    except (OSError, ValueError) as error:
        found = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise FfnkitError(f"recipe {path}", found, "Give the path of a YAML recipe") from None
    if len(content) > LONGEST:
        raise FfnkitError(f"recipe {path}", f"it is larger than {LONGEST >> 10} KiB", "Give the path of a YAML recipe")
    return text


def _check_template(recipe: Recipe, path: Path) -> None:
    from ffnkit.tasks.instructions.chat import template_file

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
