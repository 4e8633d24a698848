"""The methods beside fusion, on one family of each kind of FFN: plan, apply, fold, both checkpoint forms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import KINDS, OTHERS, REFUSED, crossed
from test_contract import EXACT, RELOADED, compare, differ, same, snapshot
from tolerance import assert_close, relative_error
from torch import nn
from transformers import BertConfig, BertModel

import ffnkit as fk
from ffnkit import methods
from ffnkit.calibration.hooks import watch
from ffnkit.errors import FfnkitError
from ffnkit.io.files import SPOOL_FROM
from ffnkit.methods.drop.unstructured import largest_weights
from ffnkit.methods.narrow.mmd import bandwidth, gradient, mmd
from ffnkit.model.finding import ffns
from ffnkit.ops import local, subset
from ffnkit.ops.moments import Moments
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.refit import refit
from ffnkit.ops.subset import choose, leverage, ranked

# Fast: each method on an FFN without gates, with them and with experts, and each kind of FFN by one method or two.
EACH = pytest.mark.parametrize(("method", "name"), crossed(OTHERS, KINDS, always=[("svd", "bert")]))


def planned(name: str, method: str, model: nn.Module | None = None, batches: int = 2, **more: Any) -> Any:
    family = FAMILIES[name]
    model = family.model() if model is None else model
    data = [family.inputs(model, seed=seed) for seed in range(batches)]
    return fk.plan(model, OTHERS[method](**more), data=data)


@EACH
def test_plan_apply_fold_save_and_export(method: str, name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    if (method, name) in REFUSED:
        with pytest.raises(FfnkitError, match=REFUSED[method, name]):
            planned(name, method)
        return
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    plan = planned(name, method, model)
    assert same(snapshot(model), before) and [type(m) for m in model.modules()] == classes
    assert plan == planned(name, method)
    assert str(plan).startswith(f"{plan.method}(") and all(ffn.name in str(plan) for ffn in ffns(model))
    plan.save(tmp_path / "plan")
    loaded = fk.Plan.load(tmp_path / "plan")
    assert loaded == plan

    applied = fk.apply(copy.deepcopy(model), loaded)
    differ(family, applied, model)
    saved = plan.saved_parameters
    assert sum(p.numel() for p in applied.parameters()) == plan.parameters - saved
    fk.save(applied, tmp_path / "compact")
    again = fk.load(tmp_path / "compact")
    if any(ffn.experts for ffn in ffns(again)):
        again.set_experts_implementation("eager")
    compare(family, again.eval(), applied, RELOADED)
    fk.export(applied, tmp_path / "standard")

    double = fk.apply(copy.deepcopy(model).double(), loaded)
    unfolded = copy.deepcopy(double)
    fk.fold(double)
    compare(family, double, unfolded, EXACT if method != "svd" else 1e-10)
    assert [type(m) for m in double.modules()] == classes


@pytest.mark.parametrize("method", ["magnitude", "importance", "random", "calibrated-fusion", "svd", "unstructured"])
def test_full_width_changes_nothing(method: str) -> None:
    model = FAMILIES["llama"].model()
    applied = fk.apply(copy.deepcopy(model), planned("llama", method, width=1.0))
    compare(FAMILIES["llama"], applied, model, 1e-6)


@pytest.mark.parametrize("method", ["importance", "calibrated-fusion"])
def test_methods_that_measure_ask_for_data(method: str) -> None:
    with pytest.raises(FfnkitError, match="no data are given"):
        fk.plan(FAMILIES["bert"].model(), OTHERS[method]())


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_neurons_that_the_data_never_use_go_without_loss(name: str) -> None:
    family = FAMILIES[name]
    model = family.model().double()
    for ffn in ffns(model):
        neurons = ffn.read()
        dead = neurons.map(torch.clone)
        half = neurons.ff // 2
        dead.down[..., half:] = 0
        ffn.write(dead)
    rows = [family.inputs(model, seed=seed) for seed in range(40)]
    data = [{key: torch.cat([row[key] for row in rows]) for key in rows[0]}]
    for method in ("calibrated-fusion", "importance"):
        more = {"refine": 0, "ridge": 0.0, "select": "loss"} if method == "calibrated-fusion" else {}
        exact = fk.apply(copy.deepcopy(model), fk.plan(model, OTHERS[method](**more), data=data))
        compare(family, exact, model, 1e-5)  # statistics are formed in float32
    differ(family, fk.apply(copy.deepcopy(model), planned(name, "random", model)), model)  # the control


def test_greedy_choice_and_refit_follow_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    down = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    target = h @ down.T

    def error(kept: list[int]) -> float:
        solution = torch.linalg.lstsq(h[:, kept], target).solution
        return (target - h[:, kept] @ solution).square().sum().item()

    slow: list[int] = []
    for _ in range(5):
        slow.append(min((i for i in range(12) if i not in slow), key=lambda i: error([*slow, i])))
    gram = h.T @ h
    chosen = choose(gram, down, 5)
    assert chosen.order.tolist() == slow
    assert_close(
        chosen.remains[1:], torch.tensor([error(slow[: k + 1]) for k in range(5)], dtype=torch.float64), rel=1e-8
    )
    kept = chosen.order
    fitted, explained = refit(gram, down, kept, 0.0)
    assert_close(fitted, torch.linalg.lstsq(h[:, kept], target).solution.T, rel=1e-8)
    total = target.square().sum().item()
    assert abs(chosen.outputs / total - 1) < 1e-10
    assert abs(explained / (total - error(slow)) - 1) < 1e-10
    plain = (target - h[:, kept] @ down[:, kept].T).square().sum().item()
    assert plain > 1.5 * error(slow)  # the control: not refitted
    stiff, less = refit(gram, down, kept, 1.0)
    # the ridge, as more rows
    rows = gram[kept][:, kept].diagonal().mean().sqrt() * torch.eye(5, dtype=torch.float64)
    ridged = torch.linalg.lstsq(torch.cat((h[:, kept], rows)), torch.cat((target, rows @ down[:, kept].T)))
    assert_close(stiff, ridged.solution.T, rel=1e-8)
    cut, _ = refit(gram, down, kept, 1e12)
    assert_close(cut, down[:, kept], rel=1e-8)  # much ridge is plain cutting, and not an output layer of zeros
    assert abs(less / (total - (target - h[:, kept] @ stiff.T).square().sum().item()) - 1) < 1e-10
    assert less < explained


def test_scores_are_what_is_lost_without_each_neuron() -> None:
    draw = torch.Generator().manual_seed(0)
    h, mixing, down = (torch.randn(*shape, generator=draw).double() for shape in ((100, 7), (7, 7), (4, 7)))
    h = h @ mixing
    gram, ridge = h.T @ h, 0.05
    shift = ridge * gram.diagonal().mean()
    rows = shift.sqrt() * torch.eye(7, dtype=torch.float64)
    for number in range(7):  # without it, the others refitted; the ridge, as more rows, counts what is missing too
        others = [i for i in range(7) if i != number]
        wanted = torch.cat((h, rows)) @ down.T
        solution = torch.linalg.lstsq(torch.cat((h, rows))[:, others], wanted).solution
        lost = (wanted - torch.cat((h, rows))[:, others] @ solution).square().sum()
        assert_close(leverage(gram, ridge, down)[number], lost, rel=1e-8)
        share = (gram @ torch.linalg.inv(gram + shift * torch.eye(7, dtype=torch.float64)))[number, number]
        assert_close(leverage(gram, ridge)[number], share, rel=1e-8)
    alike = torch.cat((h, h[:, :1]), 1)  # a copy of a neuron, no ridge: either can go without loss
    scores = leverage(alike.T @ alike, 0.0, torch.cat((down, down[:, :1]), 1))
    assert scores[[0, 7]].max() < 1e-5 * scores[1:7].min()


def test_neurons_are_ranked_by_loss_and_by_leverage_in_turn() -> None:
    draw = torch.Generator().manual_seed(0)
    h, mixing, down = (torch.randn(*shape, generator=draw).double() for shape in ((100, 24), (24, 24), (4, 24)))
    gram, ridge = (h @ mixing).T @ (h @ mixing), 0.05
    by_loss, by_leverage = (leverage(gram, ridge, of).argsort(descending=True).tolist() for of in (down, None))
    assert ranked(gram, ridge, down, 1.0).tolist() == by_loss != by_leverage
    assert ranked(gram, ridge, down, 0.0).tolist() == by_leverage
    order: list[int] = []
    while len(order) < 24:  # a quarter by loss: once by loss, then three times by leverage
        by = int(len(order) % 4 != 0)
        order.append(next(each for each in (by_loss, by_leverage)[by] if each not in order))
    assert ranked(gram, ridge, down, 0.25).tolist() == order
    heavy = down.clone()
    heavy[:, by_leverage[-1]] *= 1e3  # what leverage would drop first, and the outputs stand on
    assert by_leverage[-1] in ranked(gram, ridge, heavy, 0.25)[:4] and by_leverage[-1] in by_leverage[4:]


def test_many_neurons_are_chosen_as_one_by_one() -> None:
    """Scores are kept up to date without the whole product: as computed anew, beyond the neurons held back too."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400, 160, generator=generator, dtype=torch.float64)
    h = h @ torch.randn(160, 160, generator=generator, dtype=torch.float64)
    down = torch.randn(40, 160, generator=generator, dtype=torch.float64)
    gram, width, ridge = h.T @ h, 2 * subset.DELAY + 9, 1e-3
    chosen = choose(gram, down, width, ridge)
    left = gram + ridge * gram.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    for step in range(width):
        assert_close(chosen.remains[step], (left * (down.T @ down)).sum(), rel=1e-8)
        gain = (left @ down.T).square().sum(1) / left.diagonal().clamp_min(1e-9)
        gain[chosen.order[:step]] = -1
        best = int(gain.argmax())
        assert int(chosen.order[step]) == best
        left = left - torch.outer(left[best], left[best]) / left[best, best]


