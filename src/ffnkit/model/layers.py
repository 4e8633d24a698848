"""Which layers an expression names, and how many neurons a width means."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TypeVar

from ffnkit.errors import FfnkitError
from ffnkit.model.finding import Placed

AnyPlaced = TypeVar("AnyPlaced", bound=Placed)


def select(found: list[AnyPlaced], layers: str) -> list[AnyPlaced]:
    """The FFNs, or whatever else hangs in layers, that a layer expression names.

    ``"all"``, ``"last:8"``, ``"first:4"``, ``"4-11"``, ``"4,5,9"``, mixtures with commas; ``"encoder:"`` or
    ``"decoder:"`` (or another stack's name) before a part holds for it and the parts after it. Without it every
    stack is meant, layer numbers counted within each.

    Raises FfnkitError on an expression that cannot be read or names layers that do not exist.
    """
    by_stack: dict[str, list[int]] = defaultdict(list)
    for ffn in found:
        if ffn.layer not in by_stack[ffn.stack]:
            by_stack[ffn.stack].append(ffn.layer)
    chosen: set[tuple[str, int]] = set()
    stacks = list(by_stack)
    for part in str(layers).replace(" ", "").split(","):
        expression = part
        head, colon, rest = part.partition(":")
        if colon and head not in ("last", "first"):
            if head not in by_stack or head == "":
                raise _no_layers(layers, by_stack, f"there is no stack '{head}'")
            stacks, expression = [head], rest
        numbers = {(stack, n) for stack in stacks for n in _numbers(expression, by_stack[stack])}
        missing = _missing(expression, [by_stack[stack] for stack in stacks])
        if missing or not numbers:
            raise _no_layers(layers, by_stack, missing or f"'{part}' is not a layer expression")
        chosen |= numbers
    return [ffn for ffn in found if (ffn.stack, ffn.layer) in chosen]


def _numbers(expression: str, present: list[int]) -> set[int]:
    count = max(present) + 1
    if expression == "all":
        return set(present)
    if match := re.fullmatch(r"(last|first):(\d+)", expression):
        amount = int(match[2])
        wanted = range(count - amount, count) if match[1] == "last" else range(amount)
    elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", expression):
        wanted = range(int(match[1]), int(match[2] or match[1]) + 1)
    else:
        return set()
    return set(wanted) & set(present)


def _missing(expression: str, stacks: list[list[int]]) -> str:
    """What an expression asks for that no stack has, or ""."""
    count = max(max(present) for present in stacks) + 1
    if match := re.fullmatch(r"(?:last|first):(\d+)", expression):
        return f"'{expression}' asks for {match[1]} layers" if not 1 <= int(match[1]) <= count else ""
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", expression):
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            return f"the range '{expression}' runs backwards"
        for number in (low, high):
            if not any(number in present for present in stacks):
                return f"layer {number} has no FFN"
    return ""


def _no_layers(layers: str, by_stack: dict[str, list[int]], found: str) -> FfnkitError:
    have = "; ".join(f"{stack + ': ' if stack else ''}{ranges(sorted(n))}" for stack, n in by_stack.items())
    do = f"The model has FFNs in layers {have}. Write all, last:N, first:N, A-B, A,B,C"
    if len(by_stack) > 1:
        do += f", with {' or '.join(stack + ':' for stack in by_stack)} before it"
    return FfnkitError(f"layers '{layers}'", found, do)


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: "0-5" where none is missing, else "0,2,5"."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def resolve_width(width: int | float, ff: int, name: str) -> int:
    """The number of neurons that a setting asks for: an int counts neurons, a float is a share (1.0 = all).

    Raises FfnkitError unless 1 <= result <= ff and a share lies in (0, 1].
    """
    asked = f"width {width} for {name}"
    if isinstance(width, bool) or not isinstance(width, (int, float)):
        raise FfnkitError(asked, f"a {type(width).__name__}", "Give a number of neurons (int) or a share (float)")
    if isinstance(width, float):
        if not 0 < width <= 1:
            raise FfnkitError(asked, "a share must be above 0 and at most 1.0", f"Give a share, or an int up to {ff}")
        return max(1, round(width * ff))
    if not 1 <= width <= ff:
        raise FfnkitError(asked, f"the FFN has {ff} neurons", f"Give an int from 1 to {ff}, or a share up to 1.0")
    return width
