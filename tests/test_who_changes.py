"""Everyone who changes a model's modules stands in docs/who_changes_a_model.md."""

from __future__ import annotations

import ast
import re

import pytest
import sources
from sources import PACKAGE, ROOT, tree

PAGE = (ROOT / "docs" / "who_changes_a_model.md").read_text(encoding="utf-8")
HELD = {"_parameters", "_modules", "_buffers"}
ATTRIBUTES = {"__class__", "forward", "data"}
CALLS = {"set_submodule", "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"}


def changes(source: ast.AST) -> list[tuple[int, str]]:
    """Line and way of everything in a module that changes another object's modules, classes, parameters or data."""
    found = []
    for node in ast.walk(source):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [e for t in node.targets for e in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target] if not isinstance(node, ast.AnnAssign) or node.value is not None else []
        elif isinstance(node, ast.Delete):
            targets = node.targets
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr in ATTRIBUTES and not _own(target):
                found.append((node.lineno, f".{target.attr} ="))
            elif isinstance(target, ast.Subscript) and _held(target.value):
                found.append((node.lineno, f"{_held(target.value)}[...] ="))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in CALLS or name.startswith("register_optimizer_step"):
                found.append((node.lineno, f".{name}("))
            elif name in ("update", "pop", "clear", "setdefault") and _held(node.func.value):
                found.append((node.lineno, f"{_held(node.func.value)}.{name}("))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("register_optimizer_step"):
            found.append((node.lineno, f"{ast.unparse(node.func)}("))
    return found


def _held(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) and node.attr in HELD else ""


def _own(target: ast.Attribute) -> bool:
    """An object's own ``data`` or ``forward``: a field of that name."""
    return target.attr != "__class__" and isinstance(target.value, ast.Name) and target.value.id == "self"


def listed(page: str) -> set[str]:
    """The files in the first column of the page's tables."""
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return {name for cell in rows for name in re.findall(r"`([\w/]+\.py|edits/\*)`", cell)}


def is_listed(path: str, files: set[str]) -> bool:
    return path in files or (path.startswith("edits/") and "edits/*" in files)


FILES = {str(path.relative_to(PACKAGE)): path for path in sources.FILES}
FIELDS = {"calibration/statistics.py"}  # whose ``data`` is no tensor's


def test_who_changes_a_model_is_on_the_page() -> None:
    changing = {name: found for name, path in FILES.items() if name not in FIELDS and (found := changes(tree(path)))}
    assert changing
    files = listed(PAGE)
    missing = {name: found for name, found in changing.items() if not is_listed(name, files)}
    assert missing == {}, "add them to docs/who_changes_a_model.md"


def test_the_page_names_files_that_are_there() -> None:
    assert sorted(name for name in listed(PAGE) if name != "edits/*" and name not in FILES) == []
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert rows and all(cell.strip() for row in rows for cell in row.strip("|").split("|"))


@pytest.mark.parametrize(
    "line",
    [
        "owner.__class__ = kind", "module.forward = other", "p.data = q", "p.data += q", "self.__class__ = kind",
        "model.set_submodule(name, new)", "m._parameters['weight'] = p", "m._modules[name], x = a, b",
        "del m._buffers[name]", "m._parameters.update(weight=None)", "register_optimizer_step_pre_hook(f)",
        "torch.optim.optimizer.register_optimizer_step_post_hook(f)", "module.register_forward_hook(f)",
    ],
)  # fmt: skip
def test_each_way_is_seen(line: str) -> None:
    found = changes(ast.parse(f"def f():\n    {line}\n"))
    assert found and not is_listed("tune/new.py", listed(PAGE))


@pytest.mark.parametrize("line", ["x = m._parameters['weight']", "self.data = rows", "y = module.forward(x)", "x: int"])
def test_reading_is_none(line: str) -> None:
    assert changes(ast.parse(line)) == []