def test_streamed_moments_equal_those_of_all_tokens() -> None:
    h = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1))
    moments = Moments(6, h.device)
    for part, share in zip(h.split(7), weights.split(7), strict=True):
        moments.add(part, share)
    w = weights.double()[:, None]
    mean = (h.double() * w).sum(0) / w.sum()
    assert_close(moments.mean(), mean, rel=1e-6)
    assert_close(moments.centred(), ((h - mean) * w).T @ (h - mean) / w.sum(), rel=1e-5)
    assert (moments.centred() - moments.second()).abs().max() > 1  # the control: centring matters here
    kept, second = moments.centred(), moments.second()
    assert torch.equal(moments.second(), second)  # asking changes nothing
    assert torch.equal(moments.centred(last=True), kept)
    assert not torch.equal(moments.second(), second)  # the control: the sums were given up


@pytest.mark.parametrize("weighed", [False, True])
def test_moments_tell_what_hardly_varies_from_what_does_not(weighed: bool) -> None:
    """Of several calls, and merged: a constant has no variance, and a small one is what it is."""
    draw = torch.Generator().manual_seed(0)
    h = torch.cat(
        [10 + 0.03 * torch.randn(8192, 20, generator=draw), torch.rand(20, generator=draw).expand(8192, 20)], 1
    )
    weights = torch.rand(8192, generator=draw) if weighed else torch.ones(8192)
    halves = []
    for rows, share in zip(h.split(4096), weights.split(4096), strict=True):
        halves.append(Moments(40, h.device))
        for some in torch.arange(4096).split(2048):
            halves[-1].add(rows[some], share[some] if weighed else None)
    halves[0].merge(Moments.of(halves[1].state_dict()))
    share = (weights / weights.sum()).double()[:, None]
    centred = h.double() - (share * h.double()).sum(0)
    found = halves[0].centred()
    assert not bool(found[20:].any()) and not bool(found[:, 20:].any())
    assert_close(found[:20, :20].diagonal(), (share * centred.square()).sum(0)[:20], rel=1e-4)
    assert_close(halves[0].second(), (share * h.double()).T @ h.double(), rel=1e-6)


