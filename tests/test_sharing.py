"""Sharing fitted to data: closed forms against loops, rows kept apart, permuted copies."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import case_of

import ffnkit as fk
from ffnkit.calibration.drift import Drift, apart
from ffnkit.calibration.reading import output_metric
from ffnkit.errors import FfnkitError
from ffnkit.methods import build
from ffnkit.model.finding import ffns
from ffnkit.ops import local, sharing
from ffnkit.ops.matching import assign, likeness
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.union import Member, biases, choose_from, fitted, pooled, thin_difference, union, with_one_bias
from ffnkit.testing.contract import distance


@pytest.mark.parametrize("method", [fk.Merging(keep=1), fk.CalibratedMerging(keep=1), fk.Merging(window=2)])
def test_a_search_among_edited_ffns_is_refused_before_it_starts(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].model()
    data = [FAMILIES["llama"].inputs(model, seed=seed) for seed in range(4)]
    fk.apply(model, fk.plan(model, fk.CalibratedFusion(0.5, effort="fast"), data=data))
    monkeypatch.setattr("ffnkit.methods.share.fitting.Features", None)  # nothing is measured
    monkeypatch.setattr("ffnkit.methods.share.merging.Features", None)
    with pytest.raises(FfnkitError, match=r"edited already \(down is scaled\)"):
        fk.plan(model, method, data=data)


def unlike(*widths: float) -> Any:
    """A model whose first layers are narrower than the last."""
    model = FAMILIES["llama"].model()
    for layer, width in enumerate(widths):
        fk.apply(model, fk.plan(model, build("magnitude", width=width, layers=str(layer))))
    return model


SEARCHES = [fk.Merging(window=2), fk.CalibratedMerging(window=2, refine=0), fk.CalibratedMerging(keep=2, refine=0)]


@pytest.mark.parametrize("method", SEARCHES)
def test_searches_offer_neighbours_of_one_shape_and_refuse_before_data_where_there_are_none(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unlike(0.5)
    data = [FAMILIES["llama"].inputs(model, seed=seed) for seed in range(4)]
    assert fk.plan(model, method, data=data).report["layers"] == "1-2"
    monkeypatch.setattr("ffnkit.methods.share.fitting.Features", None)  # nothing is measured
    with pytest.raises(FfnkitError, match="of one shape"):
        fk.plan(unlike(0.5, 0.75), method, data=data)
    with pytest.raises(FfnkitError, match="of one shape"):
        fk.plan(model, type(method)(keep=1), data=data)


@pytest.mark.parametrize(
    "method",
    [fk.CalibratedMerging(layers="0,2"), fk.CalibratedMerging(keep=1), fk.Merging(layers="0,2", correct="output")],
)
def test_what_is_fitted_to_members_is_refused_where_some_share_already(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"].model()
    fk.apply(model, fk.plan(model, fk.Merging(layers="0-1")))
    monkeypatch.setattr("ffnkit.methods.share.fitting.Features", None)  # nothing is measured
    with pytest.raises(FfnkitError, match=r"shared already, with model.layers.1.mlp\. .* export") as caught:
        fk.plan(model, method, data=[FAMILIES["llama"].inputs(model)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": []}, "no group"),
        ({"window": 2, "score": 3}, "a function"),
        ({"window": 2, "score": "accuracy"}, "the name of a metric alone"),
        ({"layers": "all", "extra_rank": 500}, "a rank of 16 at most"),
        ({"layers": "0-1", "extra_rank": 14}, "keep 1,168 numbers of their own, and sharing saves 1,152"),
        ({"keep": 2, "extra_rank": 14}, "keep 1,168 numbers of their own, and sharing saves 1,152"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_measured(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffnkit.methods.share.fitting.Features", None)
    monkeypatch.setattr("ffnkit.methods.share.merging.Features", None)
    model = FAMILIES["llama"].model()
    data = [FAMILIES["llama"].inputs(model)]
    with pytest.raises(FfnkitError, match=words):
        fk.plan(model, fk.CalibratedMerging(**settings), data=data)
    if "extra_rank" not in settings:
        with pytest.raises(FfnkitError, match=words):
            fk.plan(model, fk.Merging(features="up", **settings), data=data)


@pytest.mark.parametrize(("family", "left_out"), [("qwen2-moe", "experts"), ("siglip", "head")])
def test_what_cannot_share_is_left_out_of_all_layers(family: str, left_out: str) -> None:
    model = FAMILIES[family].model()
    (groups,) = fk.Merging(layers="all").chosen(model)
    assert groups and not any(left_out in ffn.name.split(".") for group in groups for ffn in group)
    with pytest.raises(FfnkitError, match="a group of one"):
        fk.Merging(layers="1" if family == "qwen2-moe" else "0").chosen(model)


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


def loop_of_choices(
    found: list[Member], width: int, ridge: float, *, bias: bool, dimensions: torch.Tensor
) -> list[int]:
    """Token by token and set by set: the neuron that leaves least of all members' outputs, one after the other.

    The outputs are those that all neurons give best, with the same ridge: what no neuron gives does not count.
    """
    joined = union([each.neurons for each in found]).to(torch.float64)
    rows, wanted = [], []
    for each in found:
        share = (each.tokens / each.tokens.sum()).double()
        hidden = local.hidden(joined, each.inputs.double(), torch.relu)
        y = each.outputs.double() - each.centre.double()
        if bias:
            hidden = hidden - share @ hidden
        root = (each.scale * share).sqrt()[:, None]
        rows.append(root * hidden)
        wanted.append(root * y)
    h, y = torch.cat(rows), torch.cat(wanted)
    count = h.shape[1]
    damped = torch.cat([h, (ridge * h.square().sum(0).mean()).sqrt() * torch.eye(count).double()])
    best = torch.linalg.lstsq(damped, torch.cat([y, torch.zeros(count, y.shape[1]).double()])).solution
    target = (damped @ best) * dimensions.double().sqrt()
    kept: list[int] = []
    for _ in range(width):
        left = {}
        for neuron in set(range(count)) - set(kept):
            columns = damped[:, [*kept, neuron]]
            left[neuron] = float((target - columns @ torch.linalg.lstsq(columns, target).solution).square().sum())
        kept.append(min(left, key=lambda each: left[each]))
    return sorted(kept)


@pytest.mark.parametrize("bias", [False, True])
def test_the_greedy_choice_from_the_union_is_that_of_a_loop(bias: bool) -> None:
    found = members(bias)
    dimensions = torch.stack([each.dimensions for each in found]).mean(0)
    moments = pooled(union([each.neurons for each in found]), found, torch.relu)
    for width in (1, 3, 6):
        wanted = loop_of_choices(found, width, 0.01, bias=bias, dimensions=dimensions)
        assert choose_from(moments, width, dimensions, 0.01).tolist() == wanted
    uneven = torch.tensor([1e4, 1.0, 1.0, 1.0])  # the loop tells dimensions that count alike from those that do not
    assert loop_of_choices(found, 6, 0.01, bias=bias, dimensions=uneven) != wanted
    first = dataclasses.replace(found[0], scale=1e4 * found[0].scale)  # and members that do
    assert loop_of_choices([first, *found[1:]], 6, 0.01, bias=bias, dimensions=dimensions) != wanted


@pytest.mark.parametrize("one", [False, True])
def test_output_biases_of_members_are_those_of_a_loop(one: bool) -> None:
    """The bias that leaves least of a member's outputs, or of all members', the output layer given."""
    found = members(bias=True)
    joined = union([each.neurons for each in found])
    moments = pooled(joined, found, torch.relu)
    shared = with_one_bias(moments, found) if one else moments
    kept = choose_from(shared, 6, torch.ones(4), 0.01)
    neurons = fitted(joined, shared, kept, len(found), 0.01)
    made = biases(neurons, moments, kept, found, one=one)
    sums, weights = [], []
    for each in found:
        total, weight = torch.zeros(4).double(), 0.0
        for x, y, token in zip(each.inputs, each.outputs, each.tokens, strict=True):
            hidden = local.hidden(neurons, x[None], torch.relu)[0].double()
            share = each.scale * float(token / each.tokens.sum())
            total += share * (y.double() - neurons.down.double() @ hidden)
            weight += share
        sums.append(total)
        weights.append(weight)
    alone = [total / weight for total, weight in zip(sums, weights, strict=True)]
    wanted = [sum(sums) / sum(weights)] * len(found) if one else alone
    for bias, own in zip(made, wanted, strict=True):
        assert bias is not None
        assert torch.allclose(bias.double(), own, rtol=1e-3, atol=1e-4)
    plain = sum(alone) / len(alone)  # members whose outputs are small count more: the plain mean is not it
    assert not torch.allclose(made[0].double(), plain, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]


def test_with_one_bias_the_output_layer_is_least_squares_over_all_members() -> None:
    found = members(bias=True)
    joined = union([each.neurons for each in found])
    moments = with_one_bias(pooled(joined, found, torch.relu), found)
    kept = torch.arange(0, 15, 3)
    made = fitted(joined, moments, kept, len(found), 0.0).down.double()
    rows, wanted = [], []
    for each in found:
        hidden = local.hidden(joined, each.inputs, torch.relu)[:, kept].double()
        for h, y, token in zip(hidden, each.outputs.double(), each.tokens / each.tokens.sum(), strict=True):
            root = float(each.scale * token) ** 0.5
            rows.append(root * torch.cat([h, torch.ones(1).double()]))
            wanted.append(root * y)
    whole = torch.linalg.lstsq(torch.stack(rows), torch.stack(wanted)).solution.T
    assert torch.allclose(made, whole[:, :-1], rtol=1e-3, atol=1e-4)
    own = fitted(joined, pooled(joined, found, torch.relu), kept, len(found), 0.0).down.double()
    assert not torch.allclose(own, whole[:, :-1], rtol=1e-2, atol=1e-2)  # biases of their own are another fit


def test_a_share_of_what_was_fitted_lies_between_and_members_go_on_sharing() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [Neurons(torch.randn(6, 4, generator=draw), torch.randn(4, 6, generator=draw)) for _ in range(2)]
    first, second = (sharing.Own(torch.rand(6, generator=draw), torch.randn(4, generator=draw)) for _ in range(2))
    start, end = (pairs[0], [first, first]), (pairs[1], [second, second])
    for share in (0.0, 0.25, 1.0):
        neurons, owns = sharing.between(start, end, share)
        assert owns[0] is owns[1]
        torch.testing.assert_close(neurons.up, (1 - share) * pairs[0].up + share * pairs[1].up)
        torch.testing.assert_close(neurons.down, (1 - share) * pairs[0].down + share * pairs[1].down)
        torch.testing.assert_close(owns[0].scale, (1 - share) * first.scale + share * second.scale)
    apart = sharing.between((pairs[0], [first, first]), (pairs[1], [second, first]), 0.5)[1]
    assert apart[0] is not apart[1]


@pytest.mark.parametrize("method", [fk.Merging, fk.CalibratedMerging])
def test_a_score_that_is_no_number_is_the_lowest(method: Any) -> None:
    model = FAMILIES["gpt2"].model()
    data = [FAMILIES["gpt2"].inputs(model, seed=seed) for seed in range(4)]
    scores = iter([float("nan"), 0.5, float("nan"), 0.7, *[float("nan")] * 20])
    more = {"refine": 0} if method is fk.CalibratedMerging else {}
    count = len(ffns(model))
    plan = fk.plan(model, method(window=2, score=lambda _: next(scores), **more), data=data)
    merged = plan.report["groups"][0]
    assert count > 2 and merged != [ffn.name for ffn in ffns(model)[:2]]


def test_how_many_ffns_can_be_saved_is_told() -> None:
    model = FAMILIES["llama"].model()
    for method, told in (
        (fk.CalibratedMerging(keep=3), "keep=3: there are 3 FFNs in a stack. Give a number below 3"),
        (fk.Merging(groups="similar", keep=9), "keep=9: there are 3 FFNs"),
        (fk.CalibratedMerging(remove=0.99), "remove=0.99: .* one of them stays. Give 0.66 or less"),
    ):
        with pytest.raises(FfnkitError, match=told):
            method.chosen(model)
    assert len(fk.CalibratedMerging(remove=0.66).chosen(model)) == 1
