"""A model after several steps of training, one state after the other, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, forward, loss_of, prepared
from ffnkit.errors import FfnkitError
from ffnkit.io.files import spooled
from ffnkit.plans import Progress

WARMUP = 10  # steps in which the rate rises


@contextmanager
def training_states(
    model: nn.Module,
    batches: Sequence[Batch],
    steps: Sequence[int],
    learning_rate: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[list[Callable[[], None]]]:
    """Train, and give calls that put the model into its state after each of ``steps``; at the end it is as before.

    AdamW at a constant rate after 10 steps, weight decay 0.01, norms clipped to 1, the batches one after the other and
    from the front again. States lie in memory-mapped temporary files.

    Raises:
        FfnkitError: nothing trains, no loss, or the loss is no number any more.
    """
    held = _state(model)
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    mode = {module: module.training for module in model.modules()}
    try:
        yield [partial(_put, model, state) for state in _states(model, batches, steps, learning_rate, seed, progress)]
    finally:
        _put(model, held)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, flag in mode.items():
            module.training = flag


def _states(
    model: nn.Module, batches: Sequence[Batch], steps: Sequence[int], rate: float, seed: int, progress: Progress | None
) -> list[dict[str, Tensor]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise FfnkitError("training steps", "nothing in the model trains", "Set requires_grad of its parameters")
    for parameter in trained:
        parameter.grad = None
    optimizer = torch.optim.AdamW(trained, lr=rate)
    found = [_state(model)] if steps[0] == 0 else []
    model.train()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for number, batch in zip(range(1, steps[-1] + 1), cycle(batches), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, number / WARMUP)
            loss = loss_of(forward(model, prepared(model, batch), labels=True), "training steps")
            if not torch.isfinite(loss):
                raise FfnkitError("training steps", f"the loss is {float(loss)} at step {number}", "Lower the rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if number in steps:
                found.append(_state(model))
            if progress is not None:
                progress(number, steps[-1], "training")
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: spooled(tensor) for name, tensor in _tensors(model).items()}


@torch.no_grad()
def _put(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in _tensors(model).items():
        tensor.copy_(state[name])
