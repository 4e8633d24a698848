"""Tables: files that hold many recipes, one for each model and task, and the small variants of both."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.recipe.schema import Recipe, recipe_from

AXES = ("models", "tasks")
FIELDS = {"models": "model", "tasks": "task"}  # what a plain value of an axis stands for
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Table:
    """The recipes of a file by the name of their cell: ``MODEL/TASK``, or the one of the two that the file lists.

    ``by_task`` says whether it lists tasks.
    """

    name: str
    notes: str
    cells: dict[str, Recipe]
    by_task: bool = False

    @property
    def rows(self) -> dict[str, list[str]]:
        """Cells that make one line of the paper's table, by the model that they share ("" where the file lists none);
        none where the file lists no tasks."""
        found: dict[str, list[str]] = {}
        for cell in self.cells if self.by_task else ():
            found.setdefault(cell.rpartition("/")[0], []).append(cell)
        return found

    def only(self, patterns: Sequence[str]) -> Table:
        """The table of the cells whose names fit a pattern, such as ``bert-base/*``.

        Raises:
            FfnkitError: one that no cell fits.
        """
        for pattern in patterns:
            if not fnmatch.filter(self.cells, pattern):
                what = f"{self.name} has the cells {', '.join(self.cells)}"
                raise FfnkitError(f"--only {pattern}", what, "Name one of them, or a pattern such as 'bert-base/*'")
        chosen = {name: each for name, each in self.cells.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
        return Table(self.name, self.notes, chosen, self.by_task)


def is_table(data: Any) -> bool:
    """Whether plain data of a file list models or tasks."""
    return isinstance(data, dict) and any(axis in data for axis in AXES)


def variant(data: Any, where: str, *, small: bool) -> Any:
    """The fields of a file without ``small``, or with what that says in their place.

    Mappings are put together field by field, but for ``models``, ``tasks`` and ``cells``, which are exchanged as a
    whole, ``cells`` with either of the others; null takes a field, such as an arm, out.

    Raises:
        FfnkitError: a small variant is asked for and there is none.
    """
    if not isinstance(data, dict) or "small" not in data:
        if small:
            raise FfnkitError(
                f"{where} with --small", "it has no small variant", "Add the field small, or leave it out"
            )
        return data
    own = data["small"]
    if not isinstance(own, dict):
        raise FfnkitError(f"{where}: small", f"it is {own!r}, not fields", "Write the fields that differ below it")
    plain = {key: value for key, value in data.items() if key != "small"}
    if not small:
        return plain
    whole = {key: value for key, value in own.items() if key in (*AXES, "cells")}
    if any(axis in own for axis in AXES):
        plain.pop("cells", None)  # they are of other models or tasks
    return {**merged(plain, {key: value for key, value in own.items() if key not in whole}), **whole}


def table_from(data: Mapping[str, Any], where: str) -> Table:
    """The table that plain data describe: each cell's recipe is the common fields with the model's, the task's and the
    cell's own in their place.

    Raises:
        FfnkitError: one line that names the wrong field, of one of the recipes or of the table.
    """
    axes = {axis: _axis(data[axis], f"{where}: {axis}", FIELDS[axis]) for axis in AXES if axis in data}
    base = {key: value for key, value in data.items() if key not in (*AXES, "cells")}
    found: dict[str, dict[str, Any]] = {"": base}
    for axis in axes.values():
        found = {
            f"{start}/{name}".lstrip("/"): merged(fields, own)
            for start, fields in found.items()
            for name, own in axis.items()
        }
    for name, own in _mapping(data.get("cells") or {}, f"{where}: cells").items():
        if name not in found:
            what = f"there is no such cell, but {', '.join(found)}"
            raise FfnkitError(f"{where}: cells.{name}", what, "Name one of them")
        found[name] = merged(found[name], _mapping(own, f"{where}: cells.{name}"))
    title = str(base.get("name") or "")
    cells = {name: recipe_from({**own, "name": f"{title}: {name}"}, f"{where} ({name})") for name, own in found.items()}
    return Table(title, str(base.get("notes") or ""), cells, "tasks" in axes)


def merged(fields: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with others in their place, mappings field by field; null takes out what is there."""
    result = dict(fields)
    for key, value in own.items():
        if value is None and key in result:
            del result[key]
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def _axis(value: Any, where: str, field: str) -> dict[str, dict[str, Any]]:
    """Name -> fields: of a list of names, of names with one value, or of names with fields."""
    named = {str(each): each for each in value} if isinstance(value, list) else _mapping(value, where)
    if not named:
        raise FfnkitError(where, "it is empty", f"Name at least one {field}")
    for name in named:
        if not _NAME.fullmatch(str(name)):
            found = "a name becomes a folder: letters, digits, dot, dash and underscore only"
            raise FfnkitError(f"{where}.{name}", found, "Write NAME: " + field)
    return {str(name): each if isinstance(each, dict) else {field: each} for name, each in named.items()}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FfnkitError(where, f"it is {value!r}, not fields", "Write `name: value` lines below it")
    return value
