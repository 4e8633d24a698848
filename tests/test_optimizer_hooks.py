"""Hooks around every optimizer's step are there while a layer needs them, and no longer."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torchs

from ffnkit.nn import optimizer_hooks
from ffnkit.nn.coefficients import Coefficients
from ffnkit.nn.optimizer_hooks import is_registered, watch
from ffnkit.nn.sparsegrad import SparseGradLinear


def hooks() -> int:
    return len(torchs._global_optimizer_pre_hooks) + len(torchs._global_optimizer_post_hooks)


def chosen(selection: Any) -> nn.Module:
    index = torch.arange(4, dtype=torch.int32) if selection != "step" else None
    return SparseGradLinear(nn.Linear(4, 6), index=index, selection=selection, count=4, every=1)


def weighed() -> nn.Module:
    layer = Coefficients(nn.Linear(4, 6))
    layer.use_coefficients(torch.ones(4), 0.5)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "step": lambda: chosen("step"), "refresh": lambda: chosen("refresh"), "coefficients": weighed,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of other tests do not count."""
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        monkeypatch.setattr(torchs, name, OrderedDict())
    for name, empty in (("_watched", {}), ("_handles", []), ("_before", set())):
        monkeypatch.setattr(optimizer_hooks, name, empty)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_hooks_go_with_the_last_layer(kind: str) -> None:
    before = hooks()
    first = LAYERS[kind]()
    assert is_registered() and hooks() == before + 2
    second, twin = LAYERS[kind](), copy.deepcopy(first)
    assert hooks() == before + 2
    del first, second
    gc.collect()
    assert is_registered()  # the copy is seen to as well
    del twin
    gc.collect()
    assert not is_registered() and hooks() == before


@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_layer_that_comes_after_the_hooks_went_is_seen_to(kind: str) -> None:
    for _ in range(2):
        layer = LAYERS[kind]()
        start = [p.detach().clone() for p in layer.parameters()]
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        layer(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        if kind == "step":  # of 24 entries 4 have moved
            assert int((layer.values != 0).sum()) == 4
        elif kind == "refresh":
            assert int(layer.steps) == 1  # type: ignore[call-overload]
        else:
            plain = start[-1] - 0.1 * layer.coefficients.grad
            assert torch.allclose(layer.coefficients, plain - 0.05 * plain.sign())
        del layer, optimizer, start
        gc.collect()
        assert not is_registered()


def test_a_layer_that_goes_in_a_step_takes_no_hook_from_under_it() -> None:
    held: list[Any] = [nn.Linear(2, 2)]
    told: list[int] = []

    def last(optimizer: Any, living: list[Any]) -> None:
        told.append(len(living))
        held.clear()
        living.clear()
        gc.collect()

    watch(held[0], before=last)
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()
    assert told == [1]
    weighed()  # the next layer that goes takes them along
    gc.collect()
    assert not is_registered()


def test_a_fixed_choice_needs_none() -> None:
    layer = chosen("fixed")
    assert not is_registered(), layer


@pytest.mark.slow
def test_importing_registers_nothing() -> None:
    code = (
        "import ffnkit.nn.sparsegrad, ffnkit.nn.dsee, ffnkit.nn.coefficients, ffnkit.tune.kinds\n"
        "from torch.optim import optimizer as o\n"
        "assert not o._global_optimizer_pre_hooks and not o._global_optimizer_post_hooks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
