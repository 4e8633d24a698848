"""Refitted output layers and the published closed forms, against slow loops written from their formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import case_of
from tolerance import assert_close
from torch import Tensor, nn

import ffnkit as fk
from ffnkit import methods
from ffnkit.calibration.hooks import watch
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Narrowing
from ffnkit.methods.narrow.refitting import Refitting
from ffnkit.model.attention import attentions
from ffnkit.model.finding import ffns
from ffnkit.model.linear import bare_weight
from ffnkit.ops import subset
from ffnkit.ops.apart import held_out
from ffnkit.ops.curves import output_curve
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.refit import refit
from ffnkit.ops.ridge import factored, pulled
from ffnkit.ops.subset import leverage
from ffnkit.ops.surgeon import surgeon

ACT = {"bert": nn.functional.gelu, "llama": nn.functional.silu, "mixtral": nn.functional.silu}
Seen = dict[tuple[str, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def given(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A small model in float64, and a batch with padding where it is read with a mask."""
    model = FAMILIES[name].model().double()
    return model, case_of(name).batches(model)


def observed(model: Any, data: list[dict[str, Any]], *, fitted: bool = False) -> Seen:
    """By FFN and expert: inputs, hidden activations and outputs of the tokens that count, and how much each counts.

    ``fitted``: those alone that closed forms are fitted to, nine tenths of them.
    """
    parts: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}

    def note(ffn: Any, acts: Any) -> None:
        acts = acts.counted().apart()[0] if fitted else acts
        weights = torch.ones(len(acts.input)) if acts.weights is None else acts.weights
        on = weights > 0
        row = (acts.input[on], acts.hidden[on], acts.output[on], weights[on].double())
        parts.setdefault((ffn.name, acts.expert or 0), []).append(row)

    watch(model, data, ffns(model), note)
    return {key: tuple(map(torch.cat, zip(*rows, strict=True))) for key, rows in parts.items()}  # type: ignore[misc]


def hidden(neurons: Neurons, x: Tensor, name: str) -> Tensor:
    up = nn.functional.linear(x, neurons.up, neurons.up_bias)
    if neurons.gate is None:
        return ACT[name](up)
    return ACT[name](nn.functional.linear(x, neurons.gate, neurons.gate_bias)) * up


def least_squares(h: Tensor, y: Tensor, weights: Tensor, start: Tensor, bias: bool, ridge: float) -> Tensor:
    """min sum_t w_t ||D h_t + b - y_t||^2 + lambda ||D - start||^2 as one tall system."""
    share = (weights / weights.sum())[:, None]
    if bias:
        h, y = h - (share * h).sum(0), y - (share * y).sum(0)
    shift = ridge * (share * h.square()).sum(0).mean()
    left = torch.cat([share.sqrt() * h, shift.sqrt() * torch.eye(h.shape[1], dtype=h.dtype)])
    right = torch.cat([share.sqrt() * y, shift.sqrt() * start.T])
    return torch.linalg.lstsq(left, right).solution.T


def singles(neurons: Neurons) -> list[Neurons]:
    return [neurons.expert(e) for e in range(neurons.experts)] if neurons.experts else [neurons]


def after(model: Any, method: Any, data: Any) -> dict[str, Neurons]:
    copied = copy.deepcopy(model)
    fk.apply(copied, fk.plan(copied, method, data=data))
    return {ffn.name: ffn.read().map(lambda value: value.detach()) for ffn in ffns(copied)}


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
@pytest.mark.parametrize("method", ["magnitude", "importance", "fusion", "clustering", "sketch"])
def test_refit_is_the_pulled_regression_behind_any_narrowing(method: str, name: str) -> None:
    model, data = given(name)
    drafted, seen = after(model, methods.build(method, width=0.5), data), observed(model, data, fitted=True)
    made = after(model, methods.build(method, width=0.5, refit=True, ridge=0.05), data)
    for ffn, start in drafted.items():
        for number, (old, new) in enumerate(zip(singles(start), singles(made[ffn]), strict=True)):
            assert_close(new.up, old.up, rel=1e-6, what="up")
            if (ffn, number) not in seen:
                assert torch.equal(new.down, old.down)  # an expert that no token reached
                continue
            x, _, y, weights = seen[ffn, number]
            h = hidden(old, x, name)
            wanted = least_squares(h, y, weights, old.down, old.down_bias is not None, 0.05)
            assert_close(new.down, wanted, rel=1e-3, what=f"down of {ffn} {number}")
            if new.down_bias is not None:
                assert_close((h @ new.down.T + new.down_bias).mean(0), y.mean(0), rel=1e-4, what="bias")


