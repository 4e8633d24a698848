"""What is chosen by gradients at an optimizer's step is chosen by those that the optimizer sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close, assert_differs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffnkit.nn.coefficients import Coefficients
from ffnkit.nn.selecting import DECAY
from ffnkit.nn.sparsegrad import SparseGradLinear

OUT, IN = 10, 7


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Run:
    """A layer of selection "refresh", an optimizer at a rate of zero, and the whole gradients written down by hand."""

    def __init__(self, optimizer: Callable[..., Any] | None = None, scale: float | None = None) -> None:
        linear = nn.Linear(IN, OUT, bias=False)
        index = torch.tensor([3, 20, 21, 44, 60])
        self.layer = SparseGradLinear(linear, index=index, selection="refresh")
        self.optimizer = (optimizer or torch.optim.SGD)([self.layer.values], lr=0.0)
        self.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        self.held = torch.zeros(OUT, IN)  # what the whole of the optimizer's gradient is
        self.expected = torch.zeros(OUT, IN)

    def backward(self, seed: int, share: float = 1.0, through: Any = None) -> None:
        x, t = draw(6, IN, seed=seed), draw(6, OUT, seed=seed + 1) * share
        y = self.layer(x) if through is None else through(self.layer, x)
        loss = (y * t).sum()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.held = self.held + t.T @ x

    def zero(self, to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)
        self.held = torch.zeros(OUT, IN)

    def step(self, factor: float = 1.0) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.expected = DECAY * self.expected + (1 - DECAY) * (self.held * factor).square()

    def clip(self, norm: float) -> float:
        """By the norm of all gradients, of which the chosen entries are all; by how much."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return min(1.0, norm / float(nn.utils.clip_grad_norm_([self.layer.values], norm)))


def plain(run: Run) -> None:
    for seed in (0, 10):
        run.backward(seed)
        run.step()
        run.zero()


def skipped(run: Run, to_none: bool = True) -> None:
    run.backward(0, 1000)
    run.zero(to_none)
    run.backward(10)
    run.step()
    run.zero(to_none)
    run.backward(20, 1000)
    run.zero(to_none)
    run.backward(30)
    run.step()


def accumulated(run: Run, to_none: bool = True) -> None:
    for start in (0, 100):
        for seed in (10, 20, 30):
            run.backward(start + seed, 1 / 3)
        run.step()
        run.zero(to_none)


def clipped(run: Run) -> None:
    for seed in (0, 10):
        run.backward(seed)
        factor = run.clip(0.5)
        assert factor < 0.5
        run.step(factor)
        run.zero()


def kept(run: Run) -> None:
    """Nobody zeroes: gradients add up over the steps."""
    for seed in (0, 10, 20):
        run.backward(seed)
        run.step()


def left_out(run: Run) -> None:
    """A loss scale that overflows: the scaler leaves the step out."""
    assert run.scaler is not None
    before = run.scaler.get_scale()
    run.backward(0, float("inf"))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    assert run.scaler.get_scale() < before
    run.zero()
    run.backward(10)
    run.step()


def twice(run: Run) -> None:
    """One layer in two places, as shared FFNs have it."""
    x, t = draw(6, IN, seed=1), draw(6, OUT, seed=2)
    for _ in range(2):
        ((run.layer(x) * t).sum() + (run.layer(2 * x) * t).sum()).backward()
        run.held = 3 * t.T @ x
        run.step()
        run.zero()


def recomputed(run: Run) -> None:
    for reentrant in (True, False):
        run.backward(0, through=lambda layer, x, r=reentrant: checkpoint(layer, x.requires_grad_(), use_reentrant=r))
        run.step()
        run.zero()


def by_closure(run: Run) -> None:
    """As Lightning has it: the step calls for the gradients."""

    def closure() -> float:
        run.zero()
        run.backward(10)
        return 0.0

    for _ in range(2):
        run.optimizer.step(closure)
        run.expected = DECAY * run.expected + (1 - DECAY) * run.held.square()


def unreached(run: Run) -> None:
    plain(run)
    run.zero()
    run.optimizer.step()  # no gradient: nothing is seen, and nothing fades


def fused(parameters: Any, lr: float) -> Any:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


