"""Matrix products of 16-bit numbers on a CPU, in the type that it multiplies faster.

A CPU that has no units for bfloat16 or float16 multiplies them two to twelve times slower than float32. A product of
two such numbers is exact in float32, and their sum is made in float32 either way: what comes out differs by the order
of that sum alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

NARROW = (torch.bfloat16, torch.float16)
ATEN = torch.ops.aten
PRODUCTS = frozenset({ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default})
COMPOSED = frozenset({ATEN.linear.default, ATEN.matmul.default, ATEN.einsum.default})  # of these; in inference mode
LEAST = 64  # rows and columns below which a product costs less than turning its factors into float32
SIZE, TRIES = 384, 5


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a type slower than those of float32; measured once, in milliseconds."""
    return dtype in NARROW and _seconds(dtype) > 1.2 * _seconds(torch.float32)


def is_widened(tensor: Tensor) -> bool:
    """Whether a tensor is on a CPU, in a type in which that is slow."""
    return tensor.device.type == "cpu" and tensor.dtype in NARROW and is_slow(tensor.dtype)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of a few tries: other work on the machine makes none of them shorter."""
    one = torch.ones(SIZE, SIZE, dtype=dtype, device="cpu")
    best = float("inf")
    with torch.no_grad():
        for _ in range(TRIES):
            start = time.perf_counter()
            torch.mm(one, one)
            best = min(best, time.perf_counter() - start)
    return best


class _Wide(TorchDispatchMode):
    """Products of narrow numbers made in float32, each rounded as it would have been."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COMPOSED:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func in PRODUCTS and (dtype := _dtype(args)) is not None:
            return func(*(each.float() for each in args), **(kwargs or {})).to(dtype)
        return func(*args, **(kwargs or {}))


def _dtype(factors: tuple[Tensor, ...]) -> torch.dtype | None:
    """The type of a product, where it is better made in float32."""
    left, right = factors[-2:]
    if not is_widened(left) or any(type(each) not in (Tensor, nn.Parameter) for each in factors):
        return None  # what is no plain tensor multiplies in its own way
    return left.dtype if min(*left.shape[-2:], right.shape[-1]) >= LEAST else None


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Inside, passes of this model, and the gradients of them, multiply in the faster type, one product at a time.

    Memory: the factors of one product in float32. Nothing changes on other devices, and where its type is not slow.
    """
    inside = any(isinstance(mode, _Wide) for mode in _get_current_dispatch_mode_stack())
    if inside or not any(is_widened(p) for p in model.parameters()):
        yield
        return
    with _Wide():
        yield


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Inside, these models are in float32 where their type is slow: for steps in which each weight is read many times.

    Afterwards each tensor has its type again; one that was not written to, its bits. Memory: two bytes a number.
    """
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    narrow = [(tensor, tensor.dtype) for tensor in tensors.values() if is_widened(tensor)]
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)
            tensor.grad = None
