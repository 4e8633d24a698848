"""Kernels, FFN outputs and hidden states against slow loops written from the formulas, and models left as they were."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import METHODS, OTHERS, crossed
from test_contract import same, snapshot
from tolerance import assert_close, assert_differs
from torch.utils._python_dispatch import TorchDispatchMode

import ffnkit as fk
from ffnkit.analysis import errors, ntk
from ffnkit.analysis.ntk import NtkSettings
from ffnkit.analysis.reference import Reference, temporary_plan
from ffnkit.analysis.scalar import scalar, singles
from ffnkit.analysis.study import DRAWN, Candidate
from ffnkit.edits import Edit, Stage
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns

ALL = {**METHODS, **OTHERS}
KINDS = ("bert", "gpt2", "llama", "phi3", "t5", "switch", "mixtral", "albert")


def batches(name: str, model: Any, count: int = 2) -> list[dict[str, Any]]:
    """Batches with padding, with labels where a decoder has none of its own."""
    found = [FAMILIES[name].inputs(model, seed=seed) for seed in range(count)]
    for batch in found:
        if "decoder_input_ids" in batch:
            batch["labels"] = batch.pop("decoder_input_ids")
    return found


def plan_of(name: str, model: Any, method: str = "fusion") -> fk.Plan:
    return fk.plan(model, ALL[method](), data=batches(name, model))


def identities(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    """Every module and parameter as the very object that it is."""
    modules = [(name, id(module), id(type(module))) for name, module in model.named_modules()]
    return modules + [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()]


# --- a plan in place and out again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", (False, True))
@pytest.mark.parametrize(
    ("name", "method"),
    crossed(
        KINDS,
        ("fusion", "svd", "unstructured", "importance"),
        always=[("bert", "unstructured"), ("t5", "importance")],
        but=[(name, "svd") for name in KINDS if FAMILIES[name].has_experts],  # refused, see test_methods.py
    ),
)
def test_a_trial_is_what_apply_does_and_leaves_nothing(name: str, method: str, fold: bool) -> None:
    model, applied = FAMILIES[name].model(), FAMILIES[name].model()
    plan = plan_of(name, model, method)
    before, objects, config = snapshot(model), identities(model), model.config.to_dict()
    untouched = FAMILIES[name].outputs(model)
    fk.apply(applied, plan)
    if fold:
        fk.fold(applied)
    trial = temporary_plan(model, plan, fold=fold)
    for _ in range(2):
        assert same(snapshot(model), before) and identities(model) == objects
        with trial:
            assert not same(snapshot(model), before)  # the control: something was in place
            inside = FAMILIES[name].outputs(model)
            shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    wanted = FAMILIES[name].outputs(applied)
    assert shapes == {n: tuple(p.shape) for n, p in applied.named_parameters()}
    for key, value in FAMILIES[name].outputs(model).items():
        assert torch.equal(value, untouched[key])
        assert_close(inside[key], wanted[key], rel=1e-6, what=key)
    assert model.config.to_dict() == config


def test_an_error_inside_a_trial_leaves_the_model_too() -> None:
    model = FAMILIES["bert"].model()
    trial, before = temporary_plan(model, plan_of("bert", model)), snapshot(model)
    with pytest.raises(RuntimeError), trial:
        raise RuntimeError
    assert same(snapshot(model), before)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(FfnkitError, match="it has no FFN"):
        temporary_plan(FAMILIES["bert"].model(), plan_of("gpt2", FAMILIES["gpt2"].model()))


def test_a_plan_that_joins_or_drops_ffns_is_refused() -> None:
    class Joined(Edit):
        kind = "Joined"
        stage = Stage.TIE

    model = FAMILIES["bert"].model()
    plan, before = plan_of("bert", model), snapshot(model)
    with pytest.raises(FfnkitError, match="edits of kind Joined"):
        temporary_plan(model, dataclasses.replace(plan, edits=(*plan.edits, Joined(plan.edits[0].target))))
    assert same(snapshot(model), before)


# --- errors -----------------------------------------------------------------------------------------------------------


def relative(gaps: list[torch.Tensor], whole: list[torch.Tensor]) -> torch.Tensor:
    return (torch.stack(gaps).square().sum() / torch.stack(whole).square().sum()).sqrt()


def numbers(values: Any) -> torch.Tensor:
    """Floats as a float64 tensor."""
    return torch.tensor(list(values), dtype=torch.float64)


@torch.no_grad()
def slow_errors(model: Any, data: list[Any], plan: fk.Plan, *, masked: bool = True) -> tuple[dict[str, Any], list[Any]]:
    """BERT's errors, layer by layer and token by token, from the formula."""
    other = fk.apply(FAMILIES["bert"].model().double(), plan)
    layers, narrow = model.bert.encoder.layer, other.bert.encoder.layer
    output: dict[str, Any] = {}
    states: list[Any] = []
    for number in range(len(layers)):
        gaps, whole, state_gaps, state_whole = [], [], [], []
        for batch in data:
            inputs: list[torch.Tensor] = []
            handle = layers[number].intermediate.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0])
            )
            expected = model(**batch, output_hidden_states=True).hidden_states[number + 1]
            handle.remove()
            actual = other(**batch, output_hidden_states=True).hidden_states[number + 1]
            kept = batch["attention_mask"].bool() if masked else torch.ones_like(batch["attention_mask"]).bool()
            for x, one, two in zip(inputs[0][kept], expected[kept], actual[kept], strict=True):
                y = layers[number].output.dense(torch.nn.functional.gelu(layers[number].intermediate.dense(x)))
                z = narrow[number].output.dense(torch.nn.functional.gelu(narrow[number].intermediate.dense(x)))
                gaps.append(z - y)
                whole.append(y)
                state_gaps.append(two - one)
                state_whole.append(one)
        output[f"bert.encoder.layer.{number}"] = relative(gaps, whole)
        states.append(relative(state_gaps, state_whole))
    return output, states