LOOPS: dict[str, Callable[[Run], None]] = {
    "plain": plain,
    "skipped": skipped,
    "skipped, zeros": lambda run: skipped(run, False),
    "accumulated": accumulated,
    "accumulated, zeros": lambda run: accumulated(run, False),
    "clipped": clipped,
    "kept": kept,
    "twice": twice,
    "recomputed": recomputed,
    "closure": by_closure,
    "unreached": unreached,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_squares_are_of_the_optimizers_gradients(loop: str) -> None:
    run = Run()
    LOOPS[loop](run)
    assert run.layer.energy is not None
    assert_close(run.layer.energy, run.expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, fused], ids=["scaler unscales", "optimizer unscales"])
@pytest.mark.parametrize("loop", ["plain", "skipped", "accumulated", "clipped", "left out"])
def test_a_loss_scale_is_not_counted(loop: str, optimizer: Any) -> None:
    run = Run(optimizer, scale=2.0**16)
    ({"left out": left_out} | LOOPS)[loop](run)
    assert run.layer.energy is not None
    assert_close(run.layer.energy, run.expected, rel=1e-5)
    assert run.layer.steps is not None and int(run.layer.steps) == (1 if loop == "left out" else 2)


def test_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without looking at what the optimizer holds, a skipped step counts."""
    monkeypatch.setattr(SparseGradLinear, "_kept", lambda self, pending: pending)
    run = Run()
    skipped(run)
    assert run.layer.energy is not None
    assert_differs(run.layer.energy, run.expected, rel=0.5)


def test_a_layer_whose_chosen_entries_are_all_zero_goes_by_the_others() -> None:
    first, second = Run(), Run()
    optimizer = torch.optim.SGD([first.layer.values, second.layer.values], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, t = draw(6, IN, seed=1), draw(6, OUT, seed=2)
    rows = second.layer.index.long() // IN  # type: ignore[union-attr]
    silent = t.clone()
    silent[:, rows] = 0
    scaler.scale((first.layer(x) * t).sum() + (second.layer(x) * silent).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    for run, wanted in ((first, t.T @ x), (second, silent.T @ x)):
        assert run.layer.energy is not None
        assert_close(run.layer.energy, (1 - DECAY) * wanted.square(), rel=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, fused], ids=["scaler unscales", "optimizer unscales"])
def test_coefficients_do_not_shrink_in_a_step_that_is_left_out(optimizer: Any) -> None:
    layer = Coefficients(nn.Linear(IN, OUT))
    layer.use_coefficients(torch.ones(IN), l1=1.0)
    used = optimizer([layer.coefficients], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for share, moves in ((float("inf"), False), (1.0, True)):
        used.zero_grad()
        scaler.scale(layer(draw(6, IN, seed=1)).sum() * share).backward()
        scaler.step(used)
        scaler.update()
        assert layer.coefficients is not None and bool((layer.coefficients != 1).any()) is moves


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    run = Run()
    x = draw(6, IN, seed=1).requires_grad_()
    (slope,) = torch.autograd.grad(run.layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


@pytest.mark.parametrize("selection", ["step", "refresh"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_takes_the_entries_of_its_own_gradient(selection: Any, closure: bool) -> None:
    """Of two steps with other gradients, each moves those that are largest in its own."""
    layer = SparseGradLinear(nn.Linear(IN, OUT, bias=False), selection="step", count=4)
    if selection == "refresh":
        index = torch.arange(4)
        layer = SparseGradLinear(nn.Linear(IN, OUT, bias=False), index=index, selection="refresh", every=1)
    optimizer = torch.optim.SGD([layer.values], lr=0.1)
    for seed in (1, 2):
        before = layer.update()
        x, t = draw(6, IN, seed=seed), draw(6, OUT, seed=seed + 10)

        def gradients(x: Tensor = x, t: Tensor = t) -> float:
            optimizer.zero_grad()
            (layer(x) * t).sum().backward()
            return 0.0

        if closure:
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()
        largest = set((t.T @ x).abs().flatten().topk(4).indices.tolist())
        moved = set((layer.update() - before).flatten().nonzero()[:, 0].tolist())
        if selection == "step":
            assert moved == largest
        elif seed == 1:
            assert layer.index is not None and set(layer.index.tolist()) == largest
