"""What the source of a model's classes reads by the number of a layer: entries of a config, and the number itself.

No table of names says so. The classes of a stack's layers, and of what holds the stack, are read as source: a list that
is indexed by a variable has an entry a layer, one that a number is looked up in names layers.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

_NUMBER = re.compile(r"^i$|layer|block|stage|idx|index|num|depth")  # what a layer's number is called
_CACHE = re.compile(r"past|cache|warn", re.IGNORECASE)  # where a layer keeps what it saw: the number is a place there

_SHARED = re.compile(r"(torch|builtins|ffnkit|abc|typing|huggingface_hub)\b|transformers\.(?!models\.)")  # of no family


@dataclass(frozen=True)
class Reads:
    """Names of attributes that hold something by layer.

    Attributes:
        entries: lists with an entry a layer: ``config.layer_types[layer_idx]``.
        numbers: lists of layers' numbers, each with what is added before it is looked up:
            ``layer_idx in config.mlp_only_layers``, ``layer_idx + 1 in self.ple_layer_ids``.
        computed: attributes of modules that a forward computes with, other than to find its place in a cache.
    """

    entries: frozenset[str] = frozenset()
    numbers: frozenset[tuple[str, int]] = frozenset()
    computed: frozenset[str] = frozenset()


def reads(kinds: Iterable[type]) -> Reads:
    """What these classes, and those that they are made of, read by layer."""
    found = [_of_class(base) for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__)]
    return Reads(*(frozenset().union(*(getattr(each, key) for each in found)) for key in Reads.__dataclass_fields__))


@cache
def _of_class(kind: type) -> Reads:
    if _SHARED.match(kind.__module__):
        return Reads()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made at run time
        return Reads()
    entries, numbers = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            if not isinstance(node.slice, ast.Constant | ast.Slice | ast.UnaryOp):
                entries.add(node.value.attr)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            name, offset = _sum(node.left)
            if isinstance(node.comparators[0], ast.Attribute) and _NUMBER.search(name):
                numbers.add((node.comparators[0].attr, offset))
    return Reads(frozenset(entries), frozenset(numbers), frozenset(_computed(tree)))


def _sum(node: ast.expr) -> tuple[str, int]:
    """(name, what is added) of an expression such as ``layer_idx + 1``; ("", 0) for others."""
    if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and isinstance(node.right.value, int):
        sign = {ast.Add: 1, ast.Sub: -1}.get(type(node.op), 0)
        return (_sum(node.left)[0] if sign else "", sign * node.right.value)
    if isinstance(node, ast.Attribute):
        return node.attr, 0
    return (node.id, 0) if isinstance(node, ast.Name) else ("", 0)


def _computed(tree: ast.AST) -> Iterator[str]:
    """Attributes of ``self`` that are read outside of ``__init__``, in statements that speak of no cache."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name != "__init__")
    for statement in (inner for function in functions for inner in ast.walk(function) if isinstance(inner, ast.stmt)):
        head = [value for key, value in ast.iter_fields(statement) if key not in ("body", "orelse", "finalbody")]
        parts = [each for value in head for each in (value if isinstance(value, list) else [value])]
        for part in parts:
            if isinstance(part, ast.AST) and not _CACHE.search(ast.unparse(part)):
                for node in ast.walk(part):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                        yield node.attr