def test_refit_on_what_compressed_layers_give() -> None:
    model, data = given("llama")
    method = methods.build("magnitude", width=0.5, refit=True, ridge=0.05, sequential=True)
    made = after(model, method, data)
    names = list(made)
    first = fk.apply(copy.deepcopy(model), fk.plan(model, methods.build("magnitude", width={names[0]: 0.5})))
    for ffn in ffns(first)[:1]:
        ffn.write(made[names[0]])
    x, h, y, weights = observed(first, data, fitted=True)[names[1], 0]
    drafted = after(first, methods.build("magnitude", width={names[1]: 0.5}), None)[names[1]]
    wanted = least_squares(hidden(drafted, x, "llama"), y, weights, drafted.down, False, 0.05)
    assert_close(made[names[1]].down, wanted, rel=1e-3, what="down of the second layer")


def test_fusion_keeps_its_factor_apart() -> None:
    model, data = given("bert")
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1, refit=True), data=data))
    plain = FAMILIES["bert"].model().double()
    fk.apply(plain, fk.plan(plain, fk.Fusion(width=0.5, restarts=1)))
    for one, two in zip(ffns(model), ffns(plain), strict=True):
        assert one.scale is not None and two.scale is not None and torch.equal(one.scale, two.scale)


def test_refit_asks_for_data_only_where_it_is_wanted() -> None:
    assert not methods.build("magnitude", width=0.5).needs_data
    assert methods.build("magnitude", width=0.5, refit=True).needs_data
    assert not methods.build("random", width=0.5).reads_weights
    assert methods.build("random", width=0.5, refit=True).reads_weights  # the plan fits these weights alone
    narrowing = {m.name for m in methods.METHODS if issubclass(m, Narrowing) and not issubclass(m, Refitting)}
    assert narrowing == {"calibrated-fusion", "modegpt", "obs", "svd", "unstructured"}  # closed forms, or no neurons go
    with pytest.raises(FfnkitError, match="no data are given"):
        fk.plan(FAMILIES["bert"].model(), methods.build("fusion", width=0.5, refit=True))
    assert fk.Fusion(0.5, "all", 3).seed == 3  # what is new takes no place of what was there


def test_an_activation_that_is_not_known_is_refused_for_new_neurons_only() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.full((1, 1), 3.0, dtype=torch.float64))  # no mere activation: it mixes

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.matrix * x) + x

    model, data = given("bert")
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = Odd()
    fk.plan(model, methods.build("magnitude", width=0.5, refit=True), data=data)
    with pytest.raises(FfnkitError, match="its activation is none that is known"):
        fk.plan(model, fk.Fusion(width=0.5, restarts=1, refit=True), data=data)


# --- formulas


def drawn(ff: int = 12, d: int = 5, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden activations (n, ff), their Gram matrix, an output layer (d, ff)."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, ff, generator=draw, dtype=torch.float64) @ torch.randn(
        ff, ff, generator=draw, dtype=torch.float64
    )
    return h, h.T @ h / tokens, torch.randn(d, ff, generator=draw, dtype=torch.float64)