def test_errors_are_those_of_the_formula() -> None:
    model = FAMILIES["bert"].model().double()
    data, plan = batches("bert", model), plan_of("bert", model)
    found = errors.measure(model, [temporary_plan(model, plan)], data)[0]
    output, states = slow_errors(model, data, plan)
    assert set(found.output) == set(output) and found.tokens == {"": sum(int(b["attention_mask"].sum()) for b in data)}
    for name, value in output.items():
        assert_close(numbers([found.output[name]]), value[None], rel=1e-9, what=name)
    assert_close(numbers(found.hidden.values()), torch.stack(states), rel=1e-9)
    assert found.last_hidden[""] == list(found.hidden.values())[-1]
    unmasked, _ = slow_errors(model, data, plan, masked=False)  # the control: padding would count
    for name, value in unmasked.items():
        assert_differs(numbers([found.output[name]]), value[None], rel=1e-4, what=name)


@pytest.mark.parametrize("name", (*KINDS, "bart", "clip", "vit", "qwen2-moe", "modernbert"))
def test_a_plan_that_changes_nothing_has_no_error(name: str) -> None:
    model = FAMILIES[name].model()
    data = batches(name, model)
    whole = fk.plan(model, fk.CalibratedFusion(width=1.0), data=data)
    half = fk.plan(model, fk.Fusion(width=0.5, restarts=1))
    none, some = errors.measure(model, [temporary_plan(model, whole), temporary_plan(model, half)], data)
    assert all(value is None or value < 1e-5 for value in none.output.values())
    assert all(value < 1e-5 for value in none.hidden.values())
    assert all(value is None or 0.05 < value < 3 for value in some.output.values())  # the control
    assert all(value > 0.05 for value in some.last_hidden.values())
    assert set(some.last_hidden) == {ffn.stack for ffn in ffns(model) if "." in ffn.name}


