"""Where the FFNs of a model are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol

from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.model.config_values import config_value
from ffnkit.model.families.attentions import AttentionLayout, attention_layouts
from ffnkit.model.families.ffns import Layout, layouts
from ffnkit.model.families.keys import TOP_K_KEYS
from ffnkit.model.families.rows import Rows
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import check_model, descend, features, is_linear, linears, stored_weight, walk
from ffnkit.model.proposing import proposed, written

JOINED = "a norm, a convolution or a further linear works on the hidden neurons"


def ffns(model: nn.Module) -> list[FFN]:
    """Every FFN of the model in the order of its modules; FFNs that share their weights are one.

    Raises FfnkitError where no layout matches, naming the mirrored linears of the model and the row to add.
    """
    check_model(model)
    found: list[FFN] = []
    by_weights: dict[tuple[int, ...], FFN] = {}
    rows = Rows(layouts())
    for name, module in walk(model):
        layout = _match(module, rows)
        if layout is None:
            continue
        ffn = FFN(name, module, layout)
        key = tuple(ffn.identity(site) for site in ffn.sites)
        if key in by_weights:
            by_weights[key].tied[name] = module
        else:
            by_weights[key] = ffn
            found.append(ffn)
    if not found:
        raise _unknown(model)
    place(found, model)
    _share(model, found)
    return found


def has_ffns(model: nn.Module) -> bool:
    rows = Rows(layouts())
    return any(_match(module, rows) is not None for _, module in walk(model))


def _match(module: nn.Module, rows: Rows[Layout], *, middle: bool = False) -> Layout | None:
    """The row that a module fits; with ``middle`` also where something works on the hidden neurons in between."""
    if not module._modules and not any(p is not None and p.ndim == 3 for p in module._parameters.values()):
        return None  # most modules; it holds neither linears nor experts
    for layout in rows.of(module):
        if layout.owner not in ("", type(module).__name__):
            continue
        paths = (layout.up, layout.gate or layout.up, layout.down)
        if layout.experts:
            if _are_experts(module, layout, paths):
                return layout
            continue
        found: list[Any] = [descend(module, path) for path in paths]
        if not all(is_linear(linear) for linear in found):
            continue
        (ff, d), gate_shape, (out, inner) = (features(linear) for linear in found)
        if layout.fused:
            ff //= 2
        elif gate_shape != (ff, d):
            continue
        # The output may have another width than the input in a few models; those are no plain FFNs.
        if (out, inner) == (d, ff) and (middle or not _has_middle(module, found, ff, d)):
            return layout
    return None


def _are_experts(module: nn.Module, layout: Layout, paths: tuple[str, str, str]) -> bool:
    """Whether 3-D parameters, and biases beside them, have the shapes of a row."""
    up, gate, down = (module._parameters.get(path) for path in paths)
    if up is None or gate is None or down is None or not up.ndim == gate.ndim == down.ndim == 3:
        return False
    if gate.shape != up.shape or getattr(module, "is_concatenated", True) is layout.interleaved:
        return False
    for path, weight in zip(paths, (up, gate, down), strict=True):
        bias = module._parameters.get(f"{path}_bias")
        if bias is not None and bias.shape != (weight.mT if layout.transposed else weight).shape[:2]:
            return False
    (number, rows, d), (_, out, inner) = (p.mT.shape if layout.transposed else p.shape for p in (up, down))
    return (number, out, inner) == (down.shape[0], d, rows // 2 if layout.fused else rows)


def _has_middle(owner: nn.Module, found: list[Any], ff: int, d: int) -> bool:
    """Whether something with weights of its own works on the hidden neurons: a norm, a convolution, a further linear.

    Then neurons are no independent paths from up to down, and narrowing them changes it. A norm or a convolution stands
    between the two, or beside both, a linear below what holds them (the adapters of Zamba2); what is elsewhere in a
    layer and happens to be as wide is something else.
    """
    if ff == d:
        return False
    own = {id(linear) for linear in found}
    inside = {id(module) for linear in found for module in linear.modules()}
    names = {id(module): name for name, module in owner.named_modules()}
    parents = {names[id(linear)].rpartition(".")[0] for linear in found}
    order = list(names)
    between = range(*sorted((order.index(id(found[0])), order.index(id(found[-1])))))
    for number, module in enumerate(owner.modules()):
        if id(module) in inside:
            continue
        if is_linear(module):
            if _joins(owner, names[id(module)], module, parents, (features(found[0])[0], ff)):
                return True
            continue
        if number not in between and {names[id(module)].rpartition(".")[0]} != parents:
            continue
        own_numbers = [p for p in module.parameters(recurse=False) if p.numel() > 1]  # one alone treats all alike
        if any(len(p.shape) in (1, 3, 4) and p.shape[0] == ff for p in own_numbers):
            return not any(id(child) in own for child in module.children())
    return False


def _joins(owner: nn.Module, path: str, linear: nn.Module, parents: set[str], wide: tuple[int, int]) -> bool:
    """Whether a further linear gives as much as up does, or reads as much as down, and is none of an attention."""
    out, inner = features(linear)
    if (out != wide[0] and inner != wide[1]) or not any(not p or path.startswith(f"{p}.") for p in parents):
        return False
    rows, parts = Rows(attention_layouts()), path.split(".")
    above = (owner.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return not any(attention_layout(module, rows) for module in above)


class Placed(Protocol):
    """Something that hangs in a layer of a stack."""

    name: str
    stack: str
    layer: int


def place(found: Sequence[Placed], model: nn.Module) -> None:
    """Set stack and layer from the path: what stands before the first number is the stack, the number the layer.

    A stack has one name for all that hangs in it: it is told from every other one that holds FFNs or attention.
    """
    counters: dict[tuple[str, ...], int] = defaultdict(int)
    rows, attention = Rows(layouts()), Rows(attention_layouts())
    distinct = dict.fromkeys(_stack(each.name)[0] for each in found)
    for name, module in walk(model):
        stack = _stack(name)[0]
        if stack not in distinct and (_match(module, rows) or attention_layout(module, attention)):
            distinct[stack] = None
    for each in found:
        prefix, number = _stack(each.name)
        each.layer = counters[prefix] if number is None else number
        counters[prefix] += 1
        others = [other for other in distinct if other != prefix]
        if others:
            own = [part for part in prefix if all(part not in other for other in others)]
            word = next((p for p in own if p in ("encoder", "decoder")), own[0] if own else ".".join(prefix))
            each.stack = re.sub(r"_(model|tower|transformer|module)$", "", word)


def _stack(name: str) -> tuple[tuple[str, ...], int | None]:
    """The parts of a path before its first number, and that number; (), None where there is none."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ((), None) if place is None else (tuple(parts[:place]), int(parts[place]))


