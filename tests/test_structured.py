"""Heads and neurons that go by scores: removing equals zeroing, FLOPs targets, learnt coefficients."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from family import Family
from methods import crossed, slow_but
from tolerance import assert_close, assert_differs, relative_error
from torch import nn

import ffnkit as fk
from ffnkit.edits import SelectHeads, SelectNeurons, UpdateLinear
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.structured import StructuredPruning
from ffnkit.methods.drop.units import Units, cheapest_counts, uniform_counts
from ffnkit.methods.update.coefficients import places, with_coefficients
from ffnkit.model.attention import attentions
from ffnkit.model.finding import ffns
from ffnkit.model.inspect import body_flops, inspect
from ffnkit.nn.adapter_layer import AdapterLayer, adapter_layers
from ffnkit.nn.coefficients import Coefficients, set_l1
from ffnkit.nn.shrinking import shrink
from ffnkit.plans import Plan
from ffnkit.surgery.temporary import TemporaryPlan
from ffnkit.tune import tuners

NAMES = ("bert", "gpt2", "llama", "t5", "phi3")
MORE = ("albert", "mixtral", "gpt-neox", "deberta", "bart", "gpt-bigcode")
WAYS: dict[str, Any] = {
    "dsee": lambda sites: fk.DSEE(rank=2, nonzeros=9, targets=sites, support="magnitude"),
    "sparsegrad": lambda sites: fk.SparseGrad(count=20, basis="none", targets=sites),
    "sparsegrad-bases": lambda sites: fk.SparseGrad(count=20, targets=sites, batches=1),
}


def wide(name: str) -> Family:
    """The family with four heads, so that some can go and some stay."""
    family = FAMILIES[name]
    key = {"gpt2": "n_head", "t5": "num_heads", "bart": "encoder_attention_heads"}.get(name, "num_attention_heads")
    more: dict[str, Any] = {key: 4}
    if name in ("llama", "phi3"):
        more |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return dataclasses.replace(family, config_args=family.config_args | more)


def labelled(family: Family, model: nn.Module) -> list[dict[str, Any]]:
    inputs = family.inputs(model)
    if "labels" not in inputs:
        single = "Classification" in family.model_class
        inputs["labels"] = torch.tensor([0, 1]) if single else inputs.get("decoder_input_ids", inputs["input_ids"])
    return [inputs]


def updated(name: str, way: str, sites: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with updates that are not zero."""
    family = wide(name)
    model = family.model().to(dtype)
    data = labelled(family, model) if way == "sparsegrad-bases" or "sparsegrad" in way else None
    fk.apply(model, fk.plan(model, WAYS[way](sites), data=data))
    shake(model)
    return model


