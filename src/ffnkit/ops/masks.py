"""Which entries of weights become zero: the lowest scores of many tensors together, of each row, or of each group.

Exact counts everywhere, and ties go to the first entry, so that a mask depends on the scores alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ffnkit.errors import FfnkitError

DIGIT = 16  # bits that one pass over the scores settles
Scores = Callable[[], Iterable[Tensor]]


def packed(mask: Tensor) -> Tensor:
    """A mask (bool) as bits, row by row, the first one highest; uint8, on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of this shape that :func:`packed` made bits of."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape))).bool().reshape(tuple(shape))


def ordered_keys(scores: Tensor) -> Tensor:
    """Signed integers, as wide as the floats, in the very order of the scores; both zeros are one.

    Raises:
        FfnkitError: a score that is no number.
    """
    if bool(torch.isnan(scores).any()):
        raise FfnkitError("scores of weights", "some are NaN", "Repair the model's weights or the data first")
    kinds = {torch.float32: torch.int32, torch.float64: torch.int64}
    whole = (scores + 0.0).contiguous()  # -0.0 becomes 0.0
    bits = whole.view(kinds[whole.dtype])
    limit = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ limit, bits)


def lowest(scores: Scores, count: int) -> Iterator[Tensor]:
    """Masks, bool, one for each tensor of scores in turn: false at the ``count`` lowest of all, true elsewhere.

    The ``count``-th lowest score is found digit by digit of its bits, so never more than one tensor of scores is held:
    the scores are asked for again in each pass (three for float32, five for float64), and have to be the same.

    Args:
        scores: gives the tensors, float32 or float64, of any shapes and all of one dtype.

    Raises:
        FfnkitError: more entries are to go than there are, or a score is NaN.
    """
    if count <= 0:
        yield from (torch.ones(each.shape, dtype=torch.bool, device=each.device) for each in scores())
        return
    bound, ties = _bound(scores, count)
    for each in scores():
        keys = ordered_keys(each).flatten()
        mask = keys > bound
        if ties:
            same = (keys == bound).nonzero()[:, 0]
            stay = same[ties:]
            ties -= min(ties, len(same))
        else:
            stay = (keys == bound).nonzero()[:, 0]
        yield mask.index_fill_(0, stay, True).view(each.shape)


def _bound(scores: Scores, count: int) -> tuple[int, int]:
    """The key of the ``count``-th lowest score, and how many entries of that very key are among the ``count``."""
    known, left, shift = 0, count, -1
    first = True
    while first or shift > 0:
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64)
        bits = 0
        for each in scores():
            keys = ordered_keys(each).flatten()
            bits = torch.iinfo(keys.dtype).bits
            here = bits - DIGIT if first else shift - DIGIT
            if first:
                digits = (keys >> here) + (1 << (DIGIT - 1))
            else:
                digits = (keys[keys >> shift == known] >> here) & ((1 << DIGIT) - 1)
            counts += torch.bincount(digits.flatten(), minlength=1 << DIGIT).cpu()
        sums = counts.cumsum(0)
        if first and int(sums[-1]) < count:
            raise FfnkitError(f"{count} zeros", f"there are {int(sums[-1])} weights", "Give a smaller ratio")
        digit = int(torch.searchsorted(sums, left))
        left -= int(sums[digit - 1]) if digit else 0
        known = digit - (1 << (DIGIT - 1)) if first else (known << DIGIT) | digit
        shift = bits - DIGIT if first else shift - DIGIT
        first = False
    return known, left


def lowest_of_rows(scores: Tensor, count: int) -> Tensor:
    """A mask, bool, false at the ``count`` lowest of each row (the last axis)."""
    ordered_keys(scores)
    mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    places = torch.sort(scores, dim=-1, stable=True).indices[..., :count]
    return mask.scatter_(-1, places, False)


def lowest_of_groups(scores: Tensor, kept: int, size: int) -> Tensor:
    """A mask, bool, true at the ``kept`` highest of each ``size`` entries that follow each other along the inputs.

    Args:
        scores: (.., in) with in a multiple of ``size``.
    """
    grouped = scores.unflatten(-1, (-1, size))
    return lowest_of_rows(grouped, size - kept).flatten(-2)


def read_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of "N:M": of each M weights along the inputs N stay. Raises FfnkitError where it is none."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise FfnkitError(f"pattern {pattern!r}", "not of the form N:M with N below M", "Write 2:4 or 4:8")
    return int(match[1]), int(match[2])
