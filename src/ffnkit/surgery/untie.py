"""Shared FFNs taken apart: linears of each layer's own over one weight, back together, or apart for good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.surgery import description
from ffnkit.surgery.ties import withdraw_tied

Keys = dict[str, tuple[str, str] | None]


@dataclass(frozen=True)
class UntiedFfn:
    """One shared FFN whose owners have linears of their own over the very same weights.

    Attributes:
        owners: their names, the first one first. sites: the linears' paths below an owner.
        stood: the shared modules by the place in which they stood.
        keys, widths: of each owner, as ``description.width_keys`` and ``description.original_widths`` give them.
    """

    owners: list[str]
    sites: list[str]
    stood: dict[str, nn.Module]
    keys: Keys
    widths: dict[str, int]


def untie(model: PreTrainedModel) -> list[UntiedFfn]:
    """Give every layer linears of its own, in place, over the weights that it shares; nothing is computed or copied.

    Each tensor stays one object; what exchanges linears (adapters) then does so for each layer apart.

    Raises:
        FfnkitError: no FFN is shared; layers share more than the FFN; experts in one 3-D parameter, which have no
            linears.
    """
    found = [ffn for ffn in ffns(model) if ffn.tied]
    asked = f"taking the shared FFNs of {type(model).__name__} apart"
    if not found:
        raise FfnkitError(asked, "no FFN is shared", "Leave the setting out, or merge FFNs first")
    for ffn in found:
        if ffn.layout.experts:
            raise FfnkitError(asked, f"{ffn.name} holds experts in one parameter", "Adapt shared FFNs together")
    return part(model, found, asked)


def part(model: PreTrainedModel, shared: Iterable[FFN], asked: str) -> list[UntiedFfn]:
    """:func:`untie` for these FFNs alone."""
    found = ffns(model)
    keys, widths = description.width_keys(model, found), description.original_widths(model, found)
    return [_parted(model, ffn, keys, widths, asked) for ffn in shared]


def _parted(model: PreTrainedModel, ffn: FFN, keys: Keys, widths: dict[str, int], asked: str) -> UntiedFfn:
    weights = {id(p) for p in ffn.parameters()}
    names, sites = list(ffn.owners), [ffn.path(site) for site in ffn.sites]
    stood: dict[str, nn.Module] = {}
    taken: set[int] = set()
    for name in names:
        for place in (f"{name}.{site}" for site in sites):
            shared = next((p for p in _below(name, place) if id(model.get_submodule(p)) in taken), None)
            if shared is None:
                continue
            module = model.get_submodule(shared)
            if any(id(p) not in weights for p in module.parameters()):
                found = f"{shared} stands in several layers and holds more than the FFN"
                raise FfnkitError(asked, found, "Share linears or FFNs, no larger parts")
            stood[shared] = module
            model.set_submodule(shared, _alike(module))
        taken |= {id(model.get_submodule(p)) for site in sites for p in _below(name, f"{name}.{site}")}
    first = ffn.name
    return UntiedFfn(names, sites, stood, dict.fromkeys(names, keys[first]), dict.fromkeys(names, widths[first]))


def retie(model: PreTrainedModel, parted: UntiedFfn) -> None:
    """Put the shared modules back where they stood."""
    for place, module in parted.stood.items():
        model.set_submodule(place, module)


def own_weights(model: nn.Module, parted: UntiedFfn) -> None:
    """Give every layer but the first copies of the float weights that it still shares with an earlier one."""
    taken: set[int] = set()
    for name in parted.owners:
        for site in parted.sites:
            linear = plain_layer(model.get_submodule(f"{name}.{site}"))
            for key, value in linear._parameters.items():
                if type(value) is not nn.Parameter:  # none, or quantized: replaced as a whole
                    continue
                if id(value) in taken:
                    value = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
                    linear._parameters[key] = value
                taken.add(id(value))


def plain_layer(module: nn.Module) -> nn.Module:
    """The linear below an adapter, or the module itself."""
    base = getattr(module, "base_layer", None)
    return module if base is None else plain_layer(base)


def settle(model: PreTrainedModel, parted: Iterable[UntiedFfn], *, untied: Iterable[UntiedFfn]) -> None:
    """Make config and declarations say which FFNs are shared after :func:`rejoin` and :func:`own_weights`.

    Args:
        parted: all that :func:`untie` gave. untied: those of them that have weights of their own for good.
    """
    known: dict[str, Any] = (description.description(model) or {}).get("ffns", {})
    keys: Keys = {name: None if row["key"] is None else tuple(row["key"]) for name, row in known.items()}
    widths = {name: row["original"] for name, row in known.items() if "original" in row}
    for each in parted:
        keys |= each.keys
        widths |= each.widths
    withdraw_tied(model, {f"{n}.{site}." for each in untied for n in each.owners[1:] for site in each.sites})
    if not known:
        keys = {**description.width_keys(model, ffns(model)), **keys}
    description.update_config(model, keys, {**{ffn.name: ffn.width for ffn in ffns(model)}, **widths})


def _below(owner: str, place: str) -> list[str]:
    """The paths from an owner down to one of its linears, both included."""
    inner = place.removeprefix(f"{owner}.").split(".")
    return [owner, *(".".join([owner, *inner[: i + 1]]) for i in range(len(inner)))]


def _alike(module: nn.Module) -> nn.Module:
    """A module of its own that holds the very tensors of another one, quantization states included."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # parameters, buffers, hooks: whoever changes them changes those of one place
            twin.__dict__[name] = value.copy()
    twin._modules = {name: None if child is None else _alike(child) for name, child in module._modules.items()}
    return twin
