"""Which layers an expression names, how many neurons a width means, and which linears a group or a pattern names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attention_linears, attentions
from ffnkit.model.finding import Placed, block_name, ffns
from ffnkit.model.linear import check_editable, is_linear, linears, parameters, stored_weight
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.settings import WhichLayers

_NUMBER = "[0-9]{1,18}"  # more digits no layer has, and Python reads 4,300 at most
AnyPlaced = TypeVar("AnyPlaced", bound=Placed)


def select(found: list[AnyPlaced], layers: WhichLayers) -> list[AnyPlaced]:
    """The FFNs, or whatever else hangs in layers, that a layer expression, a number or a list of them names.

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
    layers = expression(layers)
    for part in layers.replace(" ", "").split(","):
        named = part
        head, colon, rest = part.partition(":")
        if colon and head not in ("last", "first"):
            if head not in by_stack or head == "":
                raise _no_layers(layers, by_stack, f"there is no stack '{head}'")
            stacks, named = [head], rest
        numbers = {(stack, n) for stack in stacks for n in _numbers(named, by_stack[stack])}
        missing = _missing(named, [by_stack[stack] for stack in stacks], _twins(found, stacks))
        if missing or not numbers:
            raise _no_layers(layers, by_stack, missing or f"'{part}' is not a layer expression")
        chosen |= numbers
    return [ffn for ffn in found if (ffn.stack, ffn.layer) in chosen]


def expression(layers: WhichLayers) -> str:
    """Layers as text: "4,5,9" for a list of them."""
    return str(layers) if isinstance(layers, str | int) else ",".join(map(str, layers))


def _numbers(expression: str, present: list[int]) -> set[int]:
    count = max(present) + 1
    if expression == "all":
        return set(present)
    if match := re.fullmatch(rf"(last|first):({_NUMBER})", expression):
        amount = int(match[2])
        wanted = range(count - amount, count) if match[1] == "last" else range(amount)
    elif match := re.fullmatch(rf"({_NUMBER})(?:-({_NUMBER}))?", expression):
        wanted = range(int(match[1]), int(match[2] or match[1]) + 1)
    else:
        return set()
    return {number for number in present if number in wanted}


def _twins(found: Sequence[Placed], stacks: list[str]) -> dict[int, int]:
    """Layers that have what they use from another one, and from which, by number."""
    near = [each for each in found if each.stack in stacks]
    shared = [(block_name(name), each.layer) for each in near for name in getattr(each, "tied", ())]
    return {int(number): layer for block, layer in shared if (number := block.rpartition(".")[2])}


def _missing(expression: str, stacks: list[list[int]], twins: dict[int, int]) -> str:
    """What an expression asks for that no stack has, or ""."""
    count = max(max(present) for present in stacks) + 1
    if match := re.fullmatch(rf"(?:last|first):({_NUMBER})", expression):
        return f"'{expression}' asks for {match[1]} layers" if not 1 <= int(match[1]) <= count else ""
    if match := re.fullmatch(rf"({_NUMBER})(?:-({_NUMBER}))?", expression):
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            return f"the range '{expression}' runs backwards"
        for number in (low, high):
            if not any(number in present for present in stacks):
                there = f"shares the FFN of layer {twins[number]}" if number in twins else "has no FFN"
                return f"layer {number} {there}"
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
        do = "Give a number of neurons, such as 64, or a share of them, such as 0.5"
        raise FfnkitError(asked, "it is no number", do)
    if isinstance(width, float):
        if not 0 < width <= 1:
            raise FfnkitError(asked, "a share must be above 0 and at most 1.0", f"Give a share, or an int up to {ff}")
        return max(1, round(width * ff))
    if not 1 <= width <= ff:
        raise FfnkitError(asked, f"the FFN has {ff} neurons", f"Give an int from 1 to {ff}, or a share up to 1.0")
    return width


# --- linears ----------------------------------------------------------------------------------------------------------

GROUPS = ("ffn", "attention", "qv", "all")