def test_pulled_is_least_squares_and_bears_dependent_columns() -> None:
    h, _, down = drawn()
    y = h @ down.T
    some, start = h[:, :7], torch.randn(5, 7, dtype=torch.float64)
    wanted = least_squares(some, y, torch.ones(40, dtype=torch.float64), start, False, 0.3)
    assert_close(pulled(some.T @ some / 40, y.T @ some / 40, start, 0.3), wanted, rel=1e-9, what="D")
    twice = torch.cat([some, some], 1)
    found = pulled(twice.T @ twice / 40, y.T @ twice / 40, torch.zeros(5, 14, dtype=torch.float64), 0.0)
    best = torch.linalg.lstsq(some, y).solution
    assert_close(twice @ found.T, some @ best, rel=1e-5, what="outputs")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(bad: float) -> None:
    """A larger shift never helps: with one number of a matrix it went on for ever."""
    gram = torch.eye(4)
    gram[1, 1] = bad
    with pytest.raises(FfnkitError, match="NaN or infinite in float32"):
        factored(gram, 0.01)


def one_at_a_time(gram: Tensor, down: Tensor, width: int, shift: float) -> tuple[list[int], Tensor]:
    """Optimal brain surgeon with the inverse of what is left formed anew at each step."""
    left, weight = list(range(len(gram))), down.clone()
    while len(left) > width:
        square = gram[left][:, left] + shift * torch.eye(len(left), dtype=gram.dtype)
        inverse = torch.linalg.inv(square)
        losses = [float(weight[:, n].square().sum() / inverse[p, p]) for p, n in enumerate(left)]
        gone = losses.index(min(losses))
        weight[:, left] -= torch.outer(weight[:, left[gone]], inverse[gone]) / inverse[gone, gone]
        del left[gone]
    return left, weight[:, left]


def test_the_surgeon_takes_one_neuron_at_a_time() -> None:
    _, gram, down = drawn()
    shift = 0.02 * float(gram.diagonal().mean())
    kept, weight = surgeon(gram, down, 4, 0.02)
    wanted, fitted = one_at_a_time(gram, down, 4, shift)
    assert kept.tolist() == wanted
    assert_close(weight, fitted, rel=1e-9, what="output layer")
    ridge = shift / float(gram[kept][:, kept].diagonal().mean())
    assert_close(weight, refit(gram, down, kept, ridge)[0], rel=1e-8, what="least squares")
    scores = leverage(gram, 0.02, down)
    once, _ = surgeon(gram, down, 4, 0.02, block=8)
    assert once.tolist() == scores.topk(4).indices.sort().values.tolist() != wanted  # all by the first scores
    several, fit = surgeon(gram, down, 4, 0.02, block=3)
    ridge = shift / float(gram[several][:, several].diagonal().mean())
    assert_close(fit, refit(gram, down, several, ridge)[0], rel=1e-8, what="taken off in blocks")


def test_the_surgeon_takes_many_as_one_by_one() -> None:
    """What is left of the output layer is brought up to date for some together; for a block's end too."""
    draw = torch.Generator().manual_seed(0)
    h, mixing, down = (torch.randn(*shape, generator=draw).double() for shape in ((400, 120), (120, 120), (9, 120)))
    gram = (h @ mixing).T @ (h @ mixing) / 400
    for width in (120 - subset.DELAY, 120 - 2 * subset.DELAY - 9, 119, 120):
        kept, weight = surgeon(gram, down, width, 0.02)
        wanted, fitted = one_at_a_time(gram, down, width, 0.02 * float(gram.diagonal().mean()))
        assert kept.tolist() == wanted
        assert_close(weight, fitted, rel=1e-9, what="output layer")
    shift = 0.02 * gram.diagonal().mean()
    for block in (5, subset.DELAY + 1):
        kept, weight = surgeon(gram, down, 60, 0.02, block=block)
        ridge = float(shift / gram[kept][:, kept].diagonal().mean())
        assert_close(weight, refit(gram, down, kept, ridge)[0], rel=1e-8, what="taken off in blocks")


def test_what_the_surgeon_is_expected_to_take_grows_with_what_goes() -> None:
    ffn = ffns(FAMILIES["llama"].model())[0]
    some, more, most = (methods.build("obs", width=1).work(ffn, width, 100).double for width in (ffn.width - 1, 8, 1))
    assert 0 < some < more < most


