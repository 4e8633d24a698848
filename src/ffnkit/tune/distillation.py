"""Distillation: a compressed model is fitted to the whole one, by its hidden states, its answers, or both.

Source: Wei et al., MLP Fusion (arXiv 2307.08941), the stage before tuning: the loss is the mean over layers of the
mean over tokens of ||h_l(student) - h_l(teacher)||^2, summed over the width; the FFNs of compressed layers train.
Hinton et al. (arXiv 1503.02531) for the answers.
Differs: padding is masked; dropout is off, so that a student equal to its teacher has a loss of zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.io.progress import Step, shown
from ffnkit.ops.products import fast_products
from ffnkit.tune.distil_data import Data
from ffnkit.tune.distil_head import settle_heads
from ffnkit.tune.distil_loss import distillation_loss
from ffnkit.tune.distil_state import State
from ffnkit.tune.distil_trains import chosen_ffns, in_eval, only, trained_parameters
from ffnkit.tune.settings import DistilSettings


@dataclass(frozen=True)
class DistilResult:
    """What a distillation did.

    Attributes:
        names: the FFNs that trained.
        steps: optimizer steps.
        seconds: wall-clock seconds over all calls that it took.
        first_loss, last_loss: mean loss over the first and the last tenth of the steps.
        losses: the loss of every step.
        parts: what it is made of, unweighted, by name ("layers", "logits", "hard"), of every step.
        log: entries with step, loss and its parts (means since the entry before) and learning_rate.
        trainable_parameters: numbers trained.
        head: what the student's drawn head took from the teacher's: names of parameters.
    """

    names: tuple[str, ...]
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    losses: tuple[float, ...]
    parts: dict[str, tuple[float, ...]]
    log: tuple[dict[str, float], ...]
    trainable_parameters: int
    head: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss over the last tenth of the steps."""
        return self.last_loss

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, without the loss of every step."""
        return {key: value for key, value in vars(self).items() if key not in ("losses", "parts")}


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    settings: DistilSettings | None = None,
    *,
    seed: int = 0,
    collate: Callable[[list[Any]], Mapping[str, Tensor]] | None = None,
    out_dir: str | Path | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> DistilResult:
    """Fit ``student``, in place, to ``teacher``: its hidden states, its answers, or both.

    Labels are not needed (but for ``hard_weight``), so any inputs of the models will do. No reference to the teacher
    is kept. With ``out_dir`` a state is saved as it goes, and the same call after a kill goes on from it to the
    weights of an uninterrupted run.

    Args:
        student: the compressed model; every flag and its mode are restored. Where answers count and its head is
            freshly drawn, it takes the teacher's.
        teacher: the uncompressed model, taken before compression or tuned since; unchanged. Where answers count, its
            head must be trained.
        data: with ``collate`` a dataset of encoded examples, batched here in an order drawn from ``seed``; without it
            an iterable of ready batches (a DataLoader, a list; what a generator gives is held). Plain texts: see
            :func:`ffnkit.tune.text_examples`.
        names: names of the FFNs to train; None: those whose width or weights differ from the teacher's.

    Raises:
        FfnkitError: nothing compressed, unknown names, models of unlike depth or answers, a head that is not trained,
            an unknown number of steps, or a state of another run in ``out_dir``.
    """
    settings = settings or DistilSettings()
    chosen = chosen_ffns(student, teacher, names, settings.trains)
    head = settle_heads(student, teacher) if settings.objective != "layers" else ()
    parameters = trained_parameters(student, chosen, settings.trains)
    source = Data(data, collate, settings.batch_size, seed)
    total = source.steps(settings.epochs) if settings.steps is None else settings.steps
    state = State.load(out_dir, parameters, _run(settings, seed, total, parameters))
    with (
        only(student, parameters),
        in_eval(student),
        in_eval(teacher),
        fast_products(student),
        shown("distilling", quiet=not progress) as step,
    ):
        _fit(student, teacher, source, settings, state, parameters, total, step)
    return _result(tuple(f.name for f in chosen), head, state, parameters, settings, total)


def _fit(
    student: nn.Module,
    teacher: nn.Module,
    source: Data,
    settings: DistilSettings,
    state: State,
    parameters: Mapping[str, nn.Parameter],
    total: int,
    step: Step,
) -> None:
    """Adam steps from ``state`` to ``total``; the learning rate is a function of the step alone."""
    optimizer = torch.optim.Adam(
        [parameters[name] for name in parameters], lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
    )
    state.restore(optimizer, parameters)
    device = next(student.parameters()).device
    batches = source.batches(start=len(state.losses), total=total)
    since = time.perf_counter()
    for batch in batches:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, len(state.losses), total)
        optimizer.zero_grad(set_to_none=True)
        with _autocast(device, settings.precision):
            loss, parts = distillation_loss(student, teacher, batch, settings)
        loss.backward()
        if settings.max_grad_norm:
            nn.utils.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)
        optimizer.step()
        state.add(loss.item(), {name: part.item() for name, part in parts.items()})
        step(len(state.losses), total, f"loss {state.losses[-1]:.4g}")
        if len(state.losses) % settings.save_every == 0 or len(state.losses) == total:
            now = time.perf_counter()
            state.seconds, since = state.seconds + now - since, now
            state.save(optimizer, parameters)
    optimizer.zero_grad(set_to_none=True)


def learning_rate(settings: DistilSettings, step: int, total: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``: warmup, then constant or linear to zero."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * total
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (total - step) / max(total - warmup, 1)


def _run(settings: DistilSettings, seed: int, total: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    harmless = {"save_every", "logging_every", "max_length"}
    return {
        "settings": settings.model_dump(mode="json", exclude=harmless),
        "seed": seed,
        "steps": total,
        "shapes": {name: list(p.shape) for name, p in parameters.items()},
    }


def _result(
    names: tuple[str, ...],
    head: tuple[str, ...],
    state: State,
    parameters: Mapping[str, nn.Parameter],
    settings: DistilSettings,
    total: int,
) -> DistilResult:
    losses, every = state.losses, settings.logging_every
    tenth = max(1, len(losses) // 10)
    log = []
    for start in range(0, len(losses), every):
        step = min(start + every, len(losses))
        means = {name: sum(values[start:step]) / (step - start) for name, values in state.parts.items()}
        rate = learning_rate(settings, step - 1, total)
        log.append({"step": step, "loss": sum(losses[start:step]) / (step - start), **means, "learning_rate": rate})
    return DistilResult(
        names=names,
        steps=len(losses),
        seconds=state.seconds,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        losses=tuple(losses),
        parts={name: tuple(values) for name, values in state.parts.items()},
        log=tuple(log),
        trainable_parameters=sum(p.numel() for p in parameters.values()),
        head=head,
    )


def _autocast(device: torch.device, precision: str) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
