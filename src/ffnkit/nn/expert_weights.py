"""Factors on parameters that no module can replace: experts whose weights are one 3-D parameter.

The owner's class is exchanged for one that serves parameter times factor under the parameter's name. The parameter
keeps its name in the state dict, its gradient is that of the factor kept apart, and every implementation of the
experts' forward (a loop, grouped products) sees the product.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

# Not "<parameter>_...": transformers' weight conversions match the parameters' names as patterns.
PREFIX = "neuron_"


def buffer_name(kind: str, site: str) -> str:
    """The name of the buffer that holds a factor, e.g. "neuron_scaled_down"."""
    return f"{PREFIX}{kind}_{site}"


@functools.cache
def _serving(base: Any, pairs: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _product(name, [b for n, b in pairs if n == name]) for name, _ in pairs}
    return type(base.__name__, (base,), {**members, "ffnkit_served": pairs})


def _product(name: str, buffers: list[str]) -> property:
    def product(self: nn.Module) -> Tensor:
        parameter: Any = self._parameters[name]
        factors: list[Tensor] = [getattr(self, buffer) for buffer in buffers]
        # While a checkpoint is read, some of them may be there and others still empty.
        if any(each.is_meta for each in (parameter, *factors)):
            return parameter
        return functools.reduce(torch.mul, map(broadcast, factors), parameter)

    def setter(self: nn.Module, value: Tensor) -> None:  # reached only for values that are no nn.Parameter
        raise TypeError(f"{name} must be an nn.Parameter")

    return property(product, setter)


def broadcast(factor: Tensor) -> Tensor:
    """A factor for each input (E, in), or for each weight (E, rows, columns), as it multiplies a 3-D parameter."""
    return factor[:, None, :] if factor.ndim == 2 else factor


def parametrize_weight(owner: nn.Module, name: str, kind: str, site: str, factor: Tensor) -> None:
    """Make ``owner.name`` read as the parameter times ``factor``, which becomes a buffer: owners can share one."""
    parameter = owner._parameters[name]
    assert parameter is not None
    dtype = torch.bool if factor.dtype == torch.bool else parameter.dtype
    own = factor.to(device=parameter.device, dtype=dtype)
    base = type(owner).__bases__[0] if hasattr(type(owner), "ffnkit_served") else type(owner)
    pairs = (*parametrized_weights(owner), (name, buffer_name(kind, site)))
    owner.register_buffer(buffer_name(kind, site), own)
    owner.__class__ = _serving(base, pairs)


def parametrized_weights(owner: nn.Module) -> tuple[tuple[str, str], ...]:
    """(parameter, buffer) of each factor that the owner's class serves."""
    return getattr(type(owner), "ffnkit_served", ())


def _leaving(owner: nn.Module, keep: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The factors that are not of these kinds."""
    return tuple(pair for pair in parametrized_weights(owner) if pair[1].split("_")[1] not in keep)


def folded(owner: nn.Module, keep: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """By name, new parameters with every factor in them, but for those of the kinds ``keep``."""
    values: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for name, buffer in _leaving(owner, keep):
            held: Any = values.get(name, owner._parameters[name])
            values[name] = nn.Parameter(held * broadcast(getattr(owner, buffer)), held.requires_grad)
    return values


def remove_parametrizations(owner: nn.Module, keep: Collection[str] = ()) -> None:
    """Undo every :func:`serve` but of the kinds ``keep``; the parameters stay as they are."""
    leaving = _leaving(owner, keep)
    staying = tuple(pair for pair in parametrized_weights(owner) if pair not in leaving)
    for _, buffer in leaving:
        delattr(owner, buffer)
    if leaving:
        base = type(owner).__bases__[0]
        owner.__class__ = _serving(base, staying) if staying else base