def shake(model: nn.Module, size: float = 0.3) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for name, parameter in layer.named_parameters(recurse=False):
                if name not in ("base", "bias"):
                    parameter += size * torch.randn(parameter.shape, generator=draw).to(parameter)


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy whose removed heads and neurons give nothing: folded, and their output columns are zero."""
    other = fk.fold(copy.deepcopy(model))
    heads = {attention.name: attention for attention in attentions(other)}
    neurons = {ffn.name: ffn for ffn in ffns(other)}
    with torch.no_grad():
        for edit in plan.edits:
            if isinstance(edit, SelectHeads):
                attention = heads[edit.target]
                gone = torch.tensor(sorted(set(range(attention.units)) - set(edit.index.tolist())))
                columns = attention.columns()[attention.members(gone)["q"]].flatten()
                weight = attention.linear("o").weight
                (weight if type(attention.linear("o")).__name__ == "Conv1D" else weight.T)[columns] = 0
            elif isinstance(edit, SelectNeurons):
                down = neurons[edit.target].raw().down
                index = edit.index.long()
                stay = torch.zeros(down.shape[:-2] + down.shape[-1:], dtype=torch.bool).scatter_(-1, index, True)
                down.masked_fill_(~stay.unsqueeze(-2), 0)
    return other


def compare(family: Family, first: nn.Module, second: nn.Module, rel: float) -> None:
    one, two = family.outputs(first), family.outputs(second)
    for key in two:
        assert_close(one[key], two[key], rel=rel, what=f"{family.name} {key}")


def differ(family: Family, first: nn.Module, second: nn.Module) -> None:
    one, two = family.outputs(first), family.outputs(second)
    assert any(relative_error(one[key], two[key]) > 1e-3 for key in two), family.name


# Removing equals zeroing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_removing_equals_zeroing(name: str) -> None:
    family = wide(name) if name in NAMES else FAMILIES[name]
    model = family.model().double()
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0.5, remove_neurons=0.3))
    assert {type(edit) for edit in plan.edits} == {SelectHeads, SelectNeurons}
    expected = zeroed(model, plan)
    before = copy.deepcopy(model)
    fk.apply(model, plan)
    compare(family, model, expected, 1e-12)
    differ(family, model, before)


@pytest.mark.parametrize("name", ["stories260K", "gpt_nano_sort"])
def test_pretrained_decoders_lose_heads_and_neurons_with_their_updates(
    name: str, models_dir: Path, tmp_path: Path
) -> None:
    model = fk.load(models_dir / name)
    ids = torch.arange(6).repeat(2, 1) % 3
    fk.apply(model, fk.plan(model, fk.DSEE(targets="all", rank=2, nonzeros=9)))
    shake(model)
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0.3, remove_neurons=0.25, by="both"))
    assert {type(edit) for edit in plan.edits} == {SelectHeads, SelectNeurons}
    expected, before = zeroed(model, plan)(ids).logits, model(ids).logits
    fk.apply(model, plan)
    assert_close(model(ids).logits, expected, rel=1e-5, what=name)  # float32
    assert relative_error(before, expected) > 1e-3
    fk.save(fk.fold(model), tmp_path / name)
    again = fk.load(tmp_path / name)
    assert_close(again(ids).logits, expected, rel=1e-5, what=f"{name} reloaded")
    assert again.num_parameters() < fk.load(models_dir / name).num_parameters()


@pytest.mark.parametrize(("name", "way", "sites"), crossed(["bert", "gpt2", "llama", "phi3"], WAYS, ["all", "ffn"]))
def test_updates_lose_what_their_weights_lose(name: str, way: str, sites: str) -> None:
    family = wide(name)
    model = updated(name, way, sites)
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0.5, remove_neurons=0.3, by="both"))
    expected, whole = zeroed(model, plan), copy.deepcopy(model)
    count = len(adapter_layers(model))
    fk.apply(model, plan)
    compare(family, model, expected, 1e-11)
    differ(family, model, whole)
    assert len(adapter_layers(model)) == count
    loss = sum(value.square().mean() for value in family.outputs(model, grad=True).values())
    loss.backward()  # what is left trains on
    assert any(p.grad is not None and bool(p.grad.any()) for p in fk.trainable_parameters(model))
    compare(family, fk.fold(copy.deepcopy(model)), model, 1e-11)


def test_frozen_ffns_that_lost_neurons_train_again_after_folding() -> None:
    model = updated("bert", "dsee", "qv")
    fk.apply(model, fk.plan(model, fk.StructuredPruning()))
    assert not any(p.requires_grad for ffn in ffns(model) for p in ffn.parameters())
    fk.fold(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_fits_the_model_without_its_neurons(tmp_path: Path) -> None:
    model = updated("llama", "dsee", "all", torch.float32)
    plan = fk.plan(model, fk.StructuredPruning(by="update"))
    base = wide("llama").model()
    fk.apply(model, plan)
    fk.save_adapter(model, tmp_path)
    fk.apply(base, fk.plan(base, fk.StructuredPruning()))
    with pytest.raises(FfnkitError, match="another one"):  # the control: other heads and neurons went
        fk.load_adapter(base, tmp_path)
    base = wide("llama").model()
    fk.load_adapter(fk.apply(base, plan), tmp_path)
    compare(wide("llama"), base, model, 1e-6)
    biased = fk.remove_adapter(model)
    compare(wide("llama"), biased, fk.remove_adapter(base), 1e-6)


def test_biases_that_trained_come_back_without_the_neurons_that_went() -> None:
    model = wide("bert").model()
    before = copy.deepcopy(model)
    fk.apply(model, fk.plan(model, fk.DSEE(rank=2, nonzeros=4, targets="ffn", modules_to_train=("head", "biases"))))
    with torch.no_grad():
        for p in fk.trainable_parameters(model):
            p += 0.1
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0, by="weight"))
    fk.apply(model, plan)
    fk.remove_adapter(model)
    fk.apply(before, dataclasses.replace(plan, weights={}))
    compare(wide("bert"), model, before, 1e-6)


def test_edits_on_trial_leave_updates_as_they_were() -> None:
    family, model = wide("gpt2"), updated("gpt2", "dsee", "all")
    before = family.outputs(model)
    plan = fk.plan(model, fk.StructuredPruning(by="update"))
    with TemporaryPlan(model, plan.edits):
        differ(family, model, updated("gpt2", "dsee", "all"))
    after = family.outputs(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [layer.features for layer in adapter_layers(model).values()] == [
        layer.features for layer in adapter_layers(updated("gpt2", "dsee", "all")).values()
    ]


# Checkpoints and plans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spread"), crossed(NAMES, ["uniform", "budget"]))
def test_plans_and_checkpoints_come_back_equal(name: str, spread: str, tmp_path: Path) -> None:
    family = wide(name)
    model = family.model()
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0.5, remove_neurons=0.3, spread=spread, multiple=1))  # type: ignore[arg-type]
    assert plan == fk.plan(family.model(), StructuredPruning(**plan.settings))
    plan.save(tmp_path / "plan.safetensors")
    again = fk.apply(family.model(), Plan.load(tmp_path / "plan.safetensors"))
    fk.apply(model, plan)
    compare(family, again, model, 0.0)
    fk.save(model, tmp_path / "compact")
    loaded = fk.load(tmp_path / "compact").eval()
    compare(family, loaded, model, 1e-6)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    assert inspect(loaded).flops_per_token == inspect(model).flops_per_token
    fk.export(model, tmp_path / "standard")


# FLOPs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", ["uniform", "budget"])
@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_the_target_is_met_and_never_missed(name: str, spread: str) -> None:
    family = wide(name) if name in NAMES else FAMILIES[name]
    model = family.model()
    whole = body_flops(model)
    method = fk.StructuredPruning(flops=0.8, spread=spread, multiple=1)  # type: ignore[arg-type]
    plan = fk.plan(model, method)
    each = {ffn.name: ffn.flops_per_token / ffn.width for ffn in ffns(model)}
    fk.apply(model, plan)
    after = body_flops(model)
    assert plan.report["flops"] == {"before": whole, "after": pytest.approx(after)}
    assert after <= 0.8 * whole
    runs = 3 if name == "albert" else 1
    step = runs * (max(each.values()) if spread == "budget" else sum(each.values()))
    assert 0.8 * whole - after <= step + 1e-6
    assert all(attention.units >= 1 for attention in attentions(model)) and all(ffn.width >= 1 for ffn in ffns(model))


def test_the_body_is_the_model_without_its_ends() -> None:
    """BERT: 2 x (4 d d + 2 d ff) a layer; a quarter of heads and neurons is a quarter of it."""
    model = wide("bert").model()
    assert body_flops(model) == 3 * 2 * (4 * 16 * 16 + 2 * 16 * 40)
    assert body_flops(model) < inspect(model).flops_per_token  # pooler and classifier
    fk.apply(model, fk.plan(model, fk.StructuredPruning()))
    assert body_flops(model) == 0.75 * 3 * 2 * (4 * 16 * 16 + 2 * 16 * 40)
    gpt2 = wide("gpt2").model()  # the output embeddings are shared with those of the input
    assert body_flops(gpt2) == 3 * 2 * (4 * 16 * 16 + 2 * 16 * 40)


def toy() -> list[Units]:
    draw = torch.Generator().manual_seed(3)

    def scores(count: int, size: float) -> torch.Tensor:
        return size * torch.rand(1, count, generator=draw, dtype=torch.float64)

    return [
        Units("a", scores(3, 1.0), 40.0),
        Units("b", scores(6, 100.0), 10.0, step=2, neurons=True),
        Units("c", scores(4, 0.01), 40.0, relative=False),
        Units("d", scores(5, 1.0), 7.0, neurons=True),
    ]


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7, 0.77, 0.9, 0.97])
def test_the_cheapest_choice_is_brute_forces(share: float) -> None:
    units = toy()
    budget = share * sum(each.count * each.flops for each in units)
    kept = cheapest_counts(units, budget)

    def price(counts: Any) -> float:
        """What goes, score by score: relative to its layer's mean, times its FLOPs."""
        total = 0.0
        for each, count in zip(units, counts, strict=True):
            values = sorted(each.scores[0].tolist())
            mean = sum(values) / len(values) if each.relative else 1.0
            total += sum(value / mean * each.flops for value in values[: each.count - count])
        return total

    fitting = [
        counts
        for counts in itertools.product(*(each.options for each in units))
        if sum(c * each.flops for c, each in zip(counts, units, strict=True)) <= budget
    ]
    assert tuple(kept) in fitting
    assert price(kept) == pytest.approx(min(map(price, fitting)))
    left = budget - sum(count * each.flops for count, each in zip(kept, units, strict=True))
    for each, count in zip(units, kept, strict=True):  # nothing more would fit
        assert (
            count == each.count or each.options[each.options.index(count) + 1] * each.flops - count * each.flops > left
        )


