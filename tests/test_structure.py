"""The shape of the source: few modules at the root, short files, no private imports, no cycles, one home for edits."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import sources
from fast import FAST
from sources import PACKAGE, ROOT, statements

FILES = {".".join(("ffnkit", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in sources.FILES}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
LONGEST, AT_ROOT = 400, 6
KINDS = {
    "ClusterNeurons", "DropLayer", "Edit", "FactorLinear", "LinearEdit", "Mask", "NeuronEdit", "ReplaceNeurons",
    "KeepOwn", "ReplaceLinear", "Rescale", "ScaleInputs", "SelectHeads", "SelectNeurons", "SetWidth", "Tie", "Train",
    "UpdateLinear",
}  # fmt: skip


def tree(name: str) -> ast.Module:
    return sources.tree(MODULES[name])


@cache
def imported(source: ast.AST, package: str, *, lazy: bool = True) -> tuple[tuple[str, str], ...]:
    """(module, name) of everything that is imported from ffnkit; the name is "" where a module is."""
    return tuple(_imported(source, package, lazy))


def _imported(source: ast.AST, package: str, lazy: bool) -> Iterator[tuple[str, str]]:
    every = list(statements(source))
    apart = [node for node in every if _for_types(node)]
    if not lazy:
        apart += [node for node in every if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    skipped = {id(inner) for node in apart for inner in statements(node)}
    for node in every:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "ffnkit")
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if module.split(".")[0] == "ffnkit":
                for alias in node.names:
                    deeper = f"{module}.{alias.name}"
                    yield (deeper, "") if deeper in MODULES else (module, alias.name)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(
        "TYPE_CHECKING" in (getattr(each, "id", ""), getattr(each, "attr", "")) for each in ast.walk(node.test)
    )


def package_of(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


# What is asked ------------------------------------------------------------------------------------------------------


def long_files(files: dict[str, Path]) -> list[str]:
    return [name for name, path in files.items() if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST]


def private_names(source: ast.Module, name: str) -> list[str]:
    """Private names of other modules that a module imports, or reads of a module that it imports."""
    found = [f"{module}.{item}" for module, item in imported(source, package_of(name)) if item.startswith("_")]
    found += [module for module, item in imported(source, package_of(name)) if not item and "._" in module]
    held = {m.rpartition(".")[2]: m for m, item in imported(source, package_of(name)) if not item}
    for node in ast.walk(source):
        of_module = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in held
        if of_module and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append(f"{held[node.value.id]}.{node.attr}")
    return [each for each in found if not each.startswith("ffnkit._")]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, however far around."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str, edges: dict[str, set[str]], into: list[str]) -> None:
        stack = [(node, iter(sorted(edges.get(node, ()))))]
        seen.add(node)
        while stack:
            current, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                into.append(current)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(sorted(edges.get(following, ())))))

    for node in graph:
        if node not in seen:
            visit(node, graph, order)
    back: dict[str, set[str]] = {}
    for node, targets in graph.items():
        for target in targets:
            back.setdefault(target, set()).add(node)
    seen.clear()
    groups = []
    for node in reversed(order):
        if node not in seen:
            group: list[str] = []
            visit(node, back, group)
            groups.append(group)
    return [sorted(group) for group in groups if len(group) > 1]


def graph_of_imports(*, lazy: bool) -> dict[str, set[str]]:
    return {
        name: {m for m, _ in imported(tree(name), package_of(name), lazy=lazy) if m in MODULES and m != name}
        for name in MODULES
    }


def asks_for_kinds(source: ast.Module) -> list[int]:
    """Lines where a module asks of what kind an edit is."""
    lines = []
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            if {n.id for kind in node.args[1:] for n in ast.walk(kind) if isinstance(n, ast.Name)} & KINDS:
                lines.append(node.lineno)
        elif isinstance(node, ast.MatchClass) and ast.unparse(node.cls) in KINDS:
            lines.append(node.lineno)
    return lines


# The source ---------------------------------------------------------------------------------------------------------


def test_few_modules_lie_at_the_root() -> None:
    own = [p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_")]
    assert len(own) <= AT_ROOT, own


def test_files_are_short() -> None:
    assert long_files(MODULES) == []


def test_nobody_uses_private_names_of_others() -> None:
    assert {name: found for name in MODULES if (found := private_names(tree(name), name))} == {}


def test_no_module_imports_itself_around_others() -> None:
    assert cycles(graph_of_imports(lazy=False)) == []


def test_nobody_asks_of_what_kind_an_edit_is() -> None:
    outside = [name for name in MODULES if not name.startswith("ffnkit.edits")]
    assert {name: lines for name in outside if (lines := asks_for_kinds(tree(name)))} == {}


# Controls -----------------------------------------------------------------------------------------------------------


def test_what_is_forbidden_is_seen(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * (LONGEST + 1), encoding="utf-8")
    assert long_files({"long": tmp_path / "long.py"}) == ["long"]
    bad = "from ffnkit.plans import _Reader\nfrom ffnkit.io import files\nfiles._sync()\nfrom ffnkit.edits import Tie\n"
    assert private_names(ast.parse(bad), "ffnkit.plans") == ["ffnkit.plans._Reader", "ffnkit.io.files._sync"]
    assert asks_for_kinds(ast.parse("if isinstance(edit, Tie | Mask):\n    pass")) == [1]
    assert asks_for_kinds(ast.parse("isinstance(x, int)")) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b"}, "b": set()}) == []
    late = ast.parse(
        "def f():\n    from ffnkit.plans import Plan\nif TYPE_CHECKING:\n    from ffnkit.plans import Plan\n"
    )
    assert list(imported(late, "ffnkit", lazy=False)) == []
    assert list(imported(late, "ffnkit")) == [("ffnkit.plans", "Plan")]


def test_no_test_is_skipped_for_want_of_a_package() -> None:
    """What tests ask for by ``importorskip`` is in the extra that ``make test`` installs, but for torchao: no command
    needs it, and where it is installed every process that imports transformers takes seconds longer and talks; and for
    Ray, which is as large as torch's own libraries."""
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    there = {re.split(r"[\[<>=]", each)[0].replace("-", "_") for each in dev} | {"torchao", "ray", "fcntl"}
    found = {
        name
        for path in sorted((ROOT / "tests").glob("*.py"))
        for call in re.findall(r"importorskip\(([^)]*)\)", path.read_text())
        for name in re.findall(r'"(\w+)"', call)
    } - {"int8", "nf4"}
    assert found - {""} <= there, found - there


def test_every_line_of_the_fast_table_names_a_test() -> None:
    for file, starts in FAST.items():
        text = (ROOT / "tests" / file).read_text()
        assert all(f"\ndef {start}" in text for start in starts), f"{file}: {list(starts)}"


def test_every_mutation_fits_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tools/mutants.py: a line that is rewritten takes its mutation along."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import mutants

    assert mutants.check(mutants.MUTANTS) == 0
    wrong = dataclasses.replace(mutants.MUTANTS[0], find="nobody wrote this")
    assert mutants.check((wrong,)) == 1
