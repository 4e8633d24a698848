"""Where the large intermediate tensors of a computation lie: in memory, or where somebody gives them room.

Results are the same to the bit: it is the same operation, written into another tensor (``out=``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Maker = Callable[[tuple[int, ...], torch.dtype], Tensor]
_makers: list[Maker] = []
_pauses: list[Callable[[], None]] = []


@contextmanager
def elsewhere(make: Maker, between: Callable[[], None]) -> Iterator[None]:
    """While the block runs, :func:`empty` and :func:`made` on the CPU fill what ``make(shape, dtype)`` gives.

    ``between`` is called between the steps of what goes through large tensors.
    """
    _makers.append(make)
    _pauses.append(between)
    try:
        yield
    finally:
        _makers.pop()
        _pauses.pop()


def pause() -> None:
    """Between two steps through large tensors: whoever gives them room may tidy up."""
    if _pauses:
        _pauses[-1]()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor to fill, on the device and in the dtype of another one."""
    dtype = dtype or like.dtype
    if _makers and like.device.type == "cpu":
        return _makers[-1](tuple(shape), dtype)
    return like.new_empty(shape, dtype=dtype)


def made(function: Callable[..., Tensor], *given: Any, shape: Sequence[int], like: Tensor) -> Tensor:
    """``function(*given)``, which has this shape and the dtype of ``like``; no gradients where it lies elsewhere."""
    if not _makers or like.device.type != "cpu":
        return function(*given)
    with torch.no_grad():
        return function(*given, out=empty(shape, like))


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, itself where it has this dtype."""
    if not _makers or value.device.type != "cpu" or value.dtype == dtype:
        return value.to(dtype)
    with torch.no_grad():
        return empty(value.shape, value, dtype).copy_(value)