def test_one_layer_of_large_weights_does_not_decide() -> None:
    units = toy()
    scaled = [dataclasses.replace(each, scores=each.scores * 1000) if i == 1 else each for i, each in enumerate(units)]
    budget = 0.6 * sum(each.count * each.flops for each in units)
    assert cheapest_counts(scaled, budget) == cheapest_counts(units, budget)
    absolute = [dataclasses.replace(each, relative=False) for each in scaled]  # the control
    budgets = [share * budget for share in (0.7, 0.8, 1.0, 1.2)]
    assert any(cheapest_counts(absolute, each) != cheapest_counts(units, each) for each in budgets)


def test_uniform_counts_hold_one_share() -> None:
    units = [Units(str(i), torch.ones(1, 40, dtype=torch.float64), 3.0, neurons=True) for i in range(4)]
    kept = uniform_counts(units, lambda times: [each.left(min(0.25 * times, 1.0)) for each in units], 4 * 3 * 17.5)
    assert kept == [17] * 4


def test_a_budget_takes_more_where_scores_are_uneven() -> None:
    model = wide("bert").model()
    first = ffns(model)[0]
    with torch.no_grad():  # half of its neurons are all but idle
        first.raw().up[:20] *= 1e-3
        first.raw().down[:, :20] *= 1e-3
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0, remove_neurons=0.25, spread="budget", multiple=1))
    kept = {edit.target: edit.width for edit in plan.edits if isinstance(edit, SelectNeurons)}
    assert kept[first.name] <= 20 < min(width for name, width in kept.items() if name != first.name)
    equal = fk.plan(model, fk.StructuredPruning(remove_heads=0, remove_neurons=0.25))
    assert plan.report["flops"]["after"] == equal.report["flops"]["after"]


