"""Attention that lost heads while what it is told from outside still speaks of all of them.

Relative position biases and ALiBi slopes are computed once for every head and passed to all layers; a few families
read the number of heads from the config. The class of such a module is exchanged for one that selects its own heads of
what comes in, and passes on what it got.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

RECORD = "_ffnkit_heads"  # on a module: which heads it kept
_TABLE = "_ffnkit_bias"  # on a module, for the time of one forward: the biases of all heads


@dataclass(frozen=True)
class KeptHeads:
    """The heads that stayed, by their numbers among those that the config gives.

    Attributes:
        heads: query heads. kv: heads of key and value. of: how many there were of each.
    """

    heads: tuple[int, ...]
    kv: tuple[int, ...]
    of: tuple[int, int]


def kept_heads(module: nn.Module) -> KeptHeads | None:
    """Which heads a module kept, None where it has all that its config gives."""
    record: KeptHeads | None = module.__dict__.get(RECORD)
    return record


def plain_class(module: nn.Module) -> Any:
    """The family's own class of a module."""
    return type(module).__bases__[0] if hasattr(type(module), "ffnkit_narrowed") else type(module)


def prune_attention(module: nn.Module, record: KeptHeads | None, incoming: str, reads: bool) -> None:
    """Note which heads a module kept, and let it select them of what comes in.

    Args:
        record: None where the config says it again: the module has its own class back.
        incoming: the argument with one entry a head, or "".
        reads: whether the family's forward reads the counts of its config.
    """
    base = plain_class(module)
    if record is None:
        module.__dict__.pop(RECORD, None)
        module.__class__ = base
        return
    module.__dict__[RECORD] = record
    if incoming or reads:
        module.__class__ = _narrowed(base, incoming, reads)


@functools.cache
def _narrowed(base: Any, incoming: str, reads: bool) -> type[nn.Module]:
    members: dict[str, Any] = {"ffnkit_narrowed": True}
    if incoming:
        members["forward"] = _forward(base, incoming)
        if hasattr(base, "compute_bias"):
            members["compute_bias"] = _compute_bias(base)
    if reads:
        members["config"] = property(_config, _set_config)
    return type(base.__name__, (base,), members)


def _forward(base: Any, incoming: str) -> Any:
    """The family's forward, given its own heads of the argument ``incoming``.

    T5 gives the biases on with its output: those of all heads then, for the layers behind.
    """
    place = list(inspect.signature(base.forward).parameters).index(incoming) - 1
    passes_on = hasattr(base, "compute_bias")

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record: KeptHeads = self.__dict__[RECORD]
        given: Tensor | None = kwargs.get(incoming, args[place] if len(args) > place else None)
        if given is not None:
            own = select(given, record)
            if incoming in kwargs:
                kwargs[incoming] = own
            else:
                args = (*args[:place], own, *args[place + 1 :])
        output = base.forward(self, *args, **kwargs)
        if not passes_on:
            return output
        whole = given if given is not None else self.__dict__.pop(_TABLE, None)
        if whole is None:  # attention to another stack: zeros
            whole = output[1][:, :1].expand(-1, record.of[0], -1, -1)
        return (output[0], whole, *output[2:])

    return forward


def _compute_bias(base: Any) -> Any:
    @functools.wraps(base.compute_bias)
    def compute_bias(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        whole: Tensor = base.compute_bias(self, *args, **kwargs)
        self.__dict__[_TABLE] = whole
        return select(whole, self.__dict__[RECORD])

    return compute_bias


def select(value: Tensor, record: KeptHeads) -> Tensor:
    """The kept heads of a bias: (.., heads, n, n), or (batch * heads, 1, n)."""
    total, heads = record.of[0], list(record.heads)
    if value.ndim == 3 and value.shape[1] == 1 and value.shape[0] % total == 0:
        return value.unflatten(0, (-1, total))[:, heads].flatten(0, 1)
    return value[..., heads, :, :] if value.shape[-3] == total else value


class _View:
    """A config but for the number of heads; made anew whenever it is asked for."""

    def __init__(self, config: Any, **counts: int) -> None:
        self.__dict__.update(_config=config, _counts=counts)

    def __getattr__(self, name: str) -> Any:
        counts = self.__dict__["_counts"]
        return counts[name] if name in counts else getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)


def _config(self: nn.Module) -> Any:
    record: KeptHeads = self.__dict__[RECORD]
    counts = {"num_attention_heads": len(record.heads), "num_key_value_heads": len(record.kv)}
    return _View(self.__dict__["config"], **counts)


def _set_config(self: nn.Module, value: Any) -> None:
    self.__dict__["config"] = value
