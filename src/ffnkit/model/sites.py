"""Which linears of a model are meant by a group's name or a pattern."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attention_linears, attentions
from ffnkit.model.finding import ffns
from ffnkit.model.layers import select
from ffnkit.model.linear import check_editable, is_linear, linears, parameters, stored_weight
from ffnkit.nn.adapted import Adapted
from ffnkit.nn.special import Special

GROUPS = ("ffn", "attention", "qv", "all")


def targets(model: nn.Module, asked: str, layers: str = "all") -> tuple[list[str], list[str]]:
    """Names of the modules that get adapters, and of the bare 3-D parameters of experts.

    Of linears that share a weight the first one is named.

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
    modules = _once(model, modules)
    for name in modules:
        module = model.get_submodule(name)
        if is_linear(module):
            check_editable(module, name, f"targets {asked!r}")
        if isinstance(module, Adapted):
            found, do = f"an update ({module.kind}) is on {name} already", "Name other linears, or fold the model first"
            raise FfnkitError(f"targets {asked!r}", found, do)
        if isinstance(module, Special):
            found, do = f"{name} is edited already ({module.kind})", "Fold the model first (ffnkit.fold)"
            raise FfnkitError(f"targets {asked!r}", found, do)
    if not modules and not bare:
        raise FfnkitError(f"targets {asked!r}", "no linear of the model matches", "Name ffn, attention, qv or all")
    return modules, bare


def _once(model: nn.Module, names: list[str]) -> list[str]:
    """The first of the linears over one weight: what trains beside it, or masks it, does so for all of them."""
    first: dict[int, str] = {}
    for name in names:
        module = model.get_submodule(name)
        first.setdefault(id(stored_weight(module) if is_linear(module) else module.weight), name)
    return list(first.values())


def query_value(model: nn.Module, layers: str = "all") -> dict[str, list[Tensor]]:
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


def _ffn_targets(model: nn.Module, layers: str) -> tuple[list[str], list[str]]:
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