# Scores --------------------------------------------------------------------------------------------------------------


def lowest(scores: torch.Tensor, kept: int) -> list[int]:
    return sorted(scores.argsort(descending=True, stable=True)[:kept].tolist())


def test_scores_against_loops() -> None:
    family, model = wide("llama"), updated("llama", "dsee", "all")
    ffn, attention = ffns(model)[0], attentions(model)[0]
    data = [family.inputs(model)]
    held: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: held.update({name: args[0].detach()}))
        for name, linear in (("h", ffn.linear("down")), ("o", attention.linear("o")))
    ]
    family.outputs(model, data[0])
    for hook in hooks:
        hook.remove()
    mask = data[0].get("attention_mask", torch.ones(held["h"].shape[:2])).bool()
    up, gate, down = (ffn.linear(site) for site in ("up", "gate", "down"))
    query, value, out = (attention.linear(role) for role in ("q", "v", "o"))
    size, pair = attention.head_dim, attention.heads // attention.units

    def neuron(i: int, read: Any) -> float:
        rows = read(up)[i].abs().sum() + read(gate)[i].abs().sum()
        return float(rows + read(down)[:, i].abs().sum())

    def head(u: int, read: Any) -> float:
        queries = read(query)[u * pair * size : (u + 1) * pair * size].abs().sum()
        return float(queries + read(value)[u * size : (u + 1) * size].abs().sum())

    reads: dict[str, Any] = {"weight": lambda m: m.base, "update": lambda m: m.update(), "both": lambda m: m.weight}
    for by, read in reads.items():
        plan = fk.plan(model, fk.StructuredPruning(remove_heads=0.5, remove_neurons=0.3, by=by, layers="0"))  # type: ignore[arg-type]
        expected = torch.tensor([neuron(i, read) for i in range(ffn.width)])
        assert index_of(plan, SelectNeurons) == lowest(expected, 17)
        assert index_of(plan, SelectHeads) == lowest(torch.tensor([head(u, read) for u in range(attention.units)]), 1)
    hidden, given = held["h"][mask], held["o"][mask].view(-1, attention.units, pair * size)
    neurons = hidden.square().mean(0).sqrt() * down.weight.norm(dim=0)
    columns = out.weight.view(out.weight.shape[0], attention.units, -1).permute(1, 0, 2).flatten(1).norm(dim=1)
    heads = given.square().sum(-1).mean(0).sqrt() * columns
    plan = fk.plan(
        model, fk.StructuredPruning(remove_heads=0.5, remove_neurons=0.3, by="activation", layers="0"), data=data
    )
    assert index_of(plan, SelectNeurons) == lowest(neurons, 17) and index_of(plan, SelectHeads) == lowest(heads, 1)
    with pytest.raises(FfnkitError, match="no data are given"):
        fk.plan(model, fk.StructuredPruning(by="activation"))
    one = fk.plan(model, fk.RemoveHeads(remove=0.5, by="activation", layers="0"), data=iter(data))
    assert index_of(one, SelectHeads) == index_of(plan, SelectHeads)


