"""Reading a recipe: YAML in which a key stands once, then the schema."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ffnkit.errors import FfnkitError
from ffnkit.recipe.schema import Recipe, recipe_from


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key given twice and reads 1e-4 as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict):
            continue  # the parent's own error is clear
        line = key_node.start_mark.line + 1
        if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
            raise _Twice(f"{key} is given twice, on lines {seen[key]} and {line}")
        seen[key] = line
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


class _Twice(Exception):
    pass


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# YAML 1.1 wants a dot in the mantissa and a sign in the exponent: 1e-4 would be text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(text: str, where: str) -> Recipe:
    """The recipe in ``text``; ``where`` names it in errors.

    Raises:
        FfnkitError: text that is not YAML, a key given twice, or a field that is wrong.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except _Twice as error:
        raise FfnkitError(where, str(error), "Keep one, or give the other another name") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" on line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise FfnkitError(where, f"not valid YAML{place}: {problem}", "Mend the file") from None
    if data is None:
        raise FfnkitError(where, "the file is empty", "Write `name:`, `model:`, `task:`, `arms:`")
    recipe = recipe_from(data, where)
    asked = isinstance(data.get("measure"), dict) and data["measure"].get("latency") is True
    if asked and (recipe.export == "none" or "export" not in recipe.stages):
        what = "no checkpoint would be kept that it could be measured on"
        raise FfnkitError(f"{where}: measure.latency", what, "Give the stage export, and export: compact")
    return recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a YAML recipe.

    Raises:
        FfnkitError: the file is missing or wrong; the line names the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FfnkitError(f"recipe {path}", "there is no such file", "Give the path of a YAML recipe") from None
    except (OSError, ValueError) as error:
        raise FfnkitError(f"recipe {path}", f"cannot be read ({error})", "Give the path of a YAML recipe") from None
    return parse(text, str(path))


def quickstart() -> Recipe:
    """The embedded recipe that ``ffnkit run`` takes when none is given."""
    text = (resources.files("ffnkit") / "quickstart.yaml").read_text(encoding="utf-8")
    return parse(text, "the quickstart recipe")