def attention_layout(module: nn.Module, rows: Rows[AttentionLayout]) -> AttentionLayout | None:
    """The row of an attention that a module fits."""
    for layout in rows.of(module):
        paths = (layout.q, layout.k, layout.v, layout.o)
        if not all(is_linear(descend(module, path)) for path in paths):
            continue
        inner = descend(module, layout.inner) if layout.inner else module
        if all(getattr(inner, name, None) is value for name, value in layout.where):
            return layout
    return None


def block_name(ffn: str) -> str:
    """The layer that holds an FFN: its path up to the first number; "" where there is none."""
    parts = ffn.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _share(model: nn.Module, found: list[FFN]) -> None:
    """Set the share of tokens that reach each routed expert."""
    for ffn in found:
        parent = ffn.name.rpartition(".")[0]
        if ffn.layout.experts:
            shared = "shared" in ffn.name.rpartition(".")[2]  # every token passes
            ffn.active = 1.0 if shared else _top_k(model, ffn.module, ffn.layer) / ffn.experts
        elif parent.rpartition(".")[2] == "experts":
            container = model.get_submodule(parent)
            ffn.active = _top_k(model, container, ffn.layer) / max(len(list(container.children())), 1)


def _top_k(model: nn.Module, owner: nn.Module, layer: int) -> int:
    config = getattr(owner, "config", None) or getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for each in configs:
        for key in TOP_K_KEYS:
            if isinstance(found := config_value(each, key, layer), int):
                return found
    return 1


