"""What trains in a distillation: the compressed FFNs, or every parameter; flags and modes while it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns


def chosen_ffns(student: nn.Module, teacher: nn.Module, names: Sequence[str] | None, trains: str) -> list[FFN]:
    """The FFNs to train: those of ``names``, else those whose width or weights differ from the teacher's.

    Raises:
        FfnkitError: unknown names, names where everything trains, or no FFN that differs where FFNs alone train.
    """
    found = ffns(student)
    if names is not None:
        if trains == "all":
            do = "Leave out the names, or set trains to ffn"
            raise FfnkitError("distilling FFNs by their names", "the setting trains says all", do)
        unknown = sorted(set(names) - {f.name for f in found})
        if unknown:
            known = ", ".join(f.name for f in found)
            raise FfnkitError(f"distilling FFN {unknown[0]!r}", "the model has no such FFN", f"Choose among {known}")
        return [f for f in found if f.name in set(names)]
    if trains == "all":
        return found
    before = {f.name: f for f in ffns(teacher)}
    chosen = [f for f in found if f.name not in before or _compressed(f, before[f.name])]
    if not chosen:
        do = "Compress before distilling, and take the teacher before that, or pass names"
        raise FfnkitError("distillation of compressed FFNs", "no FFN of the student differs from the teacher's", do)
    return chosen


def _compressed(student: FFN, teacher: FFN) -> bool:
    if student.width != teacher.width or student.special:
        return True
    ours, theirs = student.parameters(), teacher.parameters()
    if len(ours) != len(theirs):
        return True
    return any(a.shape != b.shape or not torch.equal(a, b.to(a)) for a, b in zip(ours, theirs, strict=True))


def trained_parameters(student: nn.Module, chosen: list[FFN], trains: str) -> dict[str, nn.Parameter]:
    """The parameters that train, each once, named for the saved state.

    With "all" every parameter whose gradient is not turned off (as transformers does to fixed positions).

    Raises:
        FfnkitError: there are none.
    """
    if trains == "all":
        named = {name: p for name, p in student.named_parameters() if p.requires_grad and p.is_floating_point()}
    else:
        named = _once(chosen)
    if not named:
        raise FfnkitError("distillation", "no parameter of the student trains", "Turn on requires_grad of some")
    return named


def _once(chosen: list[FFN]) -> dict[str, nn.Parameter]:
    """The parameters of FFNs, each once."""
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for ffn in chosen:
        for place, parameter in enumerate(ffn.parameters()):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                named[f"{ffn.name}.{place}"] = parameter
    return named


@contextmanager
def only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
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
def in_eval(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; every module's mode as before after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