def test_moments_of_many_columns_are_symmetric_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    for panel in (1, 3, 512):
        monkeypatch.setattr("ffnkit.ops.moments.PANEL", panel)
        moments = Moments(7, h.device)
        moments.add(h)
        gram = moments.second()
        assert_close(gram, h.double().T @ h.double() / 40, rel=1e-6)
        assert_close(gram, gram.T, rel=1e-7)


@pytest.mark.parametrize("name", ("sketch", "svd", "calibrated-fusion"))
def test_a_plan_serves_many_models(name: str) -> None:
    """Models that a plan was applied to share no weights with it, nor with each other; beyond what is spooled."""
    config = BertConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=2)
    config.vocab_size = 50
    model = BertModel(config).eval()
    more = {"refine": 0} if name == "calibrated-fusion" else {}
    batches = [{"input_ids": torch.arange(40)[None]}]
    plan = fk.plan(model, methods.build(name, width=0.5, **more), data=batches)
    assert any(t.numel() * t.element_size() > SPOOL_FROM for edit in plan.edits for t in edit.tensors().values())
    first, second = (fk.apply(copy.deepcopy(model), plan) for _ in range(2))
    before = [p.detach().clone() for p in second.parameters()]
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    assert all(torch.equal(p, old) for p, old in zip(second.parameters(), before, strict=True))
    third = fk.apply(copy.deepcopy(model), plan)
    assert all(torch.equal(p, old) for p, old in zip(third.parameters(), before, strict=True))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))  # the control