CHOICES = {
    "obs": lambda gram, down, width: surgeon(gram, down, width, 0.01)[0],
    "obs by blocks": lambda gram, down, width: surgeon(gram, down, width, 0.01, block=5)[0],
    "greedy": lambda gram, down, width: subset.choose(gram, down, width, 0.01).order,
    "loss": lambda gram, down, width: subset.ranked(gram, 0.01, down, 1.0)[:width],
    "balanced": lambda gram, down, width: subset.ranked(gram, 0.01, down, 0.5)[:width],
    "without each": lambda gram, down, width: leverage(gram, 0.01, down).topk(width).indices,
    "leverage": lambda gram, down, width: leverage(gram, 0.01).topk(width).indices,
    "curve": lambda gram, down, width: output_curve(gram, down, 0.01).order[:width],
}


@pytest.mark.parametrize("choice", list(CHOICES))
def test_neurons_that_never_fire_go_first_whatever_their_columns(choice: str) -> None:
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(2000, 64, generator=draw).relu().double() * torch.logspace(-1.5, 0.5, 64)
    down, dead = torch.randn(32, 64, generator=draw).double(), torch.arange(0, 64, 4)
    down[:, dead] *= 4
    h[:, dead] = 0
    gram = h.T @ h / len(h)
    for width in (20, 48):
        kept = CHOICES[choice](gram, down, width)
        assert not torch.isin(kept, dead).any()
    assert_close(h[:, kept] @ down[:, kept].T, h @ down.T, rel=1e-12, what="outputs")
    more = [int(n) for n in CHOICES[choice](gram, down, 52) if n in dead]  # of those the largest columns stay
    if choice != "leverage":
        assert sorted(more) == sorted(dead[down[:, dead].square().sum(0).topk(4).indices].tolist())


