"""Which places of a model were compressed: a training may treat them apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ffnkit.edits import Edit
from ffnkit.model.attention import attention_linears, attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.linear import walk
from ffnkit.surgery.description import description, standing_apart

UNSAVED = "a model that was edited in memory: save it and open that"
_MARK = "_ffnkit_compressed"  # on an owner: an FFN or attention that an edit changed


def mark(model: nn.Module, names: Iterable[str]) -> None:
    """Note that these FFNs or attentions were compressed; in memory only, for some shapes do not tell it."""
    modules = dict(walk(model))
    for name in names:
        if name in modules:
            vars(modules[name])[_MARK] = True


def leave_name(model: nn.Module) -> None:
    """Have the config no longer name where an edited model came from; ``model.name_or_path`` still says it.

    Libraries (TRL) open a second model by that name, and would get the one from before the edit.
    """
    if (config := getattr(model, "config", None)) is not None:
        config._name_or_path = UNSAVED


def places(edits: Iterable[Edit]) -> list[str]:
    """What edits compress; those that train beside weights compress nothing."""
    return [name for edit in edits if not edit.trains for name in edit.claimed]


def compressed_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters of compressed FFNs, attentions and masked linears, with those that train beside them.

    A place counts where a plan was applied to it in this process, or where the config tells it of a model that was
    opened: factors or thin pairs apart, shared weights, heads that are gone, neurons fewer than in another layer. An
    opened model whose FFNs all have one width and nothing beside them tells nothing.
    """
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    found = ffns(base)
    told = description(base) is not None
    widest: dict[str, int] = defaultdict(int)
    for ffn in found:
        widest[ffn.stack] = max(widest[ffn.stack], ffn.width)
    chosen: set[int] = set()
    for ffn in found:
        odd = told and (bool(ffn.special) or bool(ffn.tied) or ffn.width < widest[ffn.stack])
        if odd or any(_MARK in vars(owner) for owner in ffn.owners.values()):
            chosen |= {id(p) for p in _parameters(ffn)}
    linears = [(name, base.get_submodule(name)) for name in attention_linears(base)]
    for attention in attentions(base):
        if attention.kept or _MARK in vars(attention.module):
            own = [linear for name, linear in linears if name.startswith(f"{attention.name}.")]
            chosen |= {id(p) for linear in own for p in linear.parameters()}
    return chosen | {id(p) for layer in standing_apart(base, found).values() for p in layer.parameters()}


def _parameters(ffn: FFN) -> Iterator[nn.Parameter]:
    if ffn.layout.experts:
        yield from ffn.parameters()
        return
    for site in ffn.sites:
        for linear in ffn.linears(site):
            yield from linear.parameters()
