"""YAML in which a key stands once, dates are text, 1e-4 is a number, and nothing grows beyond what was written."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ffnkit.errors import FfnkitError

DEEPEST = 50  # levels of lists and mappings within one another
LARGEST = 100_000  # values, each counted as often as aliases repeat it


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with our own rules."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEEPEST:
            raise _Unfit(f"more than {DEEPEST} lists and mappings lie within one another")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > LARGEST:
            raise _Unfit(f"it is more than {LARGEST} values")
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError):  # text that its tag does not fit
            kind = node.tag.rpartition(":")[2]
            problem = f"{node.value!r:.60} cannot be read as {kind}; quote it where it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Unfit(Exception):
    pass


def _values(node: Any, known: dict[int, int]) -> int:
    """How many values a node holds; one that holds itself, which is refused later, counts once."""
    if id(node) not in known:
        known[id(node)] = 1
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
        known[id(node)] = 1 + sum(_values(each, known) for pair in pairs for each in pair)
    return known[id(node)]


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict):
            continue  # the parent's own error is clear
        line = key_node.start_mark.line + 1
        if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
            raise _Unfit(f"{key} is given twice, on lines {seen[key]} and {line}")
        seen[key] = line
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# YAML 1.1 wants a dot in the mantissa and a sign in the exponent: 1e-4 would be text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    """The data in ``text``; ``where`` names it in errors.

    Raises:
        FfnkitError: text that is not YAML, a key given twice, values that do not fit their tags, too much of it.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _Unfit as error:
        do = "Keep one, or give the other another name" if "twice" in str(error) else "Write less of it"
        raise FfnkitError(where, str(error), do) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" on line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise FfnkitError(where, f"not valid YAML{place}: {problem}", "Mend it") from None
