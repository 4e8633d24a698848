"""FFN merging: matched neurons, one object in memory and one copy on disk, the search for a window."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import slow_but
from test_contract import EXACT, differ, same, snapshot
from tolerance import assert_close
from torch import Tensor, nn

import ffnkit as fk
from ffnkit.calibration.features import Features
from ffnkit.errors import FfnkitError
from ffnkit.methods.share.fitting import Fitting
from ffnkit.methods.share.merging import Merging
from ffnkit.methods.share.refitting import Correction, shared
from ffnkit.methods.share.windows import series as in_series
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.ops.matching import assign, correlation, matched, spread
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery.temporary import temporarily

ALONE = ("albert", "switch")  # with one FFN of a shape in a stack
KINDS = ("bert", "gpt2", "llama", "phi3", "t5", "t5-gated", "bart", "clip", "whisper", "vit", "modernbert", "gemma2")
DENSE = [name for name, family in FAMILIES.items() if not family.has_experts]


def data(name: str, model: nn.Module, batches: int = 8) -> list[dict[str, Tensor]]:
    return [FAMILIES[name].inputs(model, seed=seed) for seed in range(batches)]


def copies(name: str, seed: int = 0) -> Any:
    """A model whose layers hold permuted copies of one FFN, float64.

    Its layers add little to what passes through, so that all see about the same tokens, as the layers of trained
    models that can be merged do.
    """
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = type(family.model())(family.config()).eval()
    for path, parameter in model.named_parameters():
        if any(part.isdigit() for part in path.split(".")) and parameter.ndim > 1:
            parameter.data *= 1e-3
        if "post" in path and "norm" in path:  # a norm of what a layer adds
            parameter.data.fill_(1e-3 - 1 if "gemma" in name else 1e-3)
    draw = torch.Generator().manual_seed(seed)
    for series in groups(model):
        first = series[0].raw().map(lambda t: torch.randn(t.shape, generator=draw) * 0.2)
        for ffn in series:
            order = torch.randperm(ffn.width, generator=draw)
            small = {key: value * 1e-3 for key, value in first.tensors().items() if key.startswith("down")}
            ffn.write(Neurons(**{**first.tensors(), **small}).take(order))
    return model.double()


def groups(model: nn.Module) -> list[list[FFN]]:
    return [series for series in in_series(ffns(model)) if len(series) > 1 and one_shape(series)]


def one_shape(series: list[FFN]) -> bool:
    return len({(ffn.d, ffn.width, len(ffn.tied)) for ffn in series}) == 1 and not series[0].tied


def numbers(series: list[FFN]) -> str:
    prefix = f"{series[0].stack}:" if series[0].stack else ""
    return ",".join(f"{prefix}{ffn.layer}" if i == 0 else str(ffn.layer) for i, ffn in enumerate(series))


@pytest.mark.parametrize("name", DENSE)
def test_few_families_have_no_two_ffns_of_one_shape_in_one_stack(name: str) -> None:
    assert (not groups(FAMILIES[name].model())) == (name in ALONE)


@pytest.mark.parametrize("name", slow_but(KINDS, [name for name in DENSE if name not in ALONE]))
def test_permuted_copies_merge_without_a_change_and_a_wrong_permutation_shows(name: str) -> None:
    family, model = FAMILIES[name], copies(name)
    found = groups(model)
    method = Merging(groups=[numbers(series) for series in found])
    before = snapshot(model)
    plan = fk.plan(model, method, data=data(name, model))
    assert same(snapshot(model), before)
    wrong = copy.deepcopy(model)
    outputs = family.outputs(model)
    fk.apply(model, plan)
    for key, value in family.outputs(model).items():
        assert_close(value, outputs[key], rel=EXACT, what=key)
    assert len(ffns(model)) == family.count - sum(len(series) - 1 for series in found)
    fk.apply(wrong, fk.plan(wrong, Merging(groups=[numbers(series) for series in found], match=False)))
    gap = max(float((value - outputs[key]).abs().max()) for key, value in family.outputs(wrong).items())
    assert gap > 1e-9


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "t5", "bart", "vit"])
def test_the_tie_is_one_object_and_one_copy_and_comes_back(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    plan = fk.plan(model, Merging(layers="all"), data=data(name, model))
    plan.save(tmp_path / "plan")
    assert fk.Plan.load(tmp_path / "plan") == plan
    untied = sum(p.numel() for p in model.parameters())
    fk.apply(model, fk.Plan.load(tmp_path / "plan"))
    assert untied - sum(p.numel() for p in model.parameters()) == plan.saved_parameters > 0
    outputs = family.outputs(model)
    fk.save(model, tmp_path / "compact")
    fk.export(model, tmp_path / "standard")
    sizes = [sum(f.stat().st_size for f in (tmp_path / form).glob("*.safetensors")) for form in ("compact", "standard")]
    assert sizes[0] < sizes[1] - 4 * plan.saved_parameters + 4096
    again = fk.load(tmp_path / "compact")
    assert len(ffns(again)) == len(ffns(model)) < family.count
    assert [list(f.owners) for f in ffns(again)] == [list(f.owners) for f in ffns(model)]
    for opened in (again, type(model).from_pretrained(tmp_path / "standard")):
        for key, value in family.outputs(opened).items():
            assert_close(value, outputs[key], rel=1e-6, what=key)
    # a step moves every place at once, and the optimizer holds each tensor once
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    family_loss = sum(
        value.double().square().sum() for value in again(**family.inputs(again)).values() if _float(value)
    )
    family_loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    assert [list(f.owners) for f in ffns(again)] == [list(f.owners) for f in ffns(model)]
    again.tie_weights()
    fk.save(again, tmp_path / "later")
    for key, value in family.outputs(fk.load(tmp_path / "later")).items():
        assert_close(value, family.outputs(again)[key], rel=1e-6, what=key)


def _float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def test_the_mean_is_that_of_the_paper() -> None:
    model = FAMILIES["bert"].model()
    first, second, third = (ffn.raw() for ffn in ffns(model))
    plan = fk.plan(model, Merging(layers="all", anchor="middle"), data=data("bert", model))
    (tie,) = plan.edits
    assert tie.target == ffns(model)[1].name
    orders = tie.orders.long()
    wanted = {"up": second.up.double().clone(), "down": second.down.double().clone()}
    for neurons, order in ((first, orders[0]), (third, orders[1])):
        for j in range(neurons.ff):  # P_i W_in, W_out P_i^T, entry by entry
            wanted["up"][j] += neurons.up[order[j]]
            wanted["down"][:, j] += neurons.down[:, order[j]]
    bias = (first.down_bias + second.down_bias + third.down_bias) / 3  # type: ignore[operator]
    fk.apply(model, plan)
    (merged,) = ffns(model)
    assert_close(merged.raw().up, (wanted["up"] / 3).float(), rel=1e-6, what="up")
    assert_close(merged.raw().down, (wanted["down"] / 3).float(), rel=1e-6, what="down")
    assert_close(merged.raw().down_bias, bias, rel=1e-6, what="bias")


def test_correlations_match_a_slow_loop_and_do_not_cancel() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 6, generator=draw) * 0.01 + 1000 for _ in range(2))
    y[:, 3] = 7.0  # never changes
    slow = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            a, b = x[:, i].double(), y[:, j].double()
            a, b = a - a.mean(), b - b.mean()
            slow[i, j] = 0 if j == 3 else (a @ b) / (a.norm() * b.norm())
    assert_close(correlation(x, y).double(), slow, rel=1e-5, what="correlation")
    naive = (x.T @ y) / 50 - torch.outer(x.mean(0), y.mean(0))  # E[xy] - E[x] E[y] in float32
    exact = ((x.double() - x.double().mean(0)).T @ (y.double() - y.double().mean(0))) / 50
    assert float((naive - exact).norm() / exact.norm()) > 1
    assert spread(x).mean.dtype == torch.float64


def test_assignment_is_the_best_of_all() -> None:
    from itertools import permutations

    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    best = max(permutations(range(6)), key=lambda p: matched(similarity, torch.tensor(p)))
    assert assign(similarity).tolist() == list(best)
    assert sorted(assign(torch.zeros(4, 4)).tolist()) == [0, 1, 2, 3]


def test_every_window_is_searched_the_last_one_too() -> None:
    model = FAMILIES["bert"].model()
    batches = data("bert", model)
    plan = fk.plan(model, Merging(window=2), data=batches)
    assert list(plan.report["search"]) == ["0-1", "1-2"] and plan.report["seconds"] > 0
    seen: list[int] = []

    def last_is_best(tried: nn.Module) -> float:
        places = [f.name for f in ffns(tried)]
        same_weights = ffns(tried)[-1].tied
        seen.append(len(places))
        return float(bool(same_weights) and "2" in " ".join(same_weights))

    before = snapshot(model)
    plan = fk.plan(model, Merging(window=2, score=last_is_best), data=batches)
    assert same(snapshot(model), before) and seen == [2, 2]
    assert plan.edits[0].touched == tuple(f.name for f in ffns(model)[1:])
    assert plan.settings["score"] == "last_is_best" and fk.plan(model, Merging(window=2), data=batches).report


def test_windows_by_what_is_left_or_saved_and_groups_by_similarity() -> None:
    model = copies("bert")
    batches = data("bert", model)
    assert len(Merging(keep=2).chosen(model)) == 2
    assert len(Merging(remove=0.6).chosen(model)) == 1  # all three: two thirds go
    plan = fk.plan(model, Merging(groups="similar", keep=2), data=batches)
    assert len(plan.edits) == 1 and len(plan.edits[0].touched) == 2
    both = fk.plan(model, Merging(groups=[[0, 2]], anchor="last"), data=batches)
    assert [name[-1] for name in both.edits[0].touched] == ["2", "0"]


def test_a_two_stack_model_has_a_group_in_each_stack() -> None:
    model = FAMILIES["t5"].model()
    plan = fk.plan(model, Merging(groups=["0-1"]), data=data("t5", model))
    assert [edit.target.split(".")[0] for edit in plan.edits] == ["encoder", "decoder"]
    short = [{**b, "decoder_input_ids": b["decoder_input_ids"][:, :4]} for b in data("t5", model)]
    held = Features(model, short, ffns(model), {f.name: ["up"] for f in ffns(model)}, 10_000)
    assert held.tokens["encoder"] != held.tokens["decoder"]


def test_the_correction_is_the_least_squares_solution() -> None:
    name = "llama"
    model = FAMILIES[name].model().double()
    batches = data(name, model, 20)
    found = ffns(model)[:2]
    held = Features(model, batches, found, {f.name: ["up", "input", "output"] for f in found}, 10_000)
    order = assign(correlation(*(held.get(f.name, "up") for f in found)))[None].to(torch.int32)
    seen = Fitting(model, found, batches, batches, 10_000)
    fitted, errors = Correction(found, shared(found, order), seen).solve(1e-9)
    with temporarily(model, fk.plan(model, Merging(layers="0-1", features="up"), data=batches).edits):
        plain = [f.raw().map(torch.clone) for f in found]
    inputs = torch.cat([held.get(f.name, "input") for f in found]).double()
    wanted = torch.cat([held.get(f.name, "output") for f in found]).double()
    hidden = torch.nn.functional.silu(inputs @ plain[0].gate.T) * (inputs @ plain[0].up.T)  # type: ignore[union-attr]
    best = torch.linalg.lstsq(hidden, wanted).solution
    gap = [float((hidden @ down - wanted).norm() / wanted.norm()) for down in (best, fitted.down.T, plain[0].down.T)]
    assert gap[1] < gap[0] * 1.03 and gap[2] > gap[0] * 1.05  # members by their scale: test_refits
    assert set(errors) == {f.name for f in found}
    corrected_plan = fk.plan(model, Merging(layers="0-1", correct="output"), data=batches)
    fk.apply(model, corrected_plan)
    assert len(ffns(model)) == 2


def test_padding_does_not_count() -> None:
    model = FAMILIES["bert"].model()
    inputs = FAMILIES["bert"].inputs(model)
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)}
    wanted = {f.name: ["up"] for f in ffns(model)}
    held = [Features(model, [each], ffns(model), wanted, 100) for each in (inputs, other)]
    name = ffns(model)[1].name
    assert held[0].tokens[""] == int(inputs["attention_mask"].sum())
    assert_close(held[1].get(name, "up"), held[0].get(name, "up"), rel=1e-5, what="features")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "says which layers"),
        ({"layers": "all", "window": 2}, "says which layers"),
        ({"layers": "1"}, "a group of one"),
        ({"groups": ["0-1", [1, 2]]}, "in two groups"),
        ({"window": 7}, "a window"),
        ({"layers": "all", "features": "gate"}, "no gate"),
        ({"layers": "all", "anchor": "best"}, "no such choice"),
        ({"groups": "similar"}, "Give keep"),
        ({"remove": 1.5}, "not between"),
    ],
)
def test_bad_settings_get_one_line(settings: dict[str, Any], words: str) -> None:
    model = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match=words) as caught:
        fk.plan(model, Merging(**settings), data=data("bert", model))
    assert "\n" not in str(caught.value)


def test_experts_are_refused_and_data_are_asked_for_only_where_needed() -> None:
    with pytest.raises(FfnkitError, match="mixture of experts"):
        model = FAMILIES["mixtral"].model()
        fk.plan(model, Merging(layers="all"), data=data("mixtral", model))
    model = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match="no data"):
        fk.plan(model, Merging(layers="all", features="up"))
    for settings in ({"match": False}, {"take": "anchor"}, {"take": "random"}):
        plan = fk.plan(model, Merging(layers="all", **settings))
        differ(FAMILIES["bert"], fk.apply(copy.deepcopy(model), plan), model)


@pytest.mark.parametrize(("count", "middle"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_the_middle_of_a_group_is_that_of_the_released_code(count: int, middle: int) -> None:
    """Its reference is ``layer_list[len(layer_list) // 2]``."""
    group: Any = [f"layer {number}" for number in range(count)]
    placed: Any = fk.Merging(layers="all", anchor="middle").placed(group)
    assert placed[0] == f"layer {middle}" and sorted(placed) == group