def test_an_expert_weighs_by_its_squared_routing_weight() -> None:
    model = FAMILIES["mixtral"].model()
    data, plan = batches("mixtral", model, 1), plan_of("mixtral", model)
    found = errors.measure(model, [temporary_plan(model, plan)], data)[0]
    seen: dict[str, Any] = {}
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_hook(lambda _, args, out: seen.update(args=args))
    with torch.no_grad():
        model(**data[0])
    handle.remove()
    x, index, weights = seen["args"]
    old, new = ffns(model)[0].read(), ffns(fk.apply(FAMILIES["mixtral"].model(), plan))[0].read()
    old, new = (neurons.map(torch.Tensor.detach) for neurons in (old, new))
    kept, gap, whole, flat = data[0]["attention_mask"].reshape(-1).bool(), 0.0, 0.0, 0.0
    for token in torch.arange(len(x))[kept]:
        for place in range(index.shape[1]):
            y, z = (
                one.down @ (torch.nn.functional.silu(one.gate @ x[token]) * (one.up @ x[token]))
                for one in (n.expert(int(index[token, place])) for n in (old, new))
            )
            share = float(weights[token, place]) ** 2
            gap, whole = gap + share * float((z - y).square().sum()), whole + share * float(y.square().sum())
            flat += float((z - y).square().sum())
    assert found.output["model.layers.0.mlp.experts"] == pytest.approx((gap / whole) ** 0.5, rel=1e-4)
    assert (flat / whole) ** 0.5 != pytest.approx((gap / whole) ** 0.5, rel=1e-2)


def test_a_second_model_is_measured_like_the_plan_that_made_it() -> None:
    model, other = FAMILIES["bert"].model(), FAMILIES["bert"].model()
    data, plan = batches("bert", model), plan_of("bert", model)
    fk.apply(other, plan)
    one, two = errors.measure(model, [temporary_plan(model, plan), Reference(model, other)], data)
    assert_close(numbers(two.output.values()), numbers(one.output.values()), rel=1e-5)
    assert_close(numbers(two.hidden.values()), numbers(one.hidden.values()), rel=1e-5)
    with pytest.raises(FfnkitError, match="is not the same block in both"):
        Reference(model, FAMILIES["gpt2"].model())


# --- kernels ----------------------------------------------------------------------------------------------------------


def slow_kernels(model: Any, names: list[str], data: list[Any]) -> dict[str, torch.Tensor]:
    """Both kernels of BERT, summed over the parameters named, from the formula."""
    parameters = [p for name, p in model.named_parameters() if any(name.startswith(each) for each in names)]
    rows = []
    for batch in data:
        for row in range(len(batch["input_ids"])):
            model.zero_grad()
            logits = model(**{k: v[row : row + 1] for k, v in batch.items()}).logits[0]
            (logits[0].exp() / logits.exp().sum()).backward()
            rows.append(torch.cat([p.grad.flatten() for p in parameters]))
    model.zero_grad()
    count = len(rows)
    sgd, adam = torch.zeros(count, count), torch.zeros(count, count)
    sgd, adam = sgd.double(), adam.double()
    for i in range(count):
        for j in range(count):
            sgd[i, j] = (rows[i] * rows[j]).sum()
            adam[i, j] = (rows[i] * torch.sign(rows[j])).sum()
    return {"sgd": sgd, "adam": adam}


FFN_KEYS = ("intermediate.dense", "output.dense")


