"""Imports point down the list of layers in docs/design.md only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from sources import FILES, PACKAGE, ROOT, statements, tree

# Public names, loaded on first use, and the program's entry: outside the order.
EXEMPT = {"__init__", "__main__"}


def layers(text: str) -> dict[str, int]:
    """Module or package name -> rank, 0 at the bottom, from the list under the heading "Layers"."""
    block = text.split("## Layers")[1].split("```")[1]
    rows = []
    for line in block.strip().splitlines():
        names = re.match(r"((?:\w+(?:\.py|/)\s*)+)", line.strip())
        assert names, f"docs/design.md: the line {line!r} under Layers names no module"
        rows.append(re.findall(r"(\w+)(?:\.py|/)", names.group(1)))
    return {name: rank for rank, row in enumerate(reversed(rows)) for name in row}


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and path below ffnkit of every import of ffnkit in a module of ``package``, lazy ones included."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("ffnkit."):
                    yield node.lineno, alias.name.removeprefix("ffnkit.")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            if path[:1] != ["ffnkit"]:
                continue
            yield from ((node.lineno, ".".join([*path[1:], alias.name])) for alias in node.names)


def violations(source: ast.AST, module: str, ranks: dict[str, int]) -> list[str]:
    """What ``module`` ("plan", "tune.training") imports from a layer above its own."""
    parts = ["ffnkit", *module.split(".")]
    own = parts[1]
    found = []
    for line, path in imports(source, parts[:-1]):
        name = path.split(".")[0]
        if name != own and name in ranks and ranks[name] > ranks[own]:
            found.append(f"{module}, line {line}: imports {name}, which is above {own}")
        if own == "methods" and re.match(r"surgery\.(apply)\b", path):
            found.append(f"{module}, line {line}: a method only plans; it may not import what changes a model")
    return found


RANKS = layers((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}


def test_imports_point_down() -> None:
    found = []
    for module, path in MODULES.items():
        top = module.split(".")[0]
        if module not in EXEMPT:
            assert top in RANKS, f"{top} has no place under Layers in docs/design.md: add it"
            found += violations(tree(path), module, RANKS)
    assert found == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from ffnkit.surgery import apply", "ops.kmeans"),
        ("from ..model.finding import ffns", "ops.kmeans"),
        ("from .. import cli", "surgery.apply"),
        ("import ffnkit.tune.training", "model.ffn"),
        ("def late():\n    from ffnkit import recipe", "tasks.glue"),
        ("from ..surgery.apply import apply", "methods.combined"),
    ],
)
def test_an_import_that_points_up_is_found(source: str, module: str) -> None:
    assert len(violations(ast.parse(source), module, RANKS)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from ffnkit.errors import FfnkitError", "ops.kmeans"),
        ("from .neurons import Neurons", "ops.kmeans"),
        ("from ..ops import kmeans", "methods.fusion"),
        ("import torch", "errors"),
    ],
)
def test_an_import_that_points_down_is_not(source: str, module: str) -> None:
    assert violations(ast.parse(source), module, RANKS) == []
