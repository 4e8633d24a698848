"""Fits are mixed, and shortened, by tokens that none of them saw."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import case_of
from torch import Tensor

import ffnkit as fk
from ffnkit.calibration.hooks import Activations
from ffnkit.methods.narrow import judging
from ffnkit.methods.narrow.observed import Part
from ffnkit.ops import apart, local
from ffnkit.ops.apart import FEWEST, RUN
from ffnkit.ops.mixing import mixed
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.refit import RIDGES, Refit


def error(shares: Any, candidates: list[Tensor], rows: Tensor, gap: Tensor, metric: Tensor, weights: Tensor) -> float:
    """sum_t w_t e_t^T M e_t of what is left, token by token."""
    total = 0.0
    for row, missing, weight in zip(rows, gap, weights, strict=True):
        left = missing - sum(share * (each @ row) for share, each in zip(shares, candidates, strict=True))
        total += float(weight * (left @ metric @ left))
    return total


@pytest.mark.parametrize("scale", [0.3, 3.0])  # the least of all shares inside, and on the border
def test_shares_are_the_best_of_a_grid(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, candidates = torch.randn(20, 5, generator=draw).double(), [*torch.randn(2, 3, 5, generator=draw).double()]
    gap = scale * (rows @ (0.6 * candidates[0] + 0.9 * candidates[1]).T) + torch.randn(20, 3, generator=draw)
    root = torch.randn(3, 3, generator=draw).double()
    metric, weights = root @ root.T, torch.rand(20, generator=draw).double()
    shares = mixed(candidates, rows, gap, metric, weights)
    assert bool((shares >= 0).all()) and float(shares.sum()) <= 1 + 1e-6
    assert (float(shares.sum()) > 0.999) == (scale > 1)
    grid = [(a / 50, b / 50) for a, b in product(range(51), repeat=2) if a + b <= 50]
    least = min(error(pair, candidates, rows, gap, metric, weights) for pair in grid)
    assert error(shares.tolist(), candidates, rows, gap, metric, weights) <= least * (1 + 1e-6)


def test_a_diagonal_metric_is_weights_of_the_dimensions() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, candidates = torch.randn(20, 5, generator=draw), [*torch.randn(3, 4, 5, generator=draw)]
    gap = 0.4 * torch.randn(20, 4, generator=draw) + 0.3 * rows @ candidates[1].T
    weights = torch.tensor([4.0, 1.0, 0.1, 0.01])
    full = mixed(candidates, rows, gap, torch.diag(weights))
    torch.testing.assert_close(full, mixed(candidates, rows, gap, weights))
    assert not torch.allclose(full, mixed(candidates, rows, gap), atol=1e-3)


def test_noise_and_copies_get_nothing_beyond_what_they_carry() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, true = torch.randn(400, 5, generator=draw), torch.randn(3, 5, generator=draw)
    noise = torch.randn(3, 5, generator=draw)
    noise -= true * (noise * true).sum() / true.square().sum()
    shares = mixed([true, true, noise, torch.zeros(3, 5)], rows, 0.5 * rows @ true.T)
    assert float(shares[:2].sum()) == pytest.approx(0.5, abs=1e-3)
    assert float(shares[2]) < 0.05
    assert mixed([torch.zeros(3, 5)], rows, rows @ true.T).tolist() == [0.0]


def noisy(tokens: int) -> tuple[Neurons, local.Sample]:
    """Neurons that give what is wanted as they are, but for noise."""
    draw = torch.Generator().manual_seed(0)
    neurons = Neurons(torch.randn(40, 20, generator=draw), torch.randn(20, 40, generator=draw))
    x = torch.randn(tokens, 20, generator=draw)
    wanted = local.forward(neurons, x, torch.relu)
    return neurons, local.Sample(x, wanted + 5 * torch.randn(wanted.shape, generator=draw))


def steps_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    taken: list[int] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: taken.append(1) or step(self, *a, **k))
    return taken


def squared(neurons: Neurons, held: local.Sample) -> float:
    return float((local.forward(neurons, held.inputs, torch.relu) - held.wanted).square().mean())


def test_what_does_not_carry_over_is_not_taken_and_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    neurons, sample = noisy(300)
    fit, held = sample.take(torch.arange(200)), sample.take(torch.arange(200, 300))
    taken = steps_of(monkeypatch)
    draw = torch.Generator().manual_seed(0)
    fitted = local.regress(neurons, fit, torch.relu, steps=40, generator=draw, held=held)
    assert len(taken) == 10
    assert squared(fitted, held) <= squared(neurons, held)


def test_what_carries_over_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    neurons, sample = noisy(3000)
    fit, held = sample.take(torch.arange(2700)), sample.take(torch.arange(2700, 3000))
    taken = steps_of(monkeypatch)
    far = dataclasses.replace(neurons, up=neurons.up + torch.randn(40, 20, generator=torch.Generator().manual_seed(1)))
    draw = torch.Generator().manual_seed(0)
    fitted = local.regress(far, fit, torch.relu, steps=40, generator=draw, held=held)
    assert len(taken) == 40
    assert squared(fitted, held) < squared(far, held)


def part_of(tokens: int, *, bias: bool) -> tuple[Neurons, Part, Tensor]:
    draw = torch.Generator().manual_seed(0)
    old = Neurons(torch.randn(12, 6, generator=draw), torch.randn(6, 12, generator=draw))
    if bias:
        old = dataclasses.replace(old, down_bias=torch.randn(6, generator=draw))
    x = torch.randn(tokens, 6, generator=draw)
    missing = 0.3 * torch.randn(tokens, 6, generator=draw) + 0.2
    part = Part(tokens)
    given = local.hidden(old, x, torch.relu)
    part.update(Activations(x, given, local.forward(old, x, torch.relu), None, None, missing))
    return old, part, x


@pytest.mark.parametrize("bias", [False, True])
def test_fits_decisions_and_errors_are_of_different_tokens(bias: bool) -> None:
    old, part, x = part_of(4000, bias=bias)
    judged = judging.Judged(old, part, [torch.relu], torch.float32)
    assert judged.decides is not None and judged.tells is not None
    sets = [torch.cat(part.held.inputs), judged.decides.inputs, judged.tells.inputs]
    rows = [{tuple(row) for row in each.tolist()} for each in sets]
    assert sum(map(len, rows)) == len(set().union(*rows)) == len(x)
    assert 0 <= len(rows[2]) - len(rows[1]) <= RUN
    halves = [[tuple(row) in each for row in x[:2000].tolist()].count(True) for each in rows[1:]]
    assert all(0.4 < half / len(each) < 0.6 for half, each in zip(halves, rows[1:], strict=True))  # of all of the text


@pytest.mark.parametrize("bias", [False, True])
def test_a_mixture_is_no_worse_where_it_is_decided_than_any_fit(bias: bool) -> None:
    """Nor than the neurons as they were; with an output bias the means are taken up by it."""
    old, part, _ = part_of(1500, bias=bias)
    judged = judging.Judged(old, part, [torch.relu], torch.float32)
    kept = torch.arange(0, 12, 2)
    moments = part.moments
    mean = moments.mean()
    gram = moments.centred() if bias else moments.second()
    centre = None
    if old.down_bias is not None:
        centre = mean[kept], old.down_bias.double() + old.down.double() @ mean + part.beyond.mean()
    problem = Refit.of(gram, old.down, kept, part.missing(centred=bias), centre)
    held = judged.decides
    assert held is not None
    mixture, down = judged.refitted(old.take(kept), problem)
    torch.testing.assert_close(mixture.down, down.float())
    least = squared(mixture, held)
    for ridge in RIDGES:
        single, _ = judged.refitted(old.take(kept), problem, [ridge])
        assert least <= squared(single, held) * (1 + 1e-5)
    assert least < squared(judging.with_output(old.take(kept), problem, problem.start), held)


@pytest.mark.parametrize("bias", [False, True])
def test_after_a_regression_the_output_layer_suits_what_neurons_give_now(bias: bool) -> None:
    """The least squares of a loop, where the deciding tokens are of the very kind and the learnt layer is far off."""
    old, part, _ = part_of(1500, bias=bias)
    judged = judging.Judged(old, part, [torch.relu], torch.float32)
    sample = judged.sample(old, part.held)
    judged.decides = sample  # on the tokens of the fit nothing beats the fit
    moved = dataclasses.replace(old, up=old.up * 1.3 + 0.1)
    found = judged.refitted_again(moved, sample, old.down, [0.0])
    given = local.hidden(moved, sample.inputs, torch.relu).double()
    if bias:
        given = torch.cat((given, torch.ones(len(given), 1)), 1)
    slow = torch.linalg.lstsq(given, sample.wanted.double()).solution.T
    torch.testing.assert_close(found.down.double(), slow[:, :12], rtol=1e-3, atol=1e-3)
    if found.down_bias is not None:
        torch.testing.assert_close(found.down_bias.double(), slow[:, 12], rtol=1e-3, atol=1e-3)


def test_what_a_regression_learnt_of_the_output_layer_stays_where_it_is_better() -> None:
    old, part, _ = part_of(1500, bias=False)
    judged = judging.Judged(old, part, [torch.relu], torch.float32)
    sample = judged.sample(old, part.held)
    assert judged.decides is not None
    exact = local.Sample(judged.decides.inputs, judged.gives(old, judged.decides.inputs))
    judged.decides = exact
    far = torch.zeros_like(old.down)
    found = judged.refitted_again(old, sample, far, [10.0])
    assert squared(found, exact) < 1e-4 < squared(judged.refitted(old, Refit(torch.eye(12), far, far), [1.0])[0], exact)
    judged.decides = None
    assert judged.refitted_again(old, sample, far) is old


def test_few_tokens_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    old, part, _ = part_of(20 * FEWEST - 40, bias=False)
    assert judging.Judged(old, part, [torch.relu], torch.float32).decides is None
    old, part, _ = part_of(20 * FEWEST + 400, bias=False)
    assert judging.Judged(old, part, [torch.relu], torch.float32).decides is not None


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_a_ridge_that_is_set_is_the_only_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    solve = Refit.solve
    monkeypatch.setattr(Refit, "solve", lambda self, ridge: asked.append(ridge) or solve(self, ridge))
    monkeypatch.setattr(apart, "FEWEST", 1)
    model: Any = FAMILIES[name].model()
    data = [*case_of(name).batches(model)] * 30
    fk.plan(model, fk.CalibratedFusion(0.5, refine=0, ridge=0.7), data=data)
    assert set(asked) == {0.7}
    asked.clear()
    fk.plan(model, fk.CalibratedFusion(0.5, refine=0), data=data)
    assert set(asked) == set(RIDGES)