def index_of(plan: Plan, kind: type) -> list[int]:
    return next(edit.index.tolist() for edit in plan.edits if isinstance(edit, kind))  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["weight", "both", "activation", "random"])
def test_experts_keep_neurons_of_their_own(by: Any) -> None:
    family = FAMILIES["mixtral"]
    model = family.model()
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0, by=by), data=[family.inputs(model)])
    index = next(edit.index for edit in plan.edits if isinstance(edit, SelectNeurons))
    assert index.shape[0] == ffns(model)[0].experts and len({tuple(row.tolist()) for row in index}) > 1
    fk.apply(model, plan)
    assert {ffn.width for ffn in ffns(model)} == {18}


def test_what_cannot_be_scored_is_said() -> None:
    model = updated("bert", "dsee", "qv")
    with pytest.raises(FfnkitError, match="none of its linears carries an update"):
        fk.plan(model, fk.StructuredPruning(by="update"))
    fk.plan(model, fk.StructuredPruning(by="update", neurons_by="both"))
    fk.plan(model, fk.StructuredPruning(by="update", remove_neurons=0))
    with pytest.raises(FfnkitError, match="no coefficients"):
        fk.plan(model, fk.StructuredPruning(by="coefficients"))
    fresh = wide("bert").model()
    fk.apply(fresh, fk.plan(fresh, fk.DSEE(targets="all", rank=2)))
    with pytest.raises(FfnkitError, match="all zero"):
        fk.plan(fresh, fk.StructuredPruning(by="update"))
    wrongs: list[dict[str, Any]] = [
        {"by": "size"},
        {"spread": "even"},
        {"remove_heads": 1.0},
        {"flops": 1.5},
        {"remove_heads": 0, "remove_neurons": 0},
        {"remove_heads": 1, "flops": 0.5},
        {"multiple": 0},
        {"flops": 0.01},
        {"remove_heads": 4},
    ]
    for wrong in wrongs:
        with pytest.raises(FfnkitError):
            fk.plan(wide("bert").model(), StructuredPruning(**wrong))
    with pytest.raises(FfnkitError, match="norm"):
        fk.plan(FAMILIES["olmo2"].model(), fk.StructuredPruning())


# Coefficients --------------------------------------------------------------------------------------------------------


def learning(name: str, way: str = "dsee", sites: str = "qv", l1: float = 0.1, **more: Any) -> nn.Module:
    family = wide(name)
    model = family.model().double()
    data = labelled(family, model) if "sparsegrad" in way else None
    plan = with_coefficients(model, fk.plan(model, WAYS[way](sites), data=data), l1)
    return fk.apply(model, plan)


def coefficients(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: layer.coefficients for name, layer in adapter_layers(model).items() if layer.coefficients is not None}


@pytest.mark.parametrize(("name", "sites"), crossed([*NAMES, "albert"], ["qv", "ffn", "all"]))
def test_coefficients_stand_before_every_output(name: str, sites: str) -> None:
    family = wide(name)
    model = learning(name, targets=sites)
    compare(family, model, family.model().double(), 1e-12)  # all are 1
    found = coefficients(model)
    expected = {attention.name: attention.units for attention in attentions(model)}
    expected |= {ffn.name: ffn.width for ffn in ffns(model)}
    assert sorted(map(len, found.values())) == sorted(expected.values())
    assert all(p.requires_grad and p.dtype == torch.float64 for p in found.values())
    shake(model)
    differ(family, model, family.model().double())
    folded = fk.fold(copy.deepcopy(model))
    assert not adapter_layers(folded) and all(type(m).__name__ != "Coefficients" for m in folded.modules())
    compare(family, folded, model, 1e-12)
    removed = fk.remove_adapter(model)
    compare(family, removed, family.model().double(), 0.0)