def targets(model: nn.Module, asked: str, layers: WhichLayers = "all") -> tuple[list[str], list[str]]:
    """Names of the modules that get adapters, and of the bare 3-D parameters of experts.

    Args:
        asked: "ffn", "attention", "qv" (query and value; a linear that holds key too as a whole), "all", or a regular
            expression that a whole module name must match.
        layers: of which layers FFNs, and query and value, are taken.

    Raises:
        FfnkitError: nothing matches, a linear is edited already, or the expression cannot be read.
    """
    modules: list[str]
    bare: list[str] = []
    if asked == "qv":
        modules = list(query_value(model, layers))
    elif asked in GROUPS:
        modules, bare = _ffn_targets(model, layers) if asked != "attention" else ([], [])
        if asked != "ffn":
            modules += [name for name in attention_linears(model) if name not in modules]
    else:
        modules = _matching(model, asked)
    modules = [inner for name in modules for inner in _thin(model, name)]
    for name in modules:
        module = model.get_submodule(name)
        if is_linear(module):
            check_editable(module, name, f"targets {asked!r}")
        if isinstance(module, AdapterLayer):
            found, do = f"an update ({module.kind}) is on {name} already", "Name other linears, or fold the model first"
            raise FfnkitError(f"targets {asked!r}", found, do)
        if isinstance(module, ReparametrizedLinear):
            found, do = f"{name} is edited already ({module.kind})", "Fold the model first (ffnkit.fold)"
            raise FfnkitError(f"targets {asked!r}", found, do)
    if not modules and not bare:
        raise FfnkitError(f"targets {asked!r}", "no linear of the model matches", "Name ffn, attention, qv or all")
    return modules, bare


def _thin(model: nn.Module, name: str) -> list[str]:
    """The two linears that a thin pair is made of, in its place; else the module itself."""
    module = model.get_submodule(name)
    thin = module.thin if isinstance(module, ReparametrizedLinear) else ()
    return [f"{name}.{inner}" for inner in thin] or [name]


def one_a_weight(model: nn.Module, names: list[str]) -> list[str]:
    """The first of the linears over one weight: what trains beside it, or masks it, does so for all of them."""
    first: dict[int, str] = {}
    for name in names:
        module = model.get_submodule(name)
        first.setdefault(id(stored_weight(module) if is_linear(module) else module.weight), name)
    return list(first.values())


def query_value(model: nn.Module, layers: WhichLayers = "all") -> dict[str, list[Tensor]]:
    """The linears that hold query or value of an attention, by name.

    With each the rows of query and those of value, int64, where it holds more than one of the three; [] elsewhere.
    Linears that several layers share are named once.
    """
    every = attentions(model)
    found: dict[str, list[Tensor]] = {}
    for attention in select(every, layers) if every else []:
        for path, roles in attention.paths().items():
            wanted = [role for role in roles if role != "k"]
            rows = [attention.rows(role).flatten() for role in wanted] if len(roles) > 1 else []
            if wanted:
                found[f"{attention.name}.{path}" if path else attention.name] = rows
    return found


def _ffn_targets(model: nn.Module, layers: WhichLayers) -> tuple[list[str], list[str]]:
    owned = {id(p) for ffn in select(ffns(model), layers) for p in ffn.parameters()}
    linear = dict(linears(model))
    modules = [name for name, m in linear.items() if any(id(p) in owned for p in parameters(m))]
    inside = {id(p) for name in modules for p in linear[name].parameters()}
    bare = [n for n, p in model.named_parameters() if p.ndim == 3 and id(p) in owned and id(p) not in inside]
    return modules, bare


def _matching(model: nn.Module, pattern: str) -> list[str]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        do = "Name ffn, attention, qv, all, or a regular expression over module names"
        raise FfnkitError(f"targets {pattern!r}", f"not a regular expression ({error})", do) from None
    found = dict(linears(model))
    modules = model.named_modules()
    return [n for n, m in modules if (n in found or isinstance(m, nn.Embedding)) and wanted.fullmatch(n)]
