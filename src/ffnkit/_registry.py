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

from ffnkit.errors import FfnkitError, FfnkitWarning


def _anything(value: Any) -> str:
    return ""


@cache
def added(group: str, wrong: Callable[[Any], str] = _anything) -> tuple[tuple[str, Any], ...]:
    """(package, object) of each entry point of a group; one that is of no use is warned of and left out.

    Args:
        wrong: what is wrong with an object, "" where nothing is.
    """
    found: list[tuple[str, Any]] = []
    for entry in sorted(entry_points(group=group), key=lambda e: (_package(e), e.name)):
        try:
            value = entry.load()
            every = value if isinstance(value, list | tuple) else (value,)
            if fault := next(filter(None, map(wrong, every)), ""):
                raise TypeError(fault)
        except Exception as error:  # whatever another package's import raises must not stop ours
            line = f"{group} '{entry.name}' of {_package(entry)} cannot be used ({type(error).__name__}: {error})"
            warnings.warn(f"{line}. It is left out: mend or uninstall {_package(entry)}", FfnkitWarning, stacklevel=3)
            continue
        found += [(_package(entry), each) for each in every]
    return tuple(found)


def with_added(
    group: str, own: Iterable[Any], name: Callable[[Any], str], wrong: Callable[[Any], str] = _anything
) -> tuple[Any, ...]:
    """Our own entries and those of other packages.

    Raises:
        FfnkitError: another package takes a name that there is already.
    """
    every = list(own)
    taken = {name(each): "ffnkit" for each in every}
    for package, each in added(group, wrong):
        if (first := taken.setdefault(name(each), package)) != package or name(each) in {name(e) for e in every}:
            do = f"Rename it in {package}, or uninstall one of the two"
            raise FfnkitError(f"{group} '{name(each)}' of {package}", f"{first} has one of that name", do)
        every.append(each)
    return tuple(every)


def lacking(value: Any, *names: str) -> str:
    """Which of these attributes an object lacks, in words; "" where it has all."""
    gone = [name for name in names if not hasattr(value, name)]
    return f"{getattr(value, '__name__', value)} has no {', '.join(gone)}" if gone else ""


def not_of(value: Any, kind: type) -> str:
    """That an object is not of a class, in words; "" where it is."""
    return "" if isinstance(value, kind) else f"{value!r} is no {kind.__name__}"


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown package"