@pytest.mark.parametrize("way", ["dsee", "sparsegrad"])
def test_gradients_and_steps_are_those_of_a_slow_loop(way: str) -> None:
    family = wide("llama")
    model = learning("llama", way, "all", l1=0.3)
    shake(model)
    slow = copy.deepcopy(model)
    values = {
        name: layer.coefficients.detach().clone()
        for name, layer in adapter_layers(slow).items()
        if layer.coefficients is not None
    }
    for layer in adapter_layers(slow).values():  # the same product, inputs multiplied by hand
        layer.coefficients = None
    given = {name: value.clone().requires_grad_() for name, value in values.items()}

    def multiply(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> Any:
            x, c = args[0], given[name]
            each = x.shape[-1] // len(c)
            parts = [x[..., u * each : (u + 1) * each] * c[u] for u in range(len(c))]
            return (torch.cat(parts, -1),)

        return hook

    for name in given:
        slow.get_submodule(name).register_forward_pre_hook(multiply(name))
    for one in (model, slow):
        sum(value.square().mean() for value in family.outputs(one, grad=True).values()).backward()
    rate = 0.01
    wanted = {}
    for name, c in given.items():
        assert c.grad is not None
        mine = coefficients(model)[name].grad
        assert mine is not None
        assert_close(mine, c.grad, rel=1e-10, what=name)
        steps = []
        for before, gradient in zip(c.tolist(), c.grad.tolist(), strict=True):
            moved = before - rate * gradient
            by = rate * 0.3
            steps.append(moved - by if moved > by else moved + by if moved < -by else 0.0)
        wanted[name] = torch.tensor(steps, dtype=torch.float64)
    torch.optim.SGD(fk.trainable_parameters(model), lr=rate).step()
    for name, value in coefficients(model).items():
        assert_close(value, wanted[name], rel=1e-10, what=name)
        assert_differs(value, given[name] - rate * given[name].grad, rel=1e-6)  # the control: a step without l1


def test_the_soft_threshold() -> None:
    values = torch.tensor([1.0, -1.0, 0.05, -0.05, 0.0])
    shrink(values, 0.1)
    assert_close(values, torch.tensor([0.9, -0.9, 0.0, 0.0, 0.0]), rel=1e-6)


def test_coefficients_shrink_once_a_step_and_only_where_they_should() -> None:
    model = learning("bert", l1=1.0)
    other = copy.deepcopy(model)  # copies are seen to by themselves
    frozen = learning("bert", l1=0.0)
    family = wide("bert")
    batch = labelled(family, model)[0]
    for one in (model, other, frozen):
        optimizer = torch.optim.SGD(fk.trainable_parameters(one), lr=0.01)
        for _ in range(3):  # three micro-batches, one step
            (0 * one(**batch).loss).backward()
        if one is not other:
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # no gradient: nothing moves
    assert all(torch.allclose(c, torch.full_like(c, 0.99)) for c in coefficients(model).values())
    assert all(torch.equal(c, torch.ones_like(c)) for c in coefficients(other).values())
    assert all(torch.equal(c, torch.ones_like(c)) for c in coefficients(frozen).values())
    assert set_l1(model, 0.0) == len(coefficients(model)) > 0
    optimizer = torch.optim.SGD(fk.trainable_parameters(model), lr=0.01)
    (0 * model(**batch).loss).backward()
    optimizer.step()
    assert all(torch.allclose(c, torch.full_like(c, 0.99)) for c in coefficients(model).values())


@pytest.mark.parametrize("sites", ["qv", "all"])
@pytest.mark.parametrize("name", slow_but(NAMES[:2], NAMES))
def test_the_smallest_coefficients_go(name: str, sites: str, tmp_path: Path) -> None:
    family, model = wide(name), learning(name, targets=sites)
    shake(model)
    ffn, attention = ffns(model)[0], attentions(model)[0]
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0.5, remove_neurons=0.3, by="coefficients"))
    value = ffn.linear("down").coefficients.detach().abs()  # type: ignore[union-attr,operator]
    edits = {edit.target: edit for edit in plan.edits}
    assert edits[ffn.name].index.tolist() == lowest(value, edits[ffn.name].width)  # type: ignore[attr-defined]
    units = attention.linear("o").coefficients.detach().abs()
    assert edits[attention.name].index.tolist() == lowest(units, attention.units // 2)  # type: ignore[attr-defined]
    expected = zeroed(model, plan)
    fk.apply(model, plan)
    compare(family, model, expected, 1e-11)
    fk.save_adapter(model, tmp_path / "adapter")
    base = family.model().double()
    bare = copy.deepcopy(model)
    fk.remove_adapter(bare)
    fk.apply(base, plan)
    compare(family, bare, base, 1e-12)
    fk.load_adapter(base, tmp_path / "adapter")
    compare(family, base, model, 1e-12)
    assert all(layer.l1 == 0.1 for layer in adapter_layers(base).values() if layer.coefficients is not None)
    compare(family, fk.fold(base), expected, 1e-11)


def test_a_budget_by_coefficients_takes_them_as_they_are() -> None:
    model = learning("bert")
    layer = ffns(model)[1].linear("down")
    assert isinstance(layer, Coefficients)
    with torch.no_grad():
        layer.coefficients[:] = 0.5  # type: ignore[index]
    plan = fk.plan(model, fk.StructuredPruning(flops=0.9, spread="budget", by="coefficients", multiple=1))
    assert [edit.target for edit in plan.edits] == [ffns(model)[1].name]
    assert fk.plan(model, fk.StructuredPruning(flops=0.9, spread="budget", multiple=1)).edits[1:]  # the control


def test_pruning_of_weights_sees_no_update_in_coefficients() -> None:
    model = learning("bert")
    shake(model)
    plan = fk.plan(model, fk.Prune(sparsity=0.5, mode="ABS"))
    masks = {edit.target: edit for edit in plan.edits}
    down = next(name for name, count in places(wide("bert").model()) if count == 40)
    assert 0.2 < masks[down].kept / 640 < 0.8  # type: ignore[attr-defined]


def test_where_coefficients_cannot_be() -> None:
    model = wide("bert").model()
    plan = fk.plan(model, fk.DSEE(rank=2, nonzeros=0))
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    with pytest.raises(FfnkitError, match="edited already"):
        with_coefficients(model, plan, 0.1)
    model = FAMILIES["mixtral"].model()  # experts in one parameter have none; heads have
    made = with_coefficients(model, fk.plan(model, fk.DSEE(rank=2, nonzeros=0)), 0.1)
    assert sum(edit.layer == "coefficients" for edit in made.edits if isinstance(edit, UpdateLinear)) == 2
    with pytest.raises(FfnkitError, match="coefficients are given"):
        tuners.get({"name": "meprop", "of": "outputs", "coefficients": 0.1}).prepare(wide("bert").model())


@pytest.mark.parametrize("name", ["dsee", "sparsegrad", "mask"])
def test_the_tuners_setting(name: str, tmp_path: Path) -> None:
    family = wide("bert")
    model = family.model()
    settings = {"name": name, "coefficients": 0.2, "targets": "ffn"} | (
        {"basis": "none"} if name == "sparsegrad" else {}
    )
    tuner = tuners.get(settings)
    assert tuner.model_dump()["coefficients"] == 0.2
    assert "coefficients" not in tuners.get(name).model_dump()  # facts of runs without it stay as they were
    if name == "sparsegrad":
        tuner.prepare(model, labelled(family, model))
    else:
        tuner.prepare(model)
    assert len(coefficients(model)) == 6
    shake(model)
    before = family.outputs(model)
    assert len(coefficients(tuners.finish(model, tuner, merge=False))) == 6
    plain_model = tuner.finish(model)
    assert not any(isinstance(m, AdapterLayer) for m in plain_model.modules())
    assert_close(family.outputs(plain_model)["logits"], before["logits"], rel=1e-5)


def test_a_state_dict_holds_them() -> None:
    model = learning("gpt2", targets="all")
    shake(model)
    other = learning("gpt2", targets="all")
    differ(wide("gpt2"), other, model)
    other.load_state_dict(model.state_dict())
    compare(wide("gpt2"), other, model, 1e-12)