@pytest.mark.parametrize("memory", (1 << 30, 10_000, 1))
def test_kernels_are_those_of_the_formula(memory: int) -> None:
    model = FAMILIES["bert"].model().double()
    data = batches("bert", model, 3)
    wanted = slow_kernels(model, [f"bert.encoder.layer.{n}.{k}" for n in (1, 2) for k in FFN_KEYS], data)
    one = slow_kernels(model, [f"bert.encoder.layer.2.{k}" for k in FFN_KEYS], data)
    chosen = ffns(model)[1:]
    if memory == 1:  # a column at a time: one bias is enough to show it
        chosen[0].parameters = lambda: [model.bert.encoder.layer[1].output.dense.bias]  # type: ignore[method-assign]
        found = ntk.kernels(model, chosen[:1], singles(data, 6), memory=memory)
        wanted = slow_kernels(model, ["bert.encoder.layer.1.output.dense.bias"], data)
        assert found.passes == found.parameters == 16
    else:
        found = ntk.kernels(model, chosen, singles(data, 6), memory=memory)
        assert (found.passes > 10) == (memory == 10_000)
        for kind in ntk.KINDS:
            assert_close(getattr(found, kind)[1], one[kind], rel=1e-9, what=kind)
            assert_differs(getattr(found, kind)[0], one[kind], what=kind)  # the control: FFNs are told apart
    for kind in ntk.KINDS:
        assert_close(getattr(found, kind).sum(0), wanted[kind], rel=1e-9, what=kind)
    assert_differs(found.sgd.sum(0), wanted["adam"], what="the kernels differ")
    assert_close(found.sgd.sum(0), found.sgd.sum(0).T, rel=1e-12)


def test_distances_are_those_of_the_formula() -> None:
    model = FAMILIES["bert"].model().double()
    data, plan = batches("bert", model), plan_of("bert", model)
    examples, found = singles(data, 4), ffns(model)[2:]
    before = ntk.kernels(model, found, examples)
    with (trial := temporary_plan(model, plan)):
        after = ntk.kernels(model, [trial.found[found[0].name]], examples)
    narrow = fk.apply(FAMILIES["bert"].model().double(), plan)
    keys = [f"bert.encoder.layer.2.{k}" for k in FFN_KEYS]
    first, second = slow_kernels(model, keys, data), slow_kernels(narrow, keys, data)
    for kind, distance in ntk.compare(before, after)[""].items():
        a, b = first[kind], second[kind]
        assert distance.absolute == pytest.approx(float((b - a).norm()), rel=1e-8)
        assert distance.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-8)
        assert distance.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-8)
        centre = torch.eye(4).double() - 1 / 4
        a, b = centre @ a @ centre, centre @ b @ centre
        assert distance.centred == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-6)
        assert distance.centred != pytest.approx(distance.cosine, rel=1e-4)  # the control
    same_one = ntk.compare(before, before)[""]["adam"]
    assert same_one == ntk.Distance(0.0, 0.0, pytest.approx(1.0), pytest.approx(1.0))


def test_theta_is_what_a_tuner_would_train() -> None:
    model = FAMILIES["bert"].model()
    shapes = {}
    for method, fold in (("fusion", False), ("fusion", True), ("svd", False)):
        with (trial := temporary_plan(model, plan_of("bert", model, method), fold=fold)):
            shapes[method, fold] = sum(p.numel() for p in trial.found["bert.encoder.layer.0"].parameters())
    width, rank = 20, 40 * 16 * 20 // 40 // 56
    assert shapes["fusion", False] == shapes["fusion", True] == 2 * 16 * width + width + 16  # no factor among them
    assert shapes["svd", False] == 2 * rank * 56 + 40 + 16


def test_folding_changes_the_kernel_and_no_output() -> None:
    model = FAMILIES["bert"].model()
    found = fk.analyze(
        model,
        [Candidate(plan := plan_of("bert", model)), Candidate(plan, fold=True)],
        data=batches("bert", model),
        ntk=NtkSettings(examples=4),
    )
    apart, folded = found.rows
    assert apart.errors and folded.errors and apart.ntk and folded.ntk
    assert apart.errors.mean_output == pytest.approx(folded.errors.mean_output, rel=1e-5)
    assert abs(apart.ntk[""]["sgd"].relative - folded.ntk[""]["sgd"].relative) > 1e-2


