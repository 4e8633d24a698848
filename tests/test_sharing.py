"""Sharing fitted to data: closed forms against loops, rows kept apart, permuted copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import case_of

import ffnkit as fk
from ffnkit.calibration.drift import Drift, apart
from ffnkit.calibration.reading import output_metric
from ffnkit.model.finding import ffns
from ffnkit.ops import local
from ffnkit.ops.matching import assign, likeness
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.union import Member, fitted, pooled, thin_difference, union
from ffnkit.testing.contract import distance


def members(bias: bool) -> list[Member]:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    result = []
    for _ in range(3):
        own = Neurons(some(5, 4), some(4, 5), up_bias=some(5) if bias else None, down_bias=some(4) if bias else None)
        x = some(40, 4)
        y = local.forward(own, x, torch.relu)
        result.append(Member.of(own, x, y, torch.rand(40, generator=draw) + 0.1, torch.rand(4, generator=draw) + 0.1))
    return result


@pytest.mark.parametrize("bias", [False, True])
def test_moments_of_the_union_are_those_of_a_loop(bias: bool) -> None:
    found = members(bias)
    joined = union([each.neurons for each in found])
    moments = pooled(joined, found, torch.relu)
    gram, cross = torch.zeros(15, 15).double(), torch.zeros(15, 4).double()
    for each in found:
        hidden = local.hidden(joined, each.inputs, torch.relu).double()
        weights = (each.tokens / each.tokens.sum()).double()
        mean = sum(w * h for w, h in zip(weights, hidden, strict=True)) if bias else torch.zeros(15)
        for w, h, y in zip(weights, hidden, each.outputs.double(), strict=True):
            gram += each.scale * w * torch.outer(h - mean, h - mean)
            cross += each.scale * w * torch.outer(h - mean, y - each.centre)
    assert torch.allclose(moments.gram, gram, rtol=1e-4, atol=1e-6)
    assert torch.allclose(moments.cross, cross, rtol=1e-4, atol=1e-5)


def test_all_neurons_of_the_union_lose_less_than_any_part() -> None:
    found = members(bias=False)
    joined = union([each.neurons for each in found])
    moments = pooled(joined, found, torch.relu)

    def loss(kept: torch.Tensor) -> float:
        fit = fitted(joined, moments, kept, len(found), ridge=0.0)
        total = 0.0
        for each in found:
            gap = local.forward(fit, each.inputs, torch.relu) - each.outputs
            total += each.scale * float(each.tokens / each.tokens.sum() @ gap.square().sum(1))
        return total

    assert loss(torch.arange(15)) <= loss(torch.arange(10)) <= loss(torch.arange(5))


def test_a_thin_difference_of_full_rank_is_least_squares() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, gap = torch.randn(60, 6, generator=draw), torch.randn(60, 4, generator=draw)
    first, second = thin_difference(hidden, gap, torch.ones(60), torch.tensor([1.0, 2.0, 0.5, 3.0]), 4, 0.0)
    wanted = torch.linalg.lstsq(hidden, gap).solution.T
    assert torch.allclose(second @ first, wanted, atol=1e-4)


def test_copies_in_another_order_are_found_by_weights_where_they_see_other_inputs() -> None:
    model = FAMILIES["llama"].model()
    first, other = ffns(model)[:2]
    order = torch.randperm(first.width, generator=torch.Generator().manual_seed(3))
    other.write(first.raw().map(torch.clone).take(order))
    assert torch.equal(order[assign(likeness(first.raw(), other.raw()).detach())], torch.arange(first.width))
    case = case_of("llama")
    before = case.run(model)
    fk.apply(model, fk.plan(model, fk.Merging(layers="0-1")))
    assert distance(case.run(model), before) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_what_reads_an_output_is_found_in_every_family(family: str) -> None:
    case = case_of(family)
    model = case.model()
    for each in output_metric(model, ffns(model), case.batches(model)).values():
        assert float(each.dimensions.std()) > 0
        assert float(each.tokens.std()) > 0


def test_rows_kept_apart_are_not_fitted() -> None:
    batches: list[Any] = [{"input_ids": torch.full((2, 3), i)} for i in range(25)]
    fit, held = apart(batches)
    assert len(held) == 2
    assert len(fit) == 23
    assert not {id(each) for each in fit} & {id(each) for each in held}
    fit, held = apart([{"input_ids": torch.arange(20).view(10, 2)}])
    assert [len(fit[0]["input_ids"]), len(held[0]["input_ids"])] == [9, 1]


def test_a_model_has_not_moved_from_itself() -> None:
    case = case_of("llama")
    model = case.model()
    drift = Drift(model, case.batches(model))
    assert drift() < 1e-6
    fk.apply(model, fk.plan(model, fk.Merging(layers="0-1")))
    assert drift() > 1e-6
