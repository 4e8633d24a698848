"""Seconds of a batch, of one model or of several in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``n`` measurements."""

    median: float
    lower: float
    upper: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        import numpy as np

        lower, median, upper = (float(q) for q in np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75)))
        return cls(median, lower, upper, len(values))


@dataclass(frozen=True)
class Latencies:
    """Seconds of a batch by name, and the ratios to the first name, each taken within one round."""

    seconds: dict[str, Spread]
    ratios: dict[str, Spread]


def latency(
    model: nn.Module | Callable[..., Any],
    batch: Mapping[str, Any] | None = None,
    *,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> Spread:
    """Seconds of ``model(**batch)``: median and quartiles of ``repeats`` calls after ``warmup`` unmeasured ones.

    In eval mode under ``torch.inference_mode``; an accelerator is waited for before each reading of the clock.
    ``batch`` must lie on the model's device; ``None`` calls without arguments. ``threads`` holds for this call only.
    """
    return latencies({"model": model}, batch, repeats=repeats, warmup=warmup, threads=threads).seconds["model"]


def latencies(
    models: Mapping[str, nn.Module | Callable[..., Any]],
    batch: Mapping[str, Any] | None = None,
    *,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> Latencies:
    """Seconds of a batch for several models, measured in turn so that a drift of the machine hits all alike.

    Each of ``repeats`` rounds calls every model once, starting one further on each round. A ratio is taken within a
    round, against the first model of the mapping; its median and quartiles are over the rounds.

    Raises:
        FfnkitError: no model, or fewer than one repeat.
    """
    import torch

    if not models or repeats < 1 or warmup < 0:
        raise FfnkitError(
            f"latency of {len(models)} models, {repeats} repeats, {warmup} warm-up calls",
            "at least one model and one repeat are needed",
            "Give repeats >= 1 and warmup >= 0",
        )
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sync = _synchronizer([*models.values()], batch)
    with _evaluating(models.values()), _threads(threads), torch.inference_mode():
        for turn in counted(range(warmup + repeats), "measuring latency"):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                elapsed = _timed(models[name], batch or {}, sync)
                if turn >= warmup:
                    seconds[name].append(elapsed)
    first = seconds[names[0]]
    ratios = {name: [a / b for a, b in zip(values, first, strict=True)] for name, values in seconds.items()}
    return Latencies(
        {name: Spread.of(values) for name, values in seconds.items()},
        {name: Spread.of(values) for name, values in ratios.items()},
    )


def _timed(call: Callable[..., Any], batch: Mapping[str, Any], sync: Callable[[], None]) -> float:
    sync()
    start = time.perf_counter()
    call(**batch)
    sync()
    return time.perf_counter() - start


def _synchronizer(models: Sequence[Any], batch: Mapping[str, Any] | None) -> Callable[[], None]:
    """A function that waits for the accelerators on which the models or the batch lie."""
    import torch

    tensors = [value for value in (batch or {}).values() if isinstance(value, torch.Tensor)]
    tensors += [tensor for model in models if isinstance(model, torch.nn.Module) for tensor in model.parameters()]
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}

    def wait() -> None:
        for device in devices:
            torch.accelerator.synchronize(device)

    return wait


@contextmanager
def _evaluating(models: Any) -> Iterator[None]:
    """Eval mode for those that are modules; afterwards every module is back in the mode that it was in."""
    import torch

    from ffnkit.calibration.batches import eval_mode

    with ExitStack() as stack:
        for model in models:
            if isinstance(model, torch.nn.Module):
                stack.enter_context(eval_mode(model))
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