@pytest.mark.parametrize("method", ["obs", "modegpt", "calibrated-fusion"])
def test_a_model_without_its_dead_neurons_is_as_it_was(method: str) -> None:
    model = FAMILIES["opt"].model()
    data = [FAMILIES["opt"].inputs(model, seed=seed) for seed in range(30)]
    for ffn in ffns(model):
        neurons = ffn.raw()
        with torch.no_grad():
            neurons.up_bias[::4] = -50.0  # type: ignore[index]
            neurons.down[:, ::4] *= 4
    more = {"refine": 0, "select": "loss"} if method == "calibrated-fusion" else {}
    narrow = copy.deepcopy(model)
    fk.apply(narrow, fk.plan(narrow, methods.build(method, width=0.75, **more), data=data))
    new = FAMILIES["opt"].inputs(model, seed=99)
    with torch.no_grad():
        assert_close(narrow(**new).logits, model(**new).logits, rel=1e-4, what="logits")


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
@pytest.mark.parametrize("method", ["modegpt", "obs"])
def test_closed_forms_of_a_model_are_those_of_the_formulas(method: str, name: str) -> None:
    model, data = given(name)
    made, seen = after(model, methods.build(method, width=0.5), data), observed(model, data, fitted=True)
    old = {ffn.name: ffn.raw().map(lambda value: value.detach()) for ffn in ffns(model)}
    for (ffn, number), (_, h, y, weights) in seen.items():
        one, new = singles(old[ffn])[number], singles(made[ffn])[number]
        share = (weights / weights.sum())[:, None]
        if one.down_bias is not None:
            h = h - (share * h).sum(0)
        gram = (share * h).T @ h
        mean, eye = gram.diagonal().mean(), torch.eye(len(gram), dtype=gram.dtype)
        if method == "obs":
            kept, down = one_at_a_time(gram, one.down, one.ff // 2, 0.01 * float(mean))
        else:
            scores = (gram @ torch.linalg.inv(gram + 0.01 * mean * eye)).diagonal()
            kept = scores.topk(one.ff // 2).indices.sort().values.tolist()
            own = one.down[:, kept]
            down = least_squares(h[:, kept], h @ one.down.T, weights, own, one.down_bias is not None, 0.01)
        assert torch.equal(new.up, one.up[kept])
        assert_close(new.down, down, rel=2e-3, what=f"down of {ffn} {number}")
        if new.down_bias is not None:
            whole = observed(model, data, fitted=True)[ffn, number][1][:, kept]
            assert_close((whole @ new.down.T + new.down_bias).mean(0), y.mean(0), rel=1e-3, what="mean output")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["modegpt", "obs"])
def test_few_tokens_a_neuron_are_told_once(method: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, data = given(name)
    many = [FAMILIES[name].inputs(model, seed=seed) for seed in range(40)]
    for batches, said in ((data[:1], 1), (many, 0)):
        for source in (batches, fk.calibrate(model, batches)):
            caplog.clear()
            fk.plan(model, methods.build(method, width=0.75), data=source)
            lines = [each.getMessage() for each in caplog.records if "noise" in each.getMessage()]
            assert len(lines) == said, lines
            assert all(line.startswith(f"{method}: ") and " for " in line for line in lines)


@pytest.mark.parametrize("name", ["bert", "gpt-oss"])
def test_flap_keeps_what_fluctuates_and_the_mean_output(name: str) -> None:
    model, data = given(name)
    made, seen = after(model, methods.build("flap", width=0.5), data), observed(model, data)
    for (ffn, number), (_, h, y, weights) in seen.items():
        old = singles(next(each for each in ffns(model) if each.name == ffn).raw())[number].map(lambda v: v.detach())
        new, share = singles(made[ffn])[number], (weights / weights.sum())[:, None]
        variance = (share * (h - (share * h).sum(0)).square()).sum(0)
        scores = [float(variance[i] * old.down[:, i].square().sum()) for i in range(old.ff)]
        kept = sorted(sorted(range(old.ff), key=lambda i: -scores[i])[: old.ff // 2])
        assert torch.equal(new.down, old.down[:, kept])
        assert new.down_bias is not None
        given_now = (share * (h[:, kept] @ new.down.T + new.down_bias)).sum(0)
        assert_close(given_now, (share * y).sum(0), rel=1e-4, what="mean output")


def test_flap_needs_an_output_bias() -> None:
    llama, data = given("llama")
    with pytest.raises(FfnkitError, match="no output bias"):
        fk.plan(llama, methods.build("flap", width=0.5), data=data)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_whitened_svd_loses_least_of_what_matrices_give(name: str) -> None:
    model, data = given(name)
    before, seen = after(model, methods.build("magnitude", width=1.0), None), observed(model, data)
    made = after(model, methods.build("svd", width=0.5, whiten=True), data)
    plain = after(model, methods.build("svd", width=0.5), None)
    for ffn, (x, h, _, _) in ((key[0], value) for key, value in seen.items()):
        for part in ("up", "gate", "down"):
            old, new = getattr(before[ffn], part), getattr(made[ffn], part)
            if old is None:
                continue
            given_to = h if part == "down" else x
            rank = int(torch.linalg.matrix_rank(new, rtol=1e-8))
            tail = torch.linalg.svdvals(given_to @ old.T)[rank:].square().sum()
            lost = (given_to @ (old - new).T).square().sum()
            assert_close(lost, tail, rel=1e-2, what=f"{part} of {ffn}")
            assert lost < (given_to @ (old - getattr(plain[ffn], part)).T).square().sum()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_heads_that_go_are_taken_over_by_those_that_stay(name: str) -> None:
    model, data = given(name)
    held: dict[str, tuple[Tensor, Tensor]] = {}
    found = attentions(model)
    hooks = [
        one.linear("o").register_forward_hook(
            lambda _, x, y, key=one.name: held.update({key: (x[0].flatten(0, 1), y.flatten(0, 1))})
        )
        for one in found
    ]
    with torch.no_grad():
        model(**{key: value for key, value in data[0].items() if key != "labels"})
    for hook in hooks:
        hook.remove()
    mask = data[0].get("attention_mask")
    on = slice(None) if mask is None else mask.flatten() > 0
    plan = fk.plan(model, fk.RemoveHeads(remove=1, refit=True, ridge=0.05), data=data)
    plain = fk.plan(model, fk.RemoveHeads(remove=1))
    cut, fitted = copy.deepcopy(model), copy.deepcopy(model)
    fk.apply(cut, plain)
    fk.apply(fitted, plan)
    for old, start, new in zip(found, attentions(cut), attentions(fitted), strict=True):
        z, y = (value.detach()[on] for value in held[old.name])
        z, y = (value[~held_out(len(z))] for value in (z, y))
        columns = old.columns()[old.members(plain.edits[found.index(old)].index)["q"]].flatten()  # type: ignore[attr-defined]
        first, bias = (bare_weight(each.linear("o")).detach() for each in (start, new)), new.linear("o").bias
        weight, got = first
        ones = torch.ones(len(z), dtype=torch.float64)
        wanted = least_squares(z[:, columns], y, ones, weight, bias is not None, 0.05)
        assert_close(got, wanted, rel=5e-3, what=f"output of {old.name}")
        assert float((got - weight).norm() / weight.norm()) > 1e-2
        if bias is not None:
            mean = (z[:, columns] @ got.T + bias.detach()).mean(0)
            assert_close(mean, y.mean(0), rel=1e-3, what="mean output")


def test_statistics_do_for_closed_forms_and_not_for_new_neurons() -> None:
    model, data = given("llama")
    stored = fk.calibrate(model, data)
    for method in ("modegpt", "obs"):
        made = methods.build(method, width=0.5)
        assert fk.plan(model, made, data=stored) == fk.plan(model, made, data=data)
        with pytest.raises(FfnkitError, match="statistics hold sums over hidden neurons"):
            fk.plan(model, methods.build(method, width=0.5, sequential=True), data=stored)
    in_turn = methods.build("magnitude", width=0.5, refit=True, sequential=True)
    refitting: list[Any] = [
        methods.build("sketch", width=0.5, refit=True),
        in_turn,
        fk.RemoveHeads(remove=1, refit=True),
    ]
    for made in (*refitting, methods.build("svd", width=0.5, whiten=True)):
        with pytest.raises(FfnkitError, match="statistics hold sums over hidden neurons"):
            fk.plan(model, made, data=stored)


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
@pytest.mark.parametrize("method", ["random", "magnitude", "importance"])
def test_refit_of_whole_neurons_from_statistics_is_the_regression_on_their_tokens(method: str, name: str) -> None:
    model, data = given(name)
    stored = fk.calibrate(model, data)
    drafted, seen = after(model, methods.build(method, width=0.5), stored), observed(model, data, fitted=True)
    every = observed(model, data)
    made = after(model, methods.build(method, width=0.5, refit=True, ridge=0.05), stored)
    moved = 0.0
    for ffn, start in drafted.items():
        for number, (old, new) in enumerate(zip(singles(start), singles(made[ffn]), strict=True)):
            assert_close(new.up, old.up, rel=1e-6, what="up")
            if (ffn, number) not in seen:
                assert torch.equal(new.down, old.down)  # an expert that no token reached
                continue
            x, _, y, weights = seen[ffn, number]
            bias = old.down_bias is not None
            wanted = least_squares(hidden(old, x, name), y, weights, old.down, bias, 0.05)
            assert_close(new.down, wanted, rel=1e-3, what=f"down of {ffn} {number}")
            if new.down_bias is not None:
                gives = hidden(old, x, name) @ new.down.T + new.down_bias
                assert_close(gives.mean(0), y.mean(0), rel=1e-4, what="bias")
            x, _, y, weights = every[ffn, number]
            other = least_squares(hidden(old, x, name), y, weights, old.down, bias, 0.05)
            moved = max(moved, float((new.down - other).norm() / other.norm()))
    assert moved > 2e-3  # the tokens that are kept apart would show
