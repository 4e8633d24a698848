"""Memory of tensors in a training step, as torch's profiler sees them: libraries and file pages are not in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ffnkit.nn.adapter_layer import local_part

STEPS = 3  # of each call that are measured: from the second one on the optimizer has its state


class Allocations(TrainerCallback, ExportableState):
    """The largest memory of tensors in the first steps on a CPU; it travels in the checkpoints.

    Attributes:
        peak: bytes: weights, buffers and the optimizer's state where a step begins, and the most that torch's
            allocator gave out on top until it ended. 0: not measured, as on a GPU, whose own allocator counts.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._left = STEPS
        self._running: tuple[profile, int] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        if not self._left or torch.autograd._profiler_enabled() or next(model.parameters()).device.type != "cpu":
            return
        self._left -= 1
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print that it starts and stops
        there = size(_held(model, given.get("optimizer")))
        running = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        running.start()
        self._running = running, there

    def on_step_end(self, *args: Any, **given: Any) -> None:
        if self._running is not None:
            running, there = self._running
            self.close()
            self.peak = max(self.peak, there + most(running))

    def close(self) -> None:
        """Measure no more of the step that runs."""
        if self._running is not None:
            running, self._running = self._running[0], None
            running.stop()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"peak": self.peak}}


def most(measured: profile) -> int:
    """The most bytes of tensors that were there at once, of those that came while a profile ran."""
    assert measured.profiler is not None and measured.profiler.kineto_results is not None
    events: list[Any] = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        largest = max(largest, now)
    return largest


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; memory that several share counts once."""
    storages = (local_part(tensor).untyped_storage() for tensor in tensors if tensor.layout == torch.strided)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _held(model: torch.nn.Module, optimizer: Any) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter.data
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in getattr(optimizer, "state", {}).values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