class Held(TorchDispatchMode):
    """The most bytes of tensors that Python held at a time, the storages that were there before left out."""

    def __init__(self, known: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: dict[int, tuple[Any, int, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.alive[id(value)] = (weakref.ref(value), storage.data_ptr(), storage.nbytes())
        self.alive = {key: each for key, each in self.alive.items() if each[0]() is not None}
        self.most = max(self.most, sum({place: size for _, place, size in self.alive.values()}.values()))
        return out


@contextmanager
def held(model: torch.nn.Module) -> Iterator[Held]:
    with Held(iter([*model.parameters(), *model.buffers()])) as mode:
        yield mode


def test_memory_does_not_grow_with_examples_times_parameters() -> None:
    model = FAMILIES["bert"].model().double()
    found = ffns(model)[-1:]
    size = sum(ffn.num_parameters for ffn in found)
    cap, most = 30_000, {}
    for count, memory in ((6, cap), (16, cap), (16, 1 << 30)):
        examples = singles(batches("bert", model, count // 2), count)
        with held(model) as mode:
            ntk.kernels(model, found, examples, memory=memory)
        most[count, memory] = mode.most
    kernels = 2 * 16 * 16 * 8
    beside = 4 * size * 8 + kernels * 2  # one example's activations and gradient; the kernels and a product
    assert most[6, cap] <= cap + beside and most[16, cap] <= cap + beside
    assert most[16, 1 << 30] > 16 * size * 8 > 2 * (cap + beside)  # the control: all of them at once


@pytest.mark.parametrize("name", ("gpt2", "t5", "camembert", "mixtral", "vit"))
def test_models_of_every_kind_have_a_scalar(name: str) -> None:
    model = FAMILIES[name].model()
    data = batches(name, model, 1)
    outputs = {output: scalar(model, singles(data, 2)[1], output) for output in ("probability", "logit")}
    assert outputs["probability"].ndim == 0 and outputs["probability"] != outputs["logit"]
    if name == "gpt2":  # row 1 has two tokens of padding
        ids = data[0]["input_ids"][1, :-2]
        scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        assert_close(outputs["probability"], sum(scores[t, ids[t + 1]] for t in range(len(ids) - 1)), rel=1e-5)
    if name == "t5":
        labels = data[0]["labels"][1]
        scores = model(**{k: v[1:] for k, v in data[0].items()}).logits[0].log_softmax(-1)
        assert_close(outputs["probability"], sum(scores[t, labels[t]] for t in range(len(labels))), rel=1e-5)
    kernels = ntk.kernels(model, ffns(model)[-1:], singles(data, 2))
    assert torch.isfinite(kernels.adam).all() and kernels.adam.norm() > 0


def test_nothing_of_the_model_is_left_changed() -> None:
    model = FAMILIES["bert"].model().train()
    model.bert.embeddings.requires_grad_(False)
    before, objects = snapshot(model), identities(model)
    fk.analyze(model, ALL["svd"](), data=batches("bert", model), ntk=NtkSettings(examples=3, layers="all"))
    assert same(snapshot(model), before) and identities(model) == objects and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- the table --------------------------------------------------------------------------------------------------------


def test_several_methods_in_one_table(tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    other = fk.apply(FAMILIES["bert"].model(), plan_of("bert", model))
    data, more = batches("bert", model), batches("bert", model, 4)[2:]
    steps: list[tuple[int, int, str]] = []
    found = fk.analyze(
        model,
        [fk.Fusion(width=0.5, restarts=1), fk.Fusion(width=0.25, restarts=1), ALL["calibrated-fusion"]()],
        data=data,
        calibration=more,
        against=other,
        ntk=NtkSettings(examples=3, layers="last:1"),
        progress=lambda *step: steps.append(step),
    )
    names = ["fusion width=0.5", "fusion width=0.25", "calibrated-fusion", "against"]
    assert [row.name for row in found.rows] == names
    assert found.rows[0].errors and found.rows[1].errors
    assert found.rows[1].errors.mean_output > found.rows[0].errors.mean_output
    assert found.rows[0].errors.mean_output == pytest.approx(found.rows[3].errors.mean_output, rel=1e-5)
    assert all(0 <= done <= total for done, total, _ in steps) and any(done for done, *_ in steps)
    data_of = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["name"] for row in data_of["rows"]] == names
    assert data_of["conditions"]["ntk"]["ffns"] == ["bert.encoder.layer.2"]
    assert len(data_of["rows"][0]["output_error"]["by_ffn"]) == 3
    text = str(found)
    assert all(name in text for name in names) and "NTK adam" in text and DRAWN not in text
    assert len({len(line) for line in text.splitlines()[:5]}) == 1
    assert found.to_markdown().count("\n|") == len(names) + 1
    found.plot(tmp_path / "analysis.png")
    assert (tmp_path / "analysis.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_measured_together_are_those_measured_alone() -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    given = {name: ALL[name]() for name in ("fusion", "svd", "magnitude", "unstructured")}
    together = fk.analyze(model, given, data=data, ntk=False).rows
    for row in together:
        alone = fk.analyze(model, given[row.name], data=data, ntk=False).rows[0]
        assert alone.errors == row.errors


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"methods": []}, "no method and no second model"),
        ({"methods": [3]}, "a int among the methods"),
        ({"methods": fk.CalibratedFusion(0.5)}, "no calibration is given"),
        ({"methods": fk.Fusion(0.5), "ntk": NtkSettings(examples=9)}, "the data have 4"),
        ({"methods": fk.Fusion(0.5), "ntk": NtkSettings(examples=2, layers="9")}, "layer 9 has no FFN"),
        ({"methods": fk.Fusion(0.5), "data": [], "ntk": False}, "there are no batches"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, Any], line: str) -> None:
    model = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match=line):
        fk.analyze(model, **{"data": batches("bert", model), **options})


def test_a_model_without_logits_says_what_to_do() -> None:
    model = FAMILIES["ernie"].model()
    with pytest.raises(FfnkitError, match="it gives no logits"):
        fk.analyze(model, fk.Fusion(0.5), data=batches("ernie", model), ntk=NtkSettings(examples=2))
    assert fk.analyze(model, fk.Fusion(0.5), data=batches("ernie", model), ntk=False).rows[0].errors


@pytest.mark.parametrize("settings", ({"examples": 1}, {"output": "softmax"}, {"memory": 0}))
def test_bad_settings_of_the_kernel(settings: dict[str, Any]) -> None:
    with pytest.raises(FfnkitError):
        NtkSettings(**settings)


def test_an_expert_that_padding_alone_reaches_is_no_error() -> None:
    """Rows one by one, and as one padded batch (the capacity of experts, and so the figures, hang on the batch)."""
    model = FAMILIES["switch"].model()
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(5, 98, (size,), generator=draw) for size in (7, 5, 3, 6)]
    words = [torch.randint(5, 98, (size,), generator=draw) for size in (4, 6, 5, 3)]

    def batch(chosen: list[int]) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([rows[n] for n in chosen], batch_first=True, padding_value=1)
        mask = pad([torch.ones_like(rows[n]) for n in chosen], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": pad([words[n] for n in chosen], batch_first=True, padding_value=-100),
        }

    one, all_ = (
        fk.analyze(model, [fk.Fusion(0.5, restarts=1)], data=data, ntk=False).to_dict()["rows"][0]["output_error"]
        for data in ([batch([n]) for n in range(4)], [batch([0, 1, 2, 3])])
    )
    assert 0 < one["mean"] < 1 and 0 < all_["mean"] < 1


def test_errors_of_padding_count_for_nothing() -> None:
    total, mask = errors._Sum(), torch.tensor([1.0, 1.0, 0.0])
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [torch.nan, 1.0]])
    total.add(rows + 1, rows, mask)
    assert total.error() == pytest.approx((4 / 30) ** 0.5)