def _unknown(model: nn.Module) -> FfnkitError:
    """The error for a model without a known FFN, with the mirrored linears that it has."""
    name = type(model).__name__
    pairs = list(mirrored(model))
    between = [owner for owner, *_ in with_middle(model)] + [pair[0] for pair in pairs if are_joined(model, *pair)]
    pairs = [pair for pair in pairs if pair[0] not in between]
    if between and not pairs:
        found = f"in '{between[0]}' {JOINED}, which no edit goes along with"
        return FfnkitError(f"the FFNs of {name}", found, "Use a model without one")
    deep = [p for p, value in model.named_parameters() if "expert" in p and (value.ndim == 3 or p[-7:] != ".weight")]
    if deep:
        found = f"its experts lie in parameters of a form that is not known, such as {deep[0]}"
        return FfnkitError(f"the FFNs of {name}", found, "Use a model of another family")
    if not pairs:
        return FfnkitError(f"the FFNs of {name}", "it has no pair of linears d -> ff -> d", "Name a transformer model")
    owner, up, down = pairs[0]
    (ff, d) = features(model.get_submodule(f"{owner}.{up}" if owner else up))
    row = proposed(name, model.get_submodule(owner), up, down)
    return FfnkitError(
        f"the FFNs of {name}",
        f"no layout is known, but {len(pairs)} pairs of mirrored linears, the first in "
        f"'{owner or 'the model itself'}': {up} ({d} -> {ff}) and {down} ({ff} -> {d})",
        f"If they are its FFNs, add the row: ffnkit.LAYOUTS.append({written(row)})",
    )


def with_middle(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout]]:
    """(path, module, row) of what would be an FFN, were there not something that works on its hidden neurons."""
    rows = Rows(layouts())
    for name, module in model.named_modules():
        layout = _match(module, rows, middle=True)
        if layout is not None and _match(module, rows) is None:
            yield name, module, layout


def are_joined(model: nn.Module, owner: str, up: str, down: str) -> bool:
    """Whether something works on the hidden neurons between mirrored linears of no known row."""
    module = model.get_submodule(owner)
    first, last = module.get_submodule(up), module.get_submodule(down)
    gates = [each for each in module.modules() if is_linear(each) and features(each) == features(first)]
    return _has_middle(module, [first, *(each for each in gates if each is not first), last], *features(first))


def mirrored(model: nn.Module, *, without: Container[int] = ()) -> Iterator[tuple[str, str, str]]:
    """(owner, up, down) of linears d -> ff and ff -> d with ff > d that hang close together.

    Also d -> 2 ff and ff -> d, where one linear may hold gate and up.

    Args:
        without: ids of weights that are not asked for.
    """
    shapes = {n: features(linear) for n, linear in linears(model) if id(stored_weight(linear)) not in without}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        parts = name.split(".")
        groups[".".join(parts[:-1])].append(name)
        if len(parts) > 2:
            groups[".".join(parts[:-2])].append(name)
    used: set[str] = set()
    for owner in sorted(groups, key=lambda o: -o.count(".")):
        for up in groups[owner]:
            ff, d = shapes[up]
            for down in groups[owner]:
                if up not in used and down not in used and ff > d and shapes[down] in ((d, ff), (d, ff / 2)):
                    used |= {up, down}
                    start = len(owner) + 1 if owner else 0
                    yield owner, up[start:], down[start:]
