"""Refits of every method are mixed from several ridges, by tokens that none saw; other tokens tell the error."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import case_of
from tolerance import assert_close
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ffnkit as fk
from ffnkit import methods
from ffnkit.calibration.drift import Drift
from ffnkit.calibration.reading import output_metric
from ffnkit.edits import ReplaceLinear, ReplaceNeurons
from ffnkit.methods.share.fitting import Fitting
from ffnkit.methods.share.refitting import Correction, Corrector, shared
from ffnkit.model.finding import ffns
from ffnkit.ops import apart
from ffnkit.ops.apart import RUN, held_out
from ffnkit.ops.refit import RIDGES, Deciding, Pairs, Refit
from ffnkit.surgery.temporary import temporarily

TOKENS = 3200  # of one call


def tall(rows: Tensor, wanted: Tensor, start: Tensor, ridge: float, *, bias: bool, weights: Tensor) -> Tensor:
    """min sum_t w_t ||D h_t + b - y_t||^2 + lambda ||D - start||^2 as one tall system, D alone."""
    share = (weights / weights.sum())[:, None].double()
    rows, wanted = rows.double(), wanted.double()
    if bias:
        rows, wanted = rows - (share * rows).sum(0), wanted - (share * wanted).sum(0)
    shift = ridge * (share * rows.square()).sum(0).mean()
    left = torch.cat([share.sqrt() * rows, shift.sqrt() * torch.eye(rows.shape[1]).double()])
    return torch.linalg.lstsq(left, torch.cat([share.sqrt() * wanted, shift.sqrt() * start.double().T])).solution.T


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, noisy outputs, a start and weights."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(TOKENS, 8, generator=draw) * torch.logspace(0, -1, 8) + 1
    true, start = torch.randn(2, 5, 8, generator=draw)
    wanted = rows @ (start + 0.3 * true).T + 2 * torch.randn(TOKENS, 5, generator=draw) + 1
    return rows, wanted, start, torch.rand(TOKENS, generator=draw) + 0.5


def fit(rows: Tensor, wanted: Tensor, start: Tensor, weights: Tensor, bias: Tensor | None, ridge: float | None) -> Any:
    pairs = Pairs(rows.shape[1], wanted.shape[1], rows.device)
    pairs.add(rows, wanted, weights)
    return pairs.fit(start, bias, ridge)


@pytest.mark.parametrize("biased", [False, True])
def test_a_mixture_is_of_the_slow_fits_and_best_where_it_is_decided(biased: bool) -> None:
    rows, wanted, start, weights = problem()
    bias = torch.zeros(5) if biased else None
    found, fresh, error = fit(rows, wanted, start, weights, bias, None)
    out = held_out(TOKENS)
    places = torch.nonzero(out).flatten()
    odd = torch.arange(len(places)) // RUN % 2 == 1
    decide, tell, fitted = places[odd], places[~odd], ~out

    def loss(weight: Tensor, where: Tensor) -> float:
        gap = wanted[where].double() - rows[where].double() @ weight.T
        if biased:
            share = weights[fitted].double() / weights[fitted].double().sum()
            gap -= share @ (wanted[fitted].double() - rows[fitted].double() @ weight.T)
        return float((gap.square().sum(1) * weights[where]).sum())

    singles = [tall(rows[fitted], wanted[fitted], start, r, bias=biased, weights=weights[fitted]) for r in RIDGES]
    for ridge, slow in zip(RIDGES, singles, strict=True):
        assert_close(fit(rows, wanted, start, weights, bias, ridge)[0], slow, rel=1e-3, what=f"ridge {ridge}")
    changes = torch.stack([(single - start).flatten() for single in singles], 1)
    shares = torch.linalg.lstsq(changes, (found - start).flatten()[:, None]).solution
    assert_close(changes @ shares, (found - start).flatten()[:, None], rel=1e-3, what="a mixture of the fits")
    least = loss(found, decide)
    assert all(least <= loss(single, decide) * (1 + 1e-6) for single in [*singles, start.double()])
    spread = wanted[tell].double() - (weights[tell].double() @ wanted[tell].double()) / weights[tell].sum()
    total = float((spread.square().sum(1) * weights[tell]).sum())
    assert error**2 == pytest.approx(loss(found, tell) / total, rel=1e-4)
    assert (fresh is not None) == biased


def test_what_decides_is_not_fitted_and_what_tells_changes_nothing() -> None:
    rows, wanted, start, weights = problem()
    places = torch.nonzero(held_out(TOKENS)).flatten()
    odd = torch.arange(len(places)) // RUN % 2 == 1
    plain, _, error = fit(rows, wanted, start, weights, None, None)
    for some, ridge, same in ((places[~odd], None, True), (places[odd], None, False), (places, 0.1, True)):
        other = wanted.clone()
        other[some] += 5
        changed, _, told = fit(rows, other, start, weights, None, ridge)
        before = plain if ridge is None else fit(rows, wanted, start, weights, None, ridge)[0]
        assert torch.equal(changed, before) == same
        assert (told != error) or not same


def test_only_so_many_tokens_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, wanted, start, weights = problem()
    monkeypatch.setattr("ffnkit.ops.refit.MOST", 200)
    pairs = Pairs(8, 5, rows.device)
    for part in range(4):
        some = slice(800 * part, 800 * part + 800)
        pairs.add(rows[some], wanted[some], weights[some])
    assert sum(len(each[0]) for each in pairs._held) == 200
    assert pairs.fit(start, None, None)[0].isfinite().all()


def given(name: str) -> tuple[Any, list[dict[str, Any]]]:
    model = FAMILIES[name].model()
    return model, case_of(name).batches(model) * 2


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many fits went into each refitted layer, of few tokens too."""
    for name in ("FEWEST", "RUN"):
        monkeypatch.setattr(apart, name, 1)
    asked: list[int] = []
    mix = Refit.mixed

    def noted(self: Refit, ridges: Any, decide: Deciding | None, *more: Any) -> Tensor:
        asked.append(len(ridges) if decide is not None else 1)
        return mix(self, ridges, decide, *more)

    monkeypatch.setattr(Refit, "mixed", noted)
    return asked


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral", "gpt2", "t5", "gpt-oss"])
@pytest.mark.parametrize("made", ["importance", "fusion", "heads"])
def test_every_refit_mixes_unless_a_ridge_is_set(made: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = given(name)
    asked = spied(monkeypatch)
    settings: dict[str, Any] = {"remove": 1} if made == "heads" else {"width": 0.5}
    plan = fk.plan(model, methods.build(made, refit=True, **settings), data=data)
    assert asked and max(asked) == len(RIDGES)
    told = [q["output error on the data"] for q in plan.quantities.values() if "output error on the data" in q]
    assert told and all(0 <= each < 5 for each in told)
    fk.apply(copy.deepcopy(model), plan)
    asked.clear()
    fk.plan(model, methods.build(made, refit=True, ridge=0.3, **settings), data=data)
    assert asked and max(asked) == 1


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral", "gpt-oss"])
def test_statistics_mix_as_the_data_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = given(name)
    asked = spied(monkeypatch)
    one, two = (
        fk.plan(model, methods.build("magnitude", width=0.5, refit=True), data=each)
        for each in (data, fk.calibrate(model, data))
    )
    assert max(asked) == len(RIDGES)
    for first, second in zip(one.edits, two.edits, strict=True):
        assert isinstance(first, ReplaceNeurons) and isinstance(second, ReplaceNeurons)
        assert_close(first.neurons().down, second.neurons().down, rel=1e-3, what=first.target)
    for target, told in one.quantities.items():
        assert told == pytest.approx(two.quantities[target], rel=1e-3)


@pytest.mark.parametrize("times", [1, 300])
def test_one_token_says_nothing_of_an_output_layer_with_a_bias(times: int) -> None:
    """Around its mean it has nothing but rounding, and a ridge relative to that would be rounding too."""
    rows, wanted, start, _ = problem()
    one, more = (Pairs(rows.shape[1], wanted.shape[1], rows.device) for _ in range(2))
    for _ in range(times):
        one.add(rows[:1] / 3, wanted[:1])
        more.add(rows[:1] / 3, wanted[:1])
    more.add(rows[1:9], wanted[1:9])  # the control: other tokens do
    (down, bias, _), (other, *_) = (each.fit(start, torch.zeros(len(start)), None) for each in (one, more))
    assert torch.equal(down, start.double()) and not torch.equal(other, start.double()) and bias is not None
    assert_close(rows[:1].double() / 3 @ down.T + bias, wanted[:1].double(), rel=1e-6, what="the token's output")


def test_padding_changes_no_head() -> None:
    model, data = given("bert")
    other = [{**each, "input_ids": each["input_ids"].masked_fill(each["attention_mask"] == 0, 7)} for each in data]
    method = fk.RemoveHeads(remove=1, refit=True)
    weights: Callable[[Any], list[Tensor]] = lambda given: [  # noqa: E731
        e.tensors()["weight"] for e in fk.plan(model, method, data=given).edits if isinstance(e, ReplaceLinear)
    ]
    for one, two in zip(weights(data), weights(other), strict=True):
        assert_close(one, two, rel=1e-4, what="output linear")


def shared_by_two() -> tuple[Any, list[Any], Fitting, list[Any]]:
    """A model of two FFNs, of which the second gives ten times as much: by squares it alone would count."""
    model = FAMILIES["llama"].model()
    found = ffns(model)[:2]
    with torch.no_grad():
        for value in found[1].linear("down").parameters():
            value *= 10
    batches = [
        {**each, "input_ids": each["input_ids"] + n} for n in range(3) for each in case_of("llama").batches(model)
    ]
    return model, found, Fitting(model, found, batches[1:], batches[:1], 10_000), batches[:1]


def test_a_shared_output_layer_is_fitted_to_each_member_by_its_own_scale() -> None:
    _, found, seen, _ = shared_by_two()
    mean = shared(found, torch.arange(found[0].width, dtype=torch.int32)[None])
    correction = Correction(found, mean, seen)
    made, errors = correction.solve(0.1)
    rows, wanted, weights = [], [], []
    for member in correction.members:
        x = member.inputs.double()
        assert mean.gate is not None
        rows.append(torch.nn.functional.silu(x @ mean.gate.T.double()) * (x @ mean.up.T.double()))
        wanted.append(member.outputs.double())
        share = member.tokens.double() / member.tokens.sum()
        spread = (share[:, None] * member.outputs.double().square() * member.dimensions.double()).sum()
        weights.append(share / spread)
    h, y, w = (torch.cat(each) for each in (rows, wanted, weights))
    root, shift = w.sqrt()[:, None], 0.1 * (w[:, None] * h.square()).sum(0).mean()
    left = torch.cat([root * h, shift.sqrt() * torch.eye(h.shape[1]).double()])
    right = torch.cat([root * y, shift.sqrt() * mean.down.T.double()])
    assert_close(made.down.double(), torch.linalg.lstsq(left, right).solution.T, rel=1e-3, what="shared output layer")
    alike = tall(h, y, mean.down, 0.1, bias=False, weights=torch.ones(len(h)))
    assert not torch.allclose(made.down.double(), alike, rtol=0.05)  # the control
    assert set(errors) == {ffn.name for ffn in found}


def test_the_ridge_of_a_shared_output_layer_is_that_which_moves_the_model_least() -> None:
    model, found, seen, held = shared_by_two()
    mean = shared(found, torch.arange(found[0].width, dtype=torch.int32)[None])
    far = []
    drift = Drift(model, held)
    for ridge in RIDGES:
        neurons, _ = Correction(found, mean, seen).solve(ridge)
        with temporarily(model, [ReplaceNeurons.of(ffn.name, neurons) for ffn in found]):
            far.append(drift())
    assert len(set(far)) == len(far)
    ((best, _),) = Corrector(model, seen, held, None).best([(found, mean)])
    assert torch.equal(best.down, Correction(found, mean, seen).solve(RIDGES[far.index(min(far))])[0].down)
    ((one, _),) = Corrector(model, seen, held, 0.7).best([(found, mean)])
    assert torch.equal(one.down, Correction(found, mean, seen).solve(0.7)[0].down)


@pytest.mark.parametrize("name", ["gpt2", "bert", "phi3"])
def test_an_ffn_that_gives_nothing_does_not_take_over_the_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to its own outputs any error of it is infinite."""

    def far(method: Any) -> float:
        model = FAMILIES[name].model()
        batches = [FAMILIES[name].inputs(model, seed=seed) for seed in range(16)]
        dead = ffns(model)[0].raw()
        for value in (dead.down, dead.down_bias):
            if value is not None:
                value.data.zero_()
        drift = Drift(model, batches)
        fk.apply(model, fk.plan(model, method, data=batches))
        return drift()

    made = fk.Merging(layers="all", correct="output", ridge=0.1), fk.CalibratedMerging(layers="all", refine=0)
    now = [far(method) for method in made]
    monkeypatch.setattr("ffnkit.ops.union.FAINT", 0.0)
    assert [new < 0.95 * old for new, old in zip(now, map(far, made), strict=True)] == [True, True], now


def test_one_group_is_corrected_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the members of a group did is dropped before the next one's is read; what four ridges share is held once."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    found, data = ffns(model), [FAMILIES["llama"].inputs(model, seed=seed) for seed in range(8)]
    seen = Fitting(model, found, data[:6], data[6:], 10_000)
    alive: weakref.WeakSet[Correction] = weakref.WeakSet()
    most, made = [], Correction.__init__

    def noting(self: Correction, *given: Any) -> None:
        made(self, *given)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(Correction, "__init__", noting)
    orders = torch.arange(found[0].width, dtype=torch.int32)[None]
    for ridge in (None, 0.1):
        starts = [(pair, shared(pair, orders)) for pair in (found[:2], found[2:4])]
        Corrector(model, seen, data[6:], ridge).best(starts)
    assert most == [1] * 4
    fits = [neurons for neurons, _ in Corrector(model, seen, data[6:], None)._solved(*starts[0])]
    assert len({each.up.data_ptr() for each in fits}) == 1 and len({each.down.data_ptr() for each in fits}) == 4


def test_tokens_count_by_the_root_of_what_the_norm_makes_of_them() -> None:
    """By the metric itself an attention sink counts as nothing; where all count alike it is all that is fitted."""
    model, found, seen, _ = shared_by_two()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 100
    batch = {"input_ids": torch.tensor([[5, *range(6, 26)]] * 2)}
    seen = Fitting(model, found, [batch], [batch], 10_000)
    tokens = seen.members(found, 0)[0].tokens
    metric = output_metric(model, found, [batch])[found[0].name].tokens
    assert_close(tokens, metric.sqrt(), rel=1e-5, what="tokens")
    whole, root = (float(each[0] / each.median()) for each in (metric, tokens))
    assert whole < 0.5 * root < 0.5  # the sink


@pytest.mark.parametrize("name", ["bert", "mixtral"])
@pytest.mark.parametrize("made", ["importance", "statistics", "fusion", "heads"])
def test_where_too_few_tokens_decide_the_ridge_is_a_strong_one(made: str, name: str) -> None:
    model, data = given(name)
    settings: dict[str, Any] = {"remove": 1} if made == "heads" else {"width": 0.5}
    method, seen = ("importance", fk.calibrate(model, data)) if made == "statistics" else (made, data)
    mixed, strong, weak = (
        [value for edit in plan.edits for value in edit.tensors().values()]
        for plan in (
            fk.plan(model, methods.build(method, refit=True, ridge=ridge, **settings), data=seen)
            for ridge in (None, 1.0, 0.1)
        )
    )
    assert mixed and all(map(torch.equal, mixed, strong))
    assert not all(map(torch.equal, mixed, weak))  # the control
