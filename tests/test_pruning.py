"""Single weights become zero and stay zero: choices against slow loops, masks through training, saving and merging."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from families import FAMILIES, NAMES
from methods import slow_but
from test_contract import compare, differ, same, snapshot
from tolerance import assert_close, relative_error
from torch import Tensor, nn
from torch.nn.utils import prune

import ffnkit as fk
from ffnkit.edits import Mask
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.pruning import Mode
from ffnkit.methods.drop.weights import prunable
from ffnkit.model.finding import ffns
from ffnkit.model.linear import is_transposed, stored_weight
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import oriented
from ffnkit.ops.masks import lowest, lowest_of_groups, lowest_of_rows, read_pattern
from ffnkit.report.sparsity import merge_costs, sparsity
from ffnkit.surgery.temporary import TemporaryPlan
from ffnkit.tune import tuners

QV = r".*\.(query|value)"
KINDS = ("bert", "gpt2", "llama", "phi3", "t5", "mixtral", "llama4", "albert")


def updated(name: str = "bert", sites: str = QV, seed: int = 0) -> Any:
    """A model with dense updates on some linears, all numbers drawn."""
    model = FAMILIES[name].model()
    fk.apply(model, fk.plan(model, fk.SparseGrad(density=1.0, basis="none", choose="random", targets=sites)))
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        layer.values.data.copy_(0.05 * torch.randn(layer.values.shape, generator=generator))
    return model


def labelled(name: str = "bert", count: int = 2) -> list[dict[str, Tensor]]:
    family = FAMILIES[name]
    model = family.model()
    return [{**family.inputs(model, seed=i), "labels": torch.tensor([0, 1])} for i in range(count)]


def weights(model: nn.Module, sites: str = "all") -> dict[str, Tensor]:
    return {each.label: each.stored.detach().clone() for each in prunable(model, sites)}


def zeros(tensors: dict[str, Tensor]) -> int:
    return sum(int((value == 0).sum()) for value in tensors.values())


def masks(plan: Any) -> dict[str, Tensor]:
    return {edit.target: edit.mask() for edit in plan.edits if not edit.site}


# Choosing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_the_lowest_of_many_tensors_are_those_of_a_stable_sort(dtype: torch.dtype, ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((7, 5), (3, 4, 5), (100, 10), (1,))]
    given = [value.round() for value in given] if ties else given
    given[0][0, :3] = torch.tensor([float("-inf"), -0.0, 0.0])
    flat = torch.cat([value.flatten() for value in given])
    order = torch.sort(flat, stable=True).indices
    for count in (0, 1, 17, 500, 548, len(flat)):
        expected = torch.ones(len(flat), dtype=torch.bool)
        expected[order[:count]] = False
        found = [mask for mask in lowest(lambda: given, count)]
        assert [mask.shape for mask in found] == [value.shape for value in given]
        assert torch.equal(torch.cat([mask.flatten() for mask in found]), expected)
    with pytest.raises(FfnkitError, match="there are"):
        list(lowest(lambda: given, len(flat) + 1))
    given[1][0, 0, 0] = float("nan")
    with pytest.raises(FfnkitError, match="NaN"):
        list(lowest(lambda: given, 3))


def test_rows_and_groups_are_those_of_loops() -> None:
    scores = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for mask, size, gone in ((lowest_of_rows(scores, 5), 16, 5), (lowest_of_groups(scores, 3, 4), 4, 1)):
        for row, start in itertools.product(range(6), range(0, 16, size)):
            part = scores[row, start : start + size].tolist()
            lost = sorted(range(size), key=lambda i, part=part: (part[i], i))[:gone]
            assert [not bool(mask[row, start + i]) for i in range(size)] == [i in lost for i in range(size)]
    assert read_pattern("2:4") == (2, 4)
    assert fk.Prune(pattern=yaml.safe_load("2:4")).pattern == "2:4"
    assert fk.Prune(pattern=yaml.safe_load("4:8")).pattern == "4:8"
    for wrong in ("4:2", "2", "0:4", "2-4", "2:2"):
        with pytest.raises(FfnkitError, match="N:M"):
            read_pattern(wrong)


MODES = [mode for mode in get_args(Mode) if mode != "random"]


def tuned_dsee(name: str) -> Any:
    """A model in float64 with DSEE on query and value, as if tuned; a fifth of S2 is there, as large as W and U V."""
    model = FAMILIES[name].model().double()
    fk.apply(model, fk.plan(model, fk.DSEE(rank=2, alpha=4, density=0.2, support="random")))
    generator = torch.Generator().manual_seed(0)
    for layer in adapter_layers(model).values():
        for part in (layer.up, layer.down, layer.values):
            part.data.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
    return model


def of_released_code(mode: str, layer: Any) -> Tensor:
    """What the released code puts into a weight's place before it calls torch's pruning, (out, in)."""
    s, product, sparse = layer.alpha / layer.rank, torch.zeros(layer.features).double(), torch.zeros(layer.features)
    product[slice(None) if layer.rows is None else layer.rows.long()] = layer.up @ layer.down
    sparse = sparse.double().view(-1).index_put((layer.index.long(),), layer.values).view(layer.features)
    w = oriented(layer.base, layer.transposed)
    return {
        "W": w, "AB": product * s, "ABS": (product + sparse) * s, "WAB": w + product * s,
        "WABS": w + (product + sparse) * s, "NAB": 1 / product, "NABS": 1 / (product + sparse) / s,
    }[mode].detach().contiguous()  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_modes_are_those_of_torch_on_the_released_factors(mode: str, name: str) -> None:
    model = tuned_dsee(name)
    layers = adapter_layers(model)
    plain = {name: nn.Linear(*layer.features[::-1], bias=False) for name, layer in layers.items()}
    for key, linear in plain.items():
        linear.weight = nn.Parameter(of_released_code(mode, layers[key]))
    pairs = [(linear, "weight") for linear in plain.values()]
    share = 0.3 if mode in ("W", "WAB", "WABS", "NAB", "NABS") else 0.7  # beyond rows that are all zero in a key
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=share)
    expected = {name: linear.weight_mask.bool() for name, linear in plain.items()}

    def chosen(by: str) -> dict[str, Tensor]:
        return masks(fk.plan(model, fk.Prune(sparsity=0.0, adapted_sparsity=share, mode=by)))

    found = chosen(mode)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for other in set(MODES) - {mode}:  # the control: each rule chooses others, so S2 and W are seen where they count
        assert any(not torch.equal(mask, found[name]) for name, mask in chosen(other).items()), other


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_by_matrix_and_by_row(mode: str, scope: str) -> None:
    model = tuned_dsee("bert")
    found = masks(fk.plan(model, fk.Prune(sparsity=0.0, adapted_sparsity=0.3, mode=mode, scope=scope)))
    for name, layer in adapter_layers(model).items():
        scores = of_released_code(mode, layer).abs()
        for part, mask in [(scores, found[name])] if scope == "layer" else zip(scores, found[name], strict=True):
            gone = part.flatten().sort().indices[: round(0.3 * part.numel())]
            assert set(gone.tolist()) == set((~mask).flatten().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("mode", ["AB", "NAB"])
def test_modes_of_the_low_rank_part_want_one(mode: str) -> None:
    with pytest.raises(FfnkitError, match="low-rank parts .* all zero"):
        fk.plan(updated(), fk.Prune(mode=mode))
    model = updated()  # without U V a mode that sees W too is that of W alone
    found, alone = (masks(fk.plan(model, fk.Prune(mode=each))) for each in ("WAB", "W"))
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_two_pools_have_exact_counts_each() -> None:
    model = updated()
    before = snapshot(model)
    for ratio, other in ((0.5, None), (0.2, 0.7), (0.377, 0.0), (0.0, 0.123)):
        plan = fk.plan(model, fk.Prune(sparsity=ratio, adapted_sparsity=other))
        found = masks(plan)
        second = ratio if other is None else other
        for share, carrying in ((ratio, False), (second, True)):
            names = [each.name for each in prunable(model, "all") if each.adapted == carrying]
            total = sum(weights(model)[name].numel() for name in names)
            assert sum(int((~found[name]).sum()) for name in names if name in found) == round(share * total)
        assert fk.plan(model, fk.Prune(sparsity=ratio, adapted_sparsity=other)) == plan
    assert same(snapshot(model), before), "planning changes nothing"
    random = fk.plan(model, fk.Prune(by="random", mode="random", seed=3))
    assert random == fk.plan(model, fk.Prune(by="random", mode="random", seed=3))
    assert random != fk.plan(model, fk.Prune(by="random", mode="random", seed=4))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_patterns_hold_in_every_group(pattern: str, name: str) -> None:
    model = FAMILIES[name].model()
    kept, size = read_pattern(pattern)
    plan = fk.plan(model, fk.Prune(pattern=pattern))
    before = weights(model)
    fk.apply(model, plan)
    for label, weight in weights(model).items():
        groups = weight.unflatten(-1, (-1, size))
        assert bool(((groups != 0).sum(-1) == kept).all()), label
        lost = (before[label].unflatten(-1, (-1, size)).abs() * (groups == 0)).amax(-1)
        least = groups.abs().masked_fill(groups == 0, float("inf")).amin(-1)
        assert bool((lost <= least).all()), label
    plain = fk.plan(FAMILIES[name].model(), fk.Prune(sparsity=0.5))  # the control
    mask = plain.edits[-1].mask().unflatten(-1, (-1, size)).sum(-1)
    assert not bool((mask == kept).all())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_wanda_is_a_loop_over_rows_with_the_inputs_norms(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    batches = [family.inputs(model, seed=seed) for seed in range(2)]
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for each in prunable(model, "all"):
        keep = seen.setdefault(each.name, [])
        handles.append(each.module.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0].detach())))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    plan = fk.plan(model, fk.Prune(by="wanda", sparsity=0.4), data=batches)
    for each in prunable(model, "all"):
        total = torch.zeros(each.shape[-1], dtype=torch.float64)
        for batch, x in zip(batches, seen[each.name], strict=True):
            mask = batch.get("attention_mask")
            fits = mask is not None and mask.numel() == x.shape[:-1].numel()
            if "decoder" in each.name and "EncDec" not in each.name:
                fits = False  # its tokens all count
            for b, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
                if not fits or int(mask[b, t]):
                    total += x[b, t].double().square()
        score = each.weight().abs() * total.sqrt().float()
        found = masks(plan)[each.name]
        for row in range(len(score)):
            gone = sorted(range(score.shape[1]), key=lambda j, row=row: float(score[row, j]))
            assert (~found[row]).sum() == round(0.4 * score.shape[1])
            assert not bool(found[row][gone[: round(0.4 * score.shape[1])]].any()), each.name
    differs = fk.plan(model, fk.Prune(scope="row", sparsity=0.4))  # the control: without the inputs
    assert any(not torch.equal(masks(plan)[k], masks(differs)[k]) for k in masks(plan))
    with pytest.raises(FfnkitError, match="no data"):
        fk.plan(model, fk.Prune(by="wanda"))


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
@pytest.mark.parametrize("scope", ["global", "layer", "auto"])
def test_experts_in_one_parameter_are_pruned_too(name: str, scope: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    by = "wanda" if scope == "auto" else "magnitude"
    plan = fk.plan(model, fk.Prune(by=by, scope=scope, sparsity=0.25), data=[family.inputs(model)])
    fk.apply(model, plan)
    found = weights(model)
    experts = [label for label, value in found.items() if value.ndim == 3]
    assert experts
    if scope == "layer":
        assert all(int((e == 0).sum()) == round(0.25 * e.numel()) for label in experts for e in found[label])
    if scope == "auto":
        assert all(bool(((e == 0).sum(-1) == round(0.25 * e.shape[-1])).all()) for e in found.values())
    total = sum(value.numel() for value in found.values())
    assert abs(zeros(found) - round(0.25 * total)) <= (0 if scope == "global" else len(found) * 100)
    with pytest.raises(FfnkitError, match="edited already"):
        fk.plan(model, fk.Prune())


@pytest.mark.parametrize("name", ["roberta", "bert", "gpt2", "bart", "mixtral"])
@pytest.mark.parametrize("sites", ["all", ".*"])
def test_heads_embeddings_and_routers_are_never_pruned(name: str, sites: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    plan = fk.plan(model, fk.Prune(sparsity=0.9, targets=sites))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fk.apply(model, plan)
    after = model.state_dict()
    words = ("classifier", "lm_head", "wte", "wpe", "embed", "router", "mlp.gate.", "pooler", "shared", "score")
    outside = [key for key in before if any(word in key for word in words) and "experts" not in key]
    assert outside and all(torch.equal(before[key], after[key]) for key in outside)
    assert zeros(weights(model)) > 0


# Applying ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but({*KINDS, "qwen2-moe", "bart", "clip"}, NAMES))
def test_a_masked_model_computes_as_one_with_zeroed_weights(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    plan = fk.plan(model, fk.Prune(sparsity=0.5))
    plan.save(tmp_path / "plan")
    loaded = fk.Plan.load(tmp_path / "plan")
    assert loaded == plan and "weights zero (50" in str(plan) and "no memory or time" in str(plan)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        edits = {(edit.target, edit.site): edit for edit in plan.edits if isinstance(edit, Mask)}
        for each in prunable(zeroed, "all"):
            each.stored.masked_fill_(~edits[each.name, each.site].mask(), 0.0)
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    plain = copy.deepcopy(model)
    fk.apply(model, loaded)
    found = weights(model)
    assert zeros(found) == round(0.5 * sum(value.numel() for value in found.values()))
    compare(family, model, zeroed, 1e-6)
    differ(family, model, plain)
    fk.fold(model)
    compare(family, model, zeroed, 1e-6)
    assert [type(module) for module in model.modules()] == classes and list(model.state_dict()) == names
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("name", slow_but({*KINDS, "qwen2-moe", "bart", "clip"}, NAMES))
def test_masks_come_back_from_a_compact_checkpoint(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    fk.save(model, tmp_path / "compact")
    again = fk.load(tmp_path / "compact").eval()
    if any(ffn.experts for ffn in ffns(again)):
        again.set_experts_implementation("eager")
    compare(family, again, model, 1e-5)
    kinds = {n for n, module in model.named_modules() if isinstance(module, Masked)}
    assert {n for n, module in again.named_modules() if isinstance(module, Masked)} == kinds
    fk.fold(again)
    assert zeros(weights(again)) == zeros(weights(model))


@pytest.mark.parametrize("name", KINDS)
def test_the_standard_form_holds_the_zeros(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    fk.export(model, tmp_path / "out")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert not any(isinstance(module, Masked) for module in plain.modules())
    assert zeros(weights(plain)) == zeros(weights(model)) > 0
    compare(family, plain, model, 1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "albert"])
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_zeros_stay_through_training(name: str, kind: str, tmp_path: Path) -> None:
    family = FAMILIES[name]

    model = family.model()
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    before = weights(model)
    plain = fk.fold(copy.deepcopy(model))
    count = zeros(before)
    after = weights(_with_gradients(family, model, kind))
    assert all(torch.equal(before[key] == 0, after[key] == 0) for key in before)
    assert any(relative_error(after[key], before[key]) > 1e-4 for key in before), "it did train"
    fk.save(model, tmp_path / "c")
    assert zeros(weights(fk.load(tmp_path / "c"))) == count
    assert zeros(weights(_with_gradients(family, plain, kind))) < count / 2, (
        "the control: without masks they are filled"
    )


def _with_gradients(family: Any, model: nn.Module, kind: str) -> nn.Module:
    """The model after three steps."""
    parameters = fk.trainable_parameters(model)
    optimizer: Any = (
        torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        if kind == "adamw"
        else torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    )
    for seed in range(3):
        outputs = model(**family.inputs(model, seed=seed))
        outputs[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_masks_hold_in_a_model_that_has_an_optimizer_already(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def step() -> None:
        model(**family.inputs(model))[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    fk.apply(model, fk.plan(model, fk.Prune()))
    step()  # momentum from before moves what lies under the masks
    masked = [module for module in model.modules() if isinstance(module, Masked)]
    assert any(bool((module.weight[~module.mask] != 0).any()) for module in masked), "the control"
    fk.export(model, tmp_path / "out")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    half = round(0.5 * sum(value.numel() for value in weights(plain).values()))
    assert zeros(weights(plain)) == half
    compare(family, plain, model, 1e-5)
    fk.fold(model)
    assert zeros(weights(model)) == half


def test_pruning_twice_goes_on_from_the_zeros_that_are_there() -> None:
    model = FAMILIES["bert"].model()
    total = sum(value.numel() for value in weights(model).values())
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.3)))
    first = weights(model)
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.6, by="random")))
    second = weights(model)
    assert zeros(second) == round(0.6 * total)
    assert all(bool((second[key][first[key] == 0] == 0).all()) for key in first)
    masks = [module.mask for module in model.modules() if isinstance(module, Masked)]
    assert sum(int((~mask).sum()) for mask in masks) == round(0.6 * total)  # what training would hold at zero


def test_a_body_and_a_head_open_a_masked_checkpoint(tmp_path: Path) -> None:
    import transformers

    model = FAMILIES["bert"].model()
    fk.apply(model, fk.plan(model, fk.Prune()))
    fk.save(model, tmp_path / "whole")
    body = transformers.BertModel.from_pretrained(tmp_path / "whole")
    found = weights(body)
    assert zeros(found) == zeros(weights(model)) > 0
    assert sum(isinstance(module, Masked) for module in body.modules()) == 18
    fk.save(body, tmp_path / "body")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "body")
    assert sum(isinstance(module, Masked) for module in again.modules()) == 18
    fk.fold(again)
    assert zeros(weights(again)) == zeros(found)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["bert", "albert", "mixtral", "gpt2"])
def test_a_temporary_plan_masks_leaves_the_model_as_it_was(name: str, fold: bool) -> None:
    family = FAMILIES[name]
    model = family.model() if name != "bert" else updated()
    plan = fk.plan(model, fk.Prune(sparsity=0.5, targets="all" if name != "bert" else ".*"))
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    plain = family.outputs(model)
    applied = fk.apply(copy.deepcopy(model), plan)
    with TemporaryPlan(model, plan.edits, fold=fold):
        compare(family, model, applied, 1e-6)
        differs = [relative_error(value, plain[key]) for key, value in family.outputs(model).items()]
        assert max(differs) > 1e-3
    assert same(snapshot(model), before) and [type(module) for module in model.modules()] == classes
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(value, plain[key]) for key, value in family.outputs(model).items())


def test_pruning_goes_with_methods_on_other_parts_and_after_narrowing() -> None:
    model = FAMILIES["bert"].model()
    plan = fk.plan(model, fk.Combined([{"method": "magnitude", "width": 0.5}, fk.Prune(targets="all")]))
    fk.apply(model, plan)
    assert {ffn.width for ffn in ffns(model)} == {20}
    found = weights(model)
    assert zeros(found) == round(0.5 * sum(value.numel() for value in found.values()))
    other = FAMILIES["bert"].model()
    fused = fk.plan(other, fk.Combined([fk.Fusion(width=0.5, restarts=1), fk.Prune(targets="attention")]))
    fk.apply(other, fused)
    assert zeros(weights(other, "attention")) > 0
    with pytest.raises(FfnkitError, match="edited already"):
        other = FAMILIES["bert"].model()
        fk.plan(other, fk.Combined([fk.Prune(targets="all"), fk.Fusion(width=0.5)]))


# Updates and merging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_below_an_update_the_frozen_weight_gets_the_zeros(name: str) -> None:
    family = FAMILIES[name]
    model = updated(name, QV if name == "bert" else r".*c_attn")
    updates = {n: layer.update() for n, layer in adapter_layers(model).items()}
    plan = fk.plan(model, fk.Prune(sparsity=0.5, mode="ABS"))
    expected = copy.deepcopy(model)
    fk.apply(model, plan)
    assert list(adapter_layers(model)) == list(updates)
    for n, layer in adapter_layers(model).items():
        assert torch.equal(layer.update(), updates[n])
        mask = masks(plan)[n]
        assert torch.equal(oriented(layer.base, layer.transposed) != 0, mask)
        expected.get_submodule(n).base.data.mul_(oriented(mask, is_transposed(layer)))
    for n, mask in masks(plan).items():
        if n not in updates:
            linear = expected.get_submodule(n)
            stored_weight(linear).data.mul_(oriented(mask, is_transposed(linear)))
    compare(family, model, expected, 1e-6)
    layer = next(iter(adapter_layers(model).values()))
    layer.values.data.add_(0.01)  # the update trains on, the zeros stay
    assert int((layer.base == 0).sum()) > 0 and not layer.base.requires_grad


def test_a_masked_merge_keeps_the_zeros_and_a_plain_one_fills_them() -> None:
    model = updated()
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    family = FAMILIES["bert"]
    report = sparsity(model)
    total = report.weights
    carrying = sum(layer.base.numel() for layer in adapter_layers(model).values())
    assert report.share() == pytest.approx(0.5, abs=1e-3)
    assert report.share("merged") == pytest.approx(0.5 * (total - carrying) / total, abs=1e-2)
    assert report.share("masked") == report.share() and "all" in str(report)
    assert report.to_dict()["rows"][0]["weights"] == 256

    whole, masked = copy.deepcopy(model), copy.deepcopy(model)
    expected = {n: (layer.weight, layer.base.clone()) for n, layer in adapter_layers(model).items()}
    fk.fold(whole)
    fk.fold(masked, masked=True)
    assert zeros(weights(masked)) == zeros(weights(model)) == round(0.5 * (total - carrying)) + round(0.5 * carrying)
    assert zeros(weights(whole)) < 0.45 * total, "the control"
    for n, (weight, base) in expected.items():
        assert_close(masked.get_submodule(n).weight, weight * (base != 0), rel=1e-7)
        assert_close(whole.get_submodule(n).weight, weight, rel=1e-7)
    compare(family, whole, model, 1e-5)
    differ(family, masked, model)

    before, plain = snapshot(model), [type(module) for module in model.modules()]
    costs = merge_costs(model, labelled())
    assert same(snapshot(model), before) and [type(module) for module in model.modules()] == plain
    losses = {}
    for name, each in (("apart", model), ("merged", whole), ("masked", masked)):
        with torch.no_grad():
            losses[name] = sum(float(each(**batch).loss) for batch in labelled()) / 2
        assert getattr(costs, name) == pytest.approx(losses[name], rel=1e-5)
    assert abs(costs.masked - costs.apart) > 1e-4 and costs.zeros["masked"] == report.share()
    assert "merged  loss" in str(costs) and costs.to_dict()["zeros"]["apart"] == report.share()
    with pytest.raises(FfnkitError, match="no update"):
        merge_costs(whole, labelled())


def test_an_adapter_of_a_pruned_model_is_refused_on_the_unpruned_one(tmp_path: Path) -> None:
    model = updated()
    plan = fk.plan(model, fk.Prune(sparsity=0.5))
    fk.apply(model, plan)
    fk.save_adapter(model, tmp_path / "adapter")
    expected = FAMILIES["bert"].outputs(model)
    fresh = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match="another one than the update was made for"):
        fk.load_adapter(fresh, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="made for another weight"):
        updated().load_state_dict(model.state_dict(), strict=False)
    pruned = fk.fold(fk.apply(fresh, plan))  # the control: the pruned base takes it
    fk.load_adapter(pruned, tmp_path / "adapter")
    for key, value in FAMILIES["bert"].outputs(pruned).items():
        assert_close(value, expected[key], rel=1e-5)
    fk.remove_adapter(model)
    assert zeros(weights(model)) == zeros(weights(pruned))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "tuner",
    [
        {"name": "lora", "targets": "all", "rank": 2},
        {"name": "lora", "targets": "attention", "rank": 2, "modules_to_train": ["biases"]},
        {"name": "mask", "targets": "all", "density": 0.3},
        {"name": "mask", "targets": "attention", "density": 0.3, "modules_to_train": ["rest"]},
    ],
    ids=["lora", "lora-also", "sparse", "sparse-also"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["folded", "masked"])
def test_tuners_keep_zeros_when_asked_or_masked(tuner: dict[str, Any], keep: bool, masked: bool) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    if not masked:
        fk.fold(model)
    before = weights(model)
    count = zeros(before)
    chosen = tuners.get({**tuner, **({"keep_zeros": True} if keep else {})})
    assert ("keep_zeros" in chosen.model_dump()) == keep
    tuned = chosen.prepare(model)
    optimizer = torch.optim.AdamW(fk.trainable_parameters(tuned), lr=1e-2)
    for batch in labelled(count=3):
        tuned(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = chosen.finish(tuned)
    after = weights(plain)
    assert any(isinstance(module, Masked) for module in plain.modules()) == masked
    assert any(relative_error(after[key], before[key]) > 1e-4 for key in before)
    if keep or masked:
        assert all(torch.equal(before[key] == 0, after[key] == 0) for key in before)
    else:
        assert zeros(after) < 0.9 * count, "the control: merging fills them"


def test_a_lora_adapter_merges_with_zeros_from_its_file(tmp_path: Path) -> None:
    from ffnkit.tune.adapters import load_adapter

    model = FAMILIES["bert"].model()
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    base, count = copy.deepcopy(model), zeros(weights(model))
    chosen = tuners.get({"name": "lora", "targets": "all", "adapter_dir": tmp_path / "a", "keep_zeros": True})
    tuned = chosen.prepare(model)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    merged = chosen.finish(tuned)
    again = tuners.finish(load_adapter(base, tmp_path / "a", keep_zeros=True), "lora")
    assert zeros(weights(again)) == zeros(weights(merged)) == count
    compare(FAMILIES["bert"], again, merged, 1e-6)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0"),
        ({"sparsity": -0.1}, "sparsity -0.1"),
        ({"adapted_sparsity": True}, "adapted_sparsity True"),
        ({"mode": "abs"}, "ABS, AB"),
        ({"by": "size"}, "magnitude, wanda"),
        ({"scope": "all"}, "auto, global"),
        ({"pattern": "4:2"}, "N:M"),
        ({"pattern": "1:4", "sparsity": 0.4}, "sparsities are given too"),
        ({"pattern": "2:4", "scope": "row"}, "a scope is given too"),
        ({"pattern": "2:3"}, "no multiple of 3"),
        ({"targets": "nothing"}, "no linear that can be pruned"),
        ({"targets": "("}, "not a regular expression"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FfnkitError, match=message.replace("(", r"\(")):
        fk.plan(FAMILIES["bert"].model(), fk.Prune(**settings))


def test_weights_that_cannot_be_pruned_are_refused() -> None:
    model = FAMILIES["bert"].model()
    fk.apply(model, fk.plan(model, fk.SparseGrad(basis="none", choose="random", targets=QV)))
    with pytest.raises(FfnkitError, match="updates are all zero"):
        fk.plan(model, fk.Prune())
    fk.plan(model, fk.Prune(mode="W"))
    broken = FAMILIES["bert"].model()
    broken.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(FfnkitError, match="NaN or infinity"):
        fk.plan(broken, fk.Prune())
    few = FAMILIES["bert"].model()
    linear = few.bert.encoder.layer[0].output.dense
    linear._parameters["weight"] = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(FfnkitError, match="quantized"):
        fk.plan(few, fk.Prune())
    tuned = tuners.get({"name": "lora", "targets": "attention"}).prepare(FAMILIES["bert"].model())
    with pytest.raises(FfnkitError, match="adapter of peft"):
        fk.plan(tuned.get_base_model(), fk.Prune())
    folded = FAMILIES["bert"].model()
    fk.apply(folded, fk.plan(folded, fk.CalibratedFusion(width=0.5, refine=0), data=[FAMILIES["bert"].inputs(folded)]))
    with pytest.raises(FfnkitError, match="edited already"):
        fk.plan(folded, fk.Prune())


def test_a_mask_for_another_model_is_refused_and_changes_nothing() -> None:
    plan = fk.plan(FAMILIES["bert"].model(), fk.Prune())
    for other in (FAMILIES["bert"].model(times=2), FAMILIES["gpt2"].model()):
        before = snapshot(other)
        with pytest.raises(FfnkitError, match="Make the plan for this model"):
            fk.apply(other, plan)
        assert same(snapshot(other), before)


def test_the_benchmark_of_2_4_says_so_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    path = Path(__file__).resolve().parents[1] / "benchmarks" / "semi_structured.py"
    spec = importlib.util.spec_from_file_location("semi_structured", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = module.main(["--shape", "128x128", "--tokens", "16"])
    out = capsys.readouterr().out
    assert shown == 0 and ("not measured" in out) is not torch.cuda.is_available()
