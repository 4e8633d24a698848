"""What other packages add: methods, kinds of edits and rows of families, found by their entry points.

A package names them in its own metadata, and ffnkit loads them when they are first looked for:

    [project.entry-points."ffnkit.methods"]
    halve = "package.module:Halve"

The groups are ``ffnkit.methods`` (classes of methods), ``ffnkit.edits`` (classes of edits), ``ffnkit.families`` (a row
of FFNs or a list of rows) and ``ffnkit.attentions`` (the same of attentions).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ffnkit.errors import FfnkitError


@cache
def added(group: str) -> tuple[tuple[str, Any], ...]:
    """(package, object) of each entry point of a group; one that cannot be loaded is warned of and left out."""
    found: list[tuple[str, Any]] = []
    for entry in sorted(entry_points(group=group), key=lambda e: (_package(e), e.name)):
        try:
            value = entry.load()
        except Exception as error:  # whatever another package's import raises must not stop ours
            line = f"{group} '{entry.name}' of {_package(entry)} cannot be loaded ({type(error).__name__}: {error})"
            warnings.warn(f"{line}. It is left out: mend or uninstall {_package(entry)}", stacklevel=3)
            continue
        found += [(_package(entry), each) for each in (value if isinstance(value, list | tuple) else (value,))]
    return tuple(found)


def with_added(group: str, own: Iterable[Any], name: Callable[[Any], str]) -> tuple[Any, ...]:
    """Our own entries and those of other packages.

    Raises:
        FfnkitError: another package takes a name that there is already.
    """
    every = list(own)
    taken = {name(each): "ffnkit" for each in every}
    for package, each in added(group):
        if (first := taken.setdefault(name(each), package)) != package or name(each) in {name(e) for e in every}:
            do = f"Rename it in {package}, or uninstall one of the two"
            raise FfnkitError(f"{group} '{name(each)}' of {package}", f"{first} has one of that name", do)
        every.append(each)
    return tuple(every)


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown package"
