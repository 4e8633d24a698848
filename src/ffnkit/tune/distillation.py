"""Layer-wise distillation: compressed FFNs are fitted so that hidden states come back to those of the whole model.

Source: Wei et al., MLP Fusion (arXiv 2307.08941), the stage before tuning: the loss is the mean over layers of the
mean over tokens of ||h_l(student) - h_l(teacher)||^2, summed over the width; the FFNs of compressed layers train.
Differs: padding is masked; dropout is off, so that a student equal to its teacher has a loss of zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.blocks import FFN, ffns
from ffnkit.errors import FfnkitError

from .distil_data import Data
from .distil_loss import layerwise_loss
from .distil_state import State
from .settings import DistilSettings


@dataclass(frozen=True)
class DistilResult:
    """What a distillation did.

    Attributes:
        names: the FFNs that trained.
        steps: optimizer steps.
        seconds: wall-clock seconds over all calls that it took.
        first_loss, last_loss: mean loss over the first and the last tenth of the steps.
        losses: the loss of every step.
        log: entries with step, loss (mean since the entry before) and learning_rate.
        trainable_parameters: numbers trained.
    """

    names: tuple[str, ...]
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    losses: tuple[float, ...]
    log: tuple[dict[str, float], ...]
    trainable_parameters: int

    @property
    def loss(self) -> float:
        """The mean loss over the last tenth of the steps."""
        return self.last_loss

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, without the loss of every step."""
        return {key: value for key, value in vars(self).items() if key != "losses"}


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
    """Fit the compressed FFNs of ``student``, in place, to the hidden states of ``teacher``.

    Only inputs of the models are used, so any task will do, and labels are not needed. No reference to the teacher is
    kept. With ``out_dir`` a state is saved as it goes, and the same call after a kill goes on from it to the weights
    of an uninterrupted run.

    Args:
        student: the compressed model; every flag and its mode are restored.
        teacher: the uncompressed model, taken before compression; unchanged.
        data: with ``collate`` a dataset of encoded examples, batched here in an order drawn from ``seed``; without it
            an iterable of ready batches that can be gone through again (a DataLoader, a list).
        names: names of the FFNs to train; None: those whose width or weights differ from the teacher's.

    Raises:
        FfnkitError: nothing compressed, unknown names, models of unlike depth, an unknown number of steps, or a state
            of another run in ``out_dir``.
    """
    settings = settings or DistilSettings()
    chosen = _chosen(student, teacher, names)
    parameters = _parameters(chosen)
    source = Data(data, collate, settings.batch_size, seed)
    total = source.steps(settings.epochs) if settings.steps is None else settings.steps
    state = State.load(out_dir, parameters, _run(settings, seed, total, parameters))
    with _only(student, parameters), _eval(student), _eval(teacher):
        _fit(student, teacher, source, settings, state, parameters, total, progress)
    return _result(tuple(f.name for f in chosen), state, parameters, settings, total)


def _fit(
    student: nn.Module,
    teacher: nn.Module,
    source: Data,
    settings: DistilSettings,
    state: State,
    parameters: Mapping[str, nn.Parameter],
    total: int,
    progress: bool,
) -> None:
    """Adam steps from ``state`` to ``total``; the learning rate is a function of the step alone."""
    from tqdm.auto import tqdm

    optimizer = torch.optim.Adam(
        [parameters[name] for name in parameters], lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
    )
    state.restore(optimizer, parameters)
    device = next(student.parameters()).device
    batches = source.batches(start=len(state.losses), total=total)
    bar = tqdm(batches, initial=len(state.losses), total=total, desc="distil", disable=not progress, leave=False)
    since = time.perf_counter()
    for batch in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, len(state.losses), total)
        optimizer.zero_grad(set_to_none=True)
        with _autocast(device, settings.precision):
            loss = layerwise_loss(student, teacher, batch)
        loss.backward()
        if settings.max_grad_norm:
            nn.utils.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)
        optimizer.step()
        state.losses.append(loss.item())
        if len(state.losses) % settings.logging_every == 0:
            bar.set_postfix(loss=f"{state.losses[-1]:.4g}")
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


def _chosen(student: nn.Module, teacher: nn.Module, names: Sequence[str] | None) -> list[FFN]:
    """The FFNs to train."""
    found = ffns(student)
    if names is not None:
        unknown = sorted(set(names) - {f.name for f in found})
        if unknown:
            known = ", ".join(f.name for f in found)
            raise FfnkitError(f"distilling FFN {unknown[0]!r}", "the model has no such FFN", f"Choose among {known}")
        return [f for f in found if f.name in set(names)]
    before = {f.name: f for f in ffns(teacher)}
    chosen = [f for f in found if f.name not in before or _compressed(f, before[f.name])]
    if not chosen:
        do = "Compress before distilling, and take the teacher before that, or pass names"
        raise FfnkitError("layer-wise distillation", "no FFN of the student differs from the teacher's", do)
    return chosen


def _compressed(student: FFN, teacher: FFN) -> bool:
    if student.width != teacher.width or _special(student):
        return True
    ours, theirs = student.parameters(), teacher.parameters()
    if len(ours) != len(theirs):
        return True
    return any(a.shape != b.shape or not torch.equal(a, b.to(a)) for a, b in zip(ours, theirs, strict=True))


def _special(ffn: FFN) -> bool:
    if ffn.scale is not None:
        return True
    return not ffn.experts and any(callable(getattr(ffn.linear(site), "fold", None)) for site in ffn.sites)


def _parameters(chosen: list[FFN]) -> dict[str, nn.Parameter]:
    """The parameters of FFNs, each once, named for the saved state."""
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for ffn in chosen:
        for place, parameter in enumerate(ffn.parameters()):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                named[f"{ffn.name}.{place}"] = parameter
    return named


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
    state: State,
    parameters: Mapping[str, nn.Parameter],
    settings: DistilSettings,
    total: int,
) -> DistilResult:
    losses, every = state.losses, settings.logging_every
    tenth = max(1, len(losses) // 10)
    log = []
    for start in range(0, len(losses), every):
        part = losses[start : start + every]
        step = start + len(part)
        rate = learning_rate(settings, step - 1, total)
        log.append({"step": step, "loss": sum(part) / len(part), "learning_rate": rate})
    return DistilResult(
        names=names,
        steps=len(losses),
        seconds=state.seconds,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        losses=tuple(losses),
        log=tuple(log),
        trainable_parameters=sum(p.numel() for p in parameters.values()),
    )


@contextmanager
def _only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only these parameters train inside the block; all flags are as before after it."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _autocast(device: torch.device, precision: str) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