def test_the_largest_weights_stay_and_ties_go_to_the_first() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0], [2.0, 0.0, -2.0]])
    assert largest_weights(weight, 3).tolist() == [[False, True, True], [True, False, False]]
    assert largest_weights(weight, 0).sum() == 0 and largest_weights(weight, 6).all()
    drawn = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    for count in (1, 77, 1199):
        order = torch.sort(drawn.abs().flatten(), descending=True, stable=True).indices[:count]
        assert torch.equal(largest_weights(drawn, count).flatten().nonzero()[:, 0], order.sort().values)


def test_mmd_follows_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    points, rows = torch.randn(4, 3, generator=generator).double(), torch.randn(9, 3, generator=generator).double() + 1
    both = torch.cat([points, rows])
    distance = torch.tensor([[(a - b).square().sum().item() for b in both] for a in both])
    mean = distance.sum() / (13 * 13 - 13)
    kernel = sum((-distance / (mean * 2.0 ** (i - 2))).exp() for i in range(5))
    slow = kernel[:4, :4].mean() - 2 * kernel[:4, 4:].mean() + kernel[4:, 4:].mean()
    assert abs(mmd(points, rows) / float(slow) - 1) < 1e-6
    assert abs(mmd(rows, rows)) < 1e-12 < slow


def test_the_gradient_of_mmd_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 3, generator=generator).double().requires_grad_()
    rows = torch.randn(9, 3, generator=generator).double() + 1
    wide = bandwidth(points.detach(), rows)

    def affinity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        distance = (first[:, None] - second[None]).square().sum(-1)
        return sum(((-distance / (wide * 2.0 ** (i - 2))).exp().mean() for i in range(5)), torch.zeros(()))

    (affinity(points, points) - 2 * affinity(points, rows)).backward()
    for at_once in (2, 1024):
        monkeypatch.setattr("ffnkit.methods.narrow.mmd.AT_ONCE", at_once)
        assert_close(gradient(points.detach(), rows), points.grad, rel=1e-9)
    assert relative_error(gradient(points.detach(), rows + 1), points.grad) > 0.1  # the control


def test_padding_does_not_count() -> None:
    family = FAMILIES["bert"]
    model = family.model()
    batch = family.inputs(model)
    seen: list[int] = []
    watch(model, [batch], ffns(model)[:1], lambda ffn, flow: seen.append(len(flow.kept().input)))
    assert seen == [int(batch["attention_mask"].sum())]
    assert seen[0] < batch["input_ids"].numel()


def test_regression_keeps_the_start_where_it_does_not_help() -> None:
    generator = torch.Generator().manual_seed(0)
    neurons = Neurons(torch.randn(6, 4, generator=generator), torch.randn(4, 6, generator=generator))
    x = torch.randn(60, 4, generator=generator)
    target = local.forward(neurons, x, torch.relu)
    draw = torch.Generator().manual_seed(0)
    assert local.regress(neurons, local.Sample(x, target), torch.relu, steps=5, generator=draw) is neurons
    other = neurons.take(torch.arange(3))
    fitted = local.regress(
        other, local.Sample(x, target), torch.relu, steps=50, generator=torch.Generator().manual_seed(0)
    )
    assert fitted is not other


def test_unknown_width_name_is_refused() -> None:
    with pytest.raises(FfnkitError, match="no FFN of that name"):
        fk.plan(FAMILIES["bert"].model(), methods.build("magnitude", width={"nowhere": 3}))


def test_widths_by_name() -> None:
    model = FAMILIES["bert"].model()
    names = [ffn.name for ffn in ffns(model)]
    plan = fk.plan(model, methods.build("magnitude", width={names[1]: 7}))
    assert plan.widths() == {names[1]: (40, 7)}


def test_nothing_of_the_regression_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer is part of a cycle: what it held would stay, layer after layer, until garbage is collected."""
    made: list[torch.optim.Optimizer] = []
    held: list[int] = []

    class Adam(torch.optim.Adam):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(self)

        def step(self, *args: Any, **more: Any) -> Any:
            result = super().step(*args, **more)
            held.append(len(self.state))
            return result

    monkeypatch.setattr("torch.optim.Adam", Adam)
    planned("bert", "calibrated-fusion", refine=2)
    assert made and min(held) > 0  # the control: they held something
    assert not any(optimizer.state or optimizer.param_groups for optimizer in made)
