"""What the labels of a user's rows are, decided once: classes by name, or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.fields import LabelKind

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NOTHING = {"na", "n/a", "nan", "null", "none", "inf", "infinity", "-", "?", "."}
"""How files write that a number is missing; among names they are names."""
_SHOWN = 8


@dataclass(frozen=True)
class Labels:
    """The one decision about a column of labels, which all files of a task share.

    Attributes:
        column: its name.
        names: the classes, numbers by value and names by spelling; () where labels are numbers.
        first: where it was decided, in words.
        told: the decision in words.
    """

    column: str
    names: tuple[str, ...]
    first: str
    told: str

    def read(self, values: Sequence[Any], where: str) -> list[Any]:
        """Class ids, or numbers.

        Raises:
            FfnkitError: a value that is no number, or a class that is not known.
        """
        if not self.names:
            return _numbers(values, where, self.column)
        ids = {name: index for index, name in enumerate(self.names)}
        found = _names(values, where, self.column)
        unknown = [name for name in found if name not in ids]
        if unknown:
            what = f"{len(unknown)} of {len(found)} rows have a label that {self.first} lacks, such as {unknown[0]!r}"
            raise FfnkitError(where, what, f"Use the labels {_listed(self.names)}")
        return [ids[name] for name in found]


def decide(
    values: Sequence[Any],
    where: str,
    column: str,
    kind: LabelKind | None = None,
    known: Sequence[str] = (),
) -> Labels:
    """Whether labels are classes or numbers.

    Text is a number where it is a finite decimal number ("7", "-0.5", "1.5e-3"; not "1_0" or "inf"). Labels are numbers
    where all of them are and one has a fraction after a point ("3.5"), else they are classes. A class is the text as it
    stands, without white space at its ends: "007" and "7" are two. Numbers of files that know numbers (JSON, parquet)
    are the same class where their values are: 1 and 1.0.

    Args:
        values: the labels of all rows, none missing. where, column: for error messages.
        kind: "class" or "number" says so, whatever they look like.
        known: the classes of a model that is evaluated; they are the classes where all labels are among them, whether
            each occurs or not.

    Raises:
        FfnkitError: numbers among which some are missing or text; a single class; numbers that are all equal; nearly as
            many classes as rows; numbers beside names where a file tells them apart.
    """
    found = [_number(value) for value in values]
    if kind != "number" and known and {_name(value) for value in values} <= set(known):
        return Labels(column, tuple(known), "the model", f"{len(known)} classes of the model: {_listed(known)}")
    if (kind or _looks_like(values, found, where, column)) == "number":
        numbers = _numbers(values, where, column)
        if len(set(numbers)) < 2:
            raise FfnkitError(where, f"every label is {numbers[0]:g}", "Give labels that differ")
        return Labels(column, (), where, f"numbers from {min(numbers):g} to {max(numbers):g}")
    different = _names(values, where, column)
    classes = sorted(set(different))
    if kind is None and len(classes) > max(20, len(values) // 2):
        what = f"{len(classes)} different labels in {column!r} among {len(values)} rows"
        do = "Name the column of the classes, or give the label kind number if these are numbers"
        raise FfnkitError(where, what, do)
    if len(classes) < 2:
        raise FfnkitError(where, f"all {len(values)} rows have the label {classes[0]!r}", "Give two classes or more")
    numeric = None not in found
    if numeric:
        classes.sort(key=lambda name: (Decimal(name), name))
    what = "numbers" if numeric else "text"
    return Labels(column, tuple(classes), where, f"{len(classes)} classes ({what}): {_listed(classes)}")


def missing(value: Any) -> bool:
    """Whether a row has no label: nothing, white space, or NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _looks_like(values: Sequence[Any], numbers: Sequence[float | None], where: str, column: str) -> LabelKind:
    fractions = any(
        number is not None and not number.is_integer() and (not isinstance(value, str) or "." in value)
        for value, number in zip(values, numbers, strict=True)
    )
    others = [value for value, number in zip(values, numbers, strict=True) if number is None]
    if 0 < len(others) < len(values) and (fractions or all(str(each).strip().lower() in _NOTHING for each in others)):
        what = f"{len(others)} of {len(values)} rows have no number in {column!r}, such as {others[0]!r}, and others do"
        raise FfnkitError(where, what, "Fill or remove these rows, or give the label kind class if all are names")
    return "number" if fractions else "class"


def _number(value: Any) -> float | None:
    """The finite number that a value is, or None."""
    if isinstance(value, str):
        value = value.strip() if _NUMBER.fullmatch(value.strip()) else None
    if value is None or isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(values: Sequence[Any], where: str, column: str) -> list[float]:
    found = [_number(value) for value in values]
    odd = [value for value, number in zip(values, found, strict=True) if number is None]
    if odd:
        what = f"{len(odd)} of {len(values)} rows have no finite number in {column!r}, such as {odd[0]!r}"
        raise FfnkitError(where, what, "Give numbers, or classes in all files")
    return [number for number in found if number is not None]


def _names(values: Sequence[Any], where: str, column: str) -> list[str]:
    kinds = {bool if isinstance(v, bool) else str if isinstance(v, str) else float for v in values}
    if len(kinds) > 1:
        what = f"some labels in {column!r} are numbers and some are names"
        raise FfnkitError(where, what, "Write all labels the one way")
    return [_name(value) for value in values]


def _name(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    whole = isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value)
    return str(int(value)) if whole else str(value)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
