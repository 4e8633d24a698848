"""How long a plan takes and how much memory, about, before it is made: from a timed batch and this machine's rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ffnkit.calibration.batches import Batch, run
from ffnkit.calibration.stored import StatisticsFile, tokens_of
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.running import few_rows

SIZE = 512  # of the matrices that tell the machine's rates
SOLVED = 384
WHILE = 0.15  # seconds that each rate is measured for


@dataclass(frozen=True)
class Work:
    """What a method computes for one FFN, beside the pass of the model over the data.

    Attributes:
        single: multiplications and additions of products in float32 or less. double: of factorizations in float64.
        numbers: that are taken through a function one by one. calls: of torch. held: bytes at most.
    """

    single: float = 0.0
    double: float = 0.0
    numbers: float = 0.0
    calls: float = 0.0
    held: float = 0.0


@dataclass(frozen=True)
class Expected:
    """About how long a plan takes.

    Attributes:
        seconds: in all; of them ``passes`` of the model over the data and ``work`` of the method. None: not estimated.
        bytes: of memory beyond what the process has now, at most at one time.
    """

    seconds: float
    passes: float
    work: float | None
    bytes: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@torch.no_grad()
def expected(model: nn.Module, method: Any, data: list[Batch] | StatisticsFile | None) -> Expected:
    """About how long planning takes, and how much memory.

    The pass over the data is timed on a few rows, products and factorizations on small matrices; what a method computes
    it says itself: of each FFN (``method.work(ffn, width, tokens)``), or of all together with the tokens that pass the
    model (``method.expects(model, tokens)``).

    Args:
        data: batches, or statistics of a pass over them; None for methods that need none.
    """
    passes = held = 0.0
    count, stored = 0, isinstance(data, StatisticsFile)
    whole: tuple[list[Work], float] | None = None
    if data is not None:
        batches = data.probe if isinstance(data, StatisticsFile) else data
        rows = few_rows(batches[0])
        run(model, [rows])  # the first pass of a process is slower
        each = seconds(lambda: run(model, [rows]))
        sizes = sum(map(tokens_of, batches))
        count = data.tokens if isinstance(data, StatisticsFile) else sizes
        whole = method.expects(model, count) if hasattr(method, "expects") else None
        through = sizes if whole is None else whole[1]
        passes = each * (3 + through / max(tokens_of(rows), 1))  # the rows are walked through beforehand
        held = tokens_of(rows) * 6.0 * answers(model)
    if whole is not None:
        found, deep = whole[0], max((ffn.d for ffn in ffns(model)), default=0)
    elif hasattr(method, "work"):
        chosen = method.chosen(model)
        found, deep = (
            [method.work(ffn, width, count) for ffn, width in chosen],
            max((f.d for f, _ in chosen), default=0),
        )
    else:
        return Expected(passes, passes, None, held)
    costs = rates(next(model.parameters()).device)
    spent = sum(getattr(each, name) * cost for each in found for name, cost in costs.items())
    outputs = 4.0 * count * deep
    held = max([held, *(each.held for each in found)]) + (outputs if data is not None and not stored else 0.0)
    return Expected(passes + spent, passes, spent, held)


def answers(model: nn.Module) -> int:
    """The numbers that a model answers for each token: one a word of its vocabulary; 0 where it does not write."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return getattr(head, "out_features", 0) if head is not None else 0


def rates(device: torch.device) -> dict[str, float]:
    """What one unit of each part of :class:`Work` costs here, in seconds."""
    a = torch.rand(SIZE, SIZE, device=device)
    b = torch.rand(SOLVED, SOLVED, dtype=torch.float64, device=device)
    gram = (b @ b.T).add_(torch.eye(SOLVED, dtype=torch.float64, device=device))

    def mean(work: Callable[[], Any]) -> float:
        """Over a while, so that what else the machine does is in it."""
        work()
        times = [seconds(work)]
        while sum(times) < WHILE:
            times.append(seconds(work))
        return sum(times) / len(times)

    return {
        "single": mean(lambda: a @ a) / SIZE**3,
        "double": mean(lambda: torch.cholesky_inverse(torch.linalg.cholesky(gram))) / (SOLVED**3 / 2),
        "numbers": mean(lambda: a.sigmoid()) / SIZE**2,
        "calls": mean(lambda: [b[0, 0] + 1 for _ in range(100)]) / 200,
    }


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return max(time.perf_counter() - start, 1e-9)


def fused(
    ffn: FFN, width: int, tokens: int, *, greedy: bool, refine: int, kept: int, ridges: int = 1, batch: int = 1024
) -> Work:
    """The work of data-aware fusion: Gram matrices, selection, refits under so many ridges, regression and refits."""
    ff, d, matrices = ffn.width, ffn.d, 3 if ffn.gated else 2
    experts = max(ffn.experts, 1)
    kept = min(kept, tokens)
    gram = tokens * ffn.active * experts * ff**2 * 0.6  # a triangle of it
    selecting = width * ff * (width / 2 + 2 * d) if greedy else ff**3 / 2
    refits = ridges * (width**3 / 6 + width**2 * d)
    solving = (2 if refine else 1) * refits + width * ff * d
    regression = 3 * refine * batch * d * (matrices * width + d) if refine and kept else 0  # errors by a (d, d) metric
    again = kept * (matrices * d * width + 0.6 * (width + d) ** 2) if refine else 0
    target = kept * matrices * d * (ff + width) if refine else 0
    steps = experts * refine if kept else 0
    numbers = 4 * tokens * ff + steps * (10 * batch * width + 8 * matrices * d * width + 8 * batch * d)
    held = 3 * 8 * ff**2 + (12 * kept * d + 20 * batch * width + 16 * matrices * d * width if refine else 0)
    single, double = gram + experts * regression + target + again, experts * (selecting + solving)
    return Work(single, double, numbers, 200 * steps, held)
