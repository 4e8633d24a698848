"""What goes with what: updates of two kinds, updates on compressed models, pruning after updates, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import crossed
from test_sparsegrad import batches, trained
from tolerance import assert_close, assert_differs
from torch import Tensor, nn

import ffnkit as fk
from ffnkit.cli.describe import parse_settings
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.weights import prunable
from ffnkit.model.attention import attentions
from ffnkit.model.finding import ffns
from ffnkit.model.trainable import parts_of
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.nn.reparametrized import is_reparametrized
from ffnkit.recipe.settings import check_tuner
from ffnkit.tune import quantizing, tuners

SMALL: dict[str, Any] = {"rank": 2, "nonzeros": 5}
ENTRIES: dict[str, Any] = {"density": 0.05, "basis": "none"}
PARTS = [{"name": "sparsegrad", **ENTRIES}, {"name": "dsee", "targets": "qv", **SMALL}]
HEADS = fk.RemoveHeads(remove=1)
NAMES = ("bert", "gpt2", "llama", "t5")


def on_ffns(**more: Any) -> fk.SparseGrad:
    return fk.SparseGrad(**ENTRIES | more)


def on_attention(**more: Any) -> fk.DSEE:
    return fk.DSEE(**SMALL | more)


def apply(model: Any, *methods: Any, data: Any = None) -> Any:
    """One plan after the other."""
    for method in methods:
        fk.apply(model, fk.plan(model, method, data=data))
    return model


def close(name: str, model: Any, wanted: dict[str, Tensor], what: str, rel: float = 1e-5) -> None:
    for key, value in FAMILIES[name].outputs(model).items():
        assert_close(value, wanted[key], rel=rel, what=f"{what} {key}")


def own(model: Any) -> list[nn.Parameter]:
    """What the updates train."""
    layers = adapter_layers(model).values()
    return [p for layer in layers for n, p in layer.named_parameters(recurse=False) if n not in ("base", "bias")]


def check(name: str, model: Any, data: list[dict[str, Any]], folder: Path, beside: tuple[str, ...] = ("head",)) -> None:
    """Gradients reach what is claimed, the model is saved and read back, and folding changes no output."""
    claimed = {id(p) for p in [*own(model), *parts_of(model, beside)]} - {
        id(m.base) for m in adapter_layers(model).values()
    }
    assert {id(p) for p in fk.trainable_parameters(model)} == claimed
    before = FAMILIES[name].outputs(model)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for batch in data:
        model(**batch).loss.backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached <= claimed and {id(p) for p in own(model)} & reached
    model.zero_grad()
    trained(model, data)
    assert {id(p) for n, p in model.named_parameters() if not torch.equal(p, kept[n])} <= claimed
    after = FAMILIES[name].outputs(model)
    assert any(not torch.equal(after[key], before[key]) for key in after), "the control: training did something"
    fk.save(model, folder / "saved")
    fk.export(model, folder / "exported")
    close(name, fk.load(folder / "saved").eval(), after, "saved")
    close(name, fk.load(folder / "exported").eval(), after, "exported")
    fk.fold(model)
    assert not any(is_reparametrized(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    close(name, model, after, "folded")


# Two updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "how"), crossed(NAMES, ["one plan", "two plans", "the other way round", "tuner"]))
def test_sparsegrad_on_ffns_and_dsee_on_attention(name: str, how: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    data = batches(name, model)
    untouched = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = family.outputs(model)
    if how == "one plan":
        apply(model, fk.Combined([on_ffns(), on_attention()]), data=data)
    elif how == "two plans":
        apply(model, on_ffns(), on_attention(), data=data)
    elif how == "tuner":
        tuner = tuners.get({"name": "combined", "parts": [{**PARTS[0], "batches": 2}, PARTS[1]]})
        assert tuner.method.needs_data and tuner.method.batches == 30
        apply(model, tuner.method, data=data)
    else:
        apply(model, on_attention(), on_ffns(), data=data)
    close(name, model, start, "before training", rel=1e-6)
    kinds = {layer.kind for layer in adapter_layers(model).values()}
    assert kinds == {"sparsegrad", "dsee"}
    trained(model, data)
    after = family.outputs(model)
    fk.save_adapter(model, tmp_path / "adapter")
    fresh = fk.load_adapter(family.model(), tmp_path / "adapter")
    assert all(torch.equal(value, after[key]) for key, value in family.outputs(fresh).items())
    assert len(adapter_layers(fresh)) == len(adapter_layers(model))
    fk.remove_adapter(model)
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[path]) and parameter.requires_grad, path
    check(name, fresh, data, tmp_path)


def test_what_trains_beside_adds_up_and_goes_back_to_the_bit() -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    untouched = {n: p.detach().clone() for n, p in model.named_parameters()}
    apply(model, on_ffns(modules_to_train=["head", "norms"]), data=data)
    trained(model, data)
    tuned = {n: p.detach().clone() for n, p in model.named_parameters()}
    apply(model, on_attention(modules_to_train=["biases"]))
    claimed = {id(p) for p in [*own(model), *parts_of(model, ["head", "norms", "biases"])]}
    assert {id(p) for p in fk.trainable_parameters(model)} == claimed
    trained(model, data)
    head = "classifier.weight"
    assert not torch.equal(tuned[head], untouched[head])  # else a restored one would say nothing
    fk.remove_adapter(model)
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[path]), path


def test_a_head_that_trained_and_is_adapted_then_goes_back_too() -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    before = model.classifier.weight.detach().clone()
    apply(model, on_ffns(), data=data)
    trained(model, data)
    assert_differs(model.classifier.weight, before)
    apply(model, on_attention(targets="classifier"))
    trained(model, data)
    fk.remove_adapter(model)
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_what_trained_beside_goes_back_after_heads_and_neurons_went(name: str) -> None:
    family = FAMILIES[name]
    model, bare = family.model(), family.model()
    data = batches(name, model)
    apply(model, on_attention(modules_to_train=["attention", "biases"]), data=data)
    trained(model, data)
    for method in (HEADS, fk.methods.build("magnitude", width=0.5)):
        plan = fk.plan(model, method)
        fk.apply(model, plan)
        fk.apply(bare, replace(plan, weights={}))  # the same heads and neurons, of a model that never trained
    tuned = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = dict(bare.named_parameters())
    changed = [n for n, p in tuned.items() if n in wanted and not torch.equal(p, wanted[n])]
    assert changed  # else what goes back would say nothing
    for path, parameter in fk.remove_adapter(model).named_parameters():
        assert torch.equal(parameter, wanted[path]) and parameter.requires_grad, path


def test_what_trained_beside_and_was_rewritten_does_not_go_back() -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    apply(model, on_attention(modules_to_train=["biases"]), data=data)
    apply(model, fk.Fusion(width=0.5, restarts=1))
    count = len(adapter_layers(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(FfnkitError, match="was rewritten since"):
        fk.remove_adapter(model)
    assert count and len(adapter_layers(model)) == count
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    fk.fold(model)
    assert not adapter_layers(model)


def test_the_tuner_of_two_parts(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    data = batches("bert", model)
    parts = [{"name": "mask", "density": 0.1}, {"name": "dsee", **SMALL}]
    tuner = tuners.get(
        {"name": "combined", "parts": parts, "adapter_dir": tmp_path / "adapter", "modules_to_train": ["norms"]}
    )
    tuned = trained(tuners.prepare(model, tuner), data)
    assert {id(p) for p in fk.trainable_parameters(tuned)} == {
        id(p) for p in [*own(tuned), *parts_of(tuned, ["head", "norms"])]
    }
    after = family.outputs(tuned)
    plain = tuners.finish(tuned, tuner)
    assert not adapter_layers(plain) and all(p.requires_grad for p in plain.parameters())
    close("bert", plain, after, "merged")
    again = fk.load_adapter(family.model(), tmp_path / "adapter")
    assert all(torch.equal(value, after[key]) for key, value in family.outputs(again).items())


def test_the_tuner_as_recipes_and_the_command_line_say_it() -> None:
    given = parse_settings(["parts=[{name: sparsegrad, targets: ffn}, {name: dsee, targets: qv, rank: 4}]"])
    tuner = tuners.get({"name": "combined", **given})
    assert [method.name for method in tuner.method.methods] == ["sparsegrad", "dsee"]
    assert tuner.method.methods[1].rank == 4
    assert tuners.get({"name": "combined", **tuner.model_dump()}) == tuner
    assert check_tuner("combined", given) is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"name": "dsee"}], "two tuners or more"),
        ([{"name": "dsee"}, {"name": "lora"}], "lora puts no updates"),
        ([{"name": "dsee"}, {"name": "meprop", "of": "outputs"}], "meprop puts no updates"),
        ([{"name": "dsee"}, {"name": "dse"}], "'dse'"),
        ([{"name": "dsee"}, {"name": "mask", "shar": 0.1}], "shar"),
        ([{"name": "dsee"}, {"name": "mask", "head": False}], "head is about the whole model"),
    ],
)
def test_wrong_parts_are_one_line(parts: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(FfnkitError, match=message) as error:
        tuners.get({"name": "combined", "parts": parts})
    assert "\n" not in str(error.value)


# Updates on compressed models ----------------------------------------------------------------------------------------

COMPRESSED: dict[str, Callable[[], list[Any]]] = {
    "fused": lambda: [fk.Fusion(width=0.5, restarts=1)],
    "narrowed": lambda: [fk.methods.build("magnitude", width=0.5)],
    "merged": lambda: [fk.Merging(layers="all", match=False)],
    "heads removed": lambda: [HEADS],
    "fused, heads removed": lambda: [fk.Fusion(width=0.5, restarts=1), HEADS],
    "masked FFNs": lambda: [fk.Prune(sparsity=0.5, targets="ffn")],
}


@pytest.mark.parametrize(
    ("name", "kind", "how"), crossed(["bert", "llama"], COMPRESSED, ["one plan", "one after the other", "one plan"])
)
def test_dsee_on_the_attention_of_a_compressed_model(name: str, kind: str, how: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    data = batches(name, model)
    methods = [*COMPRESSED[kind](), on_attention()]
    apply(model, *([fk.Combined(methods)] if how == "one plan" else methods))
    assert {layer.kind for layer in adapter_layers(model).values()} == {"dsee"}
    check(name, model, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    crossed(["bert", "llama"], ["fused", "narrowed", "merged", "heads removed", "fused, heads removed"]),
)
def test_both_updates_on_a_compressed_model(name: str, kind: str, tmp_path: Path) -> None:
    """FFNs that keep a factor apart are folded first; FFNs that layers share get one update."""
    model = FAMILIES[name].model()
    data = batches(name, model)
    fk.fold(apply(model, *COMPRESSED[kind]()))
    apply(model, fk.Combined([on_ffns(), on_attention()]), data=data)
    count = sum(layer.kind == "sparsegrad" for layer in adapter_layers(model).values())
    assert count == len(ffns(model)) * (3 if name == "llama" else 2)
    check(name, model, data, tmp_path)


def test_neurons_go_and_what_is_left_is_updated_in_one_plan(tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    methods = [fk.methods.build("magnitude", width=0.5), HEADS, on_ffns(), on_attention()]
    plan = fk.plan(model, fk.Combined(methods), data=data)
    assert "sparsegrad" in str(plan) and "20 neurons" in str(plan) and "heads" in str(plan)
    plan.save(tmp_path / "plan")
    other = FAMILIES["bert"].model()
    fk.apply(other, fk.Plan.load(tmp_path / "plan"))
    fk.apply(model, plan)
    wanted = FAMILIES["bert"].outputs(model)
    assert all(torch.equal(value, wanted[key]) for key, value in FAMILIES["bert"].outputs(other).items())
    assert {ffn.width for ffn in ffns(model)} == {20}
    check("bert", model, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    crossed(["bert", "llama", "gpt2"], ["masked", "heads removed", "narrowed", "merged", "all of it"]),
)
def test_lora_on_a_pruned_model(name: str, kind: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    data = batches(name, model)
    masked = [fk.Prune(sparsity=0.5)]
    methods = {"masked": masked, "all of it": [fk.methods.build("magnitude", width=0.5), HEADS, *masked]}.get(kind)
    apply(model, *(COMPRESSED[kind]() if methods is None else methods))
    before = family.outputs(model)
    places = {each.label: each.stored == 0 for each in prunable(fk.fold(model), "all")}
    tuner = tuners.get({"name": "lora", "targets": "all", "rank": 2, "keep_zeros": True})
    tuned: Any = tuner.prepare(model)
    for key, value in family.outputs(tuned.get_base_model()).items():
        assert_close(value, before[key], rel=1e-5, what=key)
    trained(tuned, data)
    apart = family.outputs(tuned.get_base_model())
    trains = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert trains and all("lora_" in n or "modules_to_save" in n for n in trains)
    plain: Any = tuner.finish(tuned)
    zeros = {each.label: each.stored == 0 for each in prunable(plain, "all")}
    assert all(torch.equal(zeros[label], gone) for label, gone in places.items())
    after = family.outputs(plain)
    if kind not in ("masked", "all of it"):  # else the merge keeps zeros, and loses what the adapter did there
        assert all(torch.allclose(value, apart[key], rtol=1e-4, atol=1e-5) for key, value in after.items())
    fk.save(plain, tmp_path / "saved")
    close(name, fk.load(tmp_path / "saved").eval(), after, "saved")


# Pruning after updates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_heads_go_from_a_model_with_both_updates(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    data = batches(name, model)
    apply(model, fk.Combined([on_ffns(), on_attention()]), data=data)
    trained(model, data)
    heads = [attention.heads for attention in attentions(model)]
    count = len(adapter_layers(model))
    apply(model, fk.RemoveHeads(remove=1, by="update"))
    assert [attention.heads for attention in attentions(model)] < heads
    assert len(adapter_layers(model)) == count
    check(name, model, data, tmp_path)


@pytest.mark.parametrize("kind", ["fused", "narrowed", "merged", "heads removed", "low rank"])
def test_ffns_without_updates_are_compressed_beside_updates(kind: str, tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    trained(apply(model, on_attention()), data)
    apply(model, *([fk.methods.build("svd", width=0.5)] if kind == "low rank" else COMPRESSED[kind]()))
    assert len(adapter_layers(model)) == 6
    check("bert", model, data, tmp_path)


def test_weights_go_below_both_updates_and_stay_zero(tmp_path: Path) -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    apply(model, fk.Combined([on_ffns(), on_attention()]), data=data)
    trained(model, data)
    apply(model, fk.Prune(sparsity=0.5))
    gone = {name: layer.base == 0 for name, layer in adapter_layers(model).items()}
    masks = {each.label: each.stored == 0 for each in prunable(model, "all")}
    assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(
        0.5 * sum(mask.numel() for mask in masks.values()), abs=2
    )
    trained(model, data)
    assert all(torch.equal(layer.base == 0, gone[name]) for name, layer in adapter_layers(model).items())
    fk.fold(model, masked=True)
    after = {each.label: each.stored == 0 for each in prunable(model, "all")}
    assert all(torch.equal(after[label], mask) for label, mask in masks.items())


# What does not compose -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, list[Any], Any, str]] = {
    "update on an updated linear": ("bert", [on_attention()], on_attention(), r"an update \(dsee\) is on .*query"),
    "update on an updated linear of more": ("bert", [on_attention()], on_attention(targets="all"), "dsee.*is on"),
    "two updates of one linear in one plan": (
        "bert",
        [],
        fk.Combined([on_attention(), on_ffns(targets=".*query")]),
        "changed by dsee too",
    ),
    "fusing updated FFNs": ("bert", [on_ffns()], fk.Fusion(width=0.5), "an update trains beside"),
    "fusing updated FFNs in one plan": (
        "bert",
        [],
        fk.Combined([on_ffns(), fk.Fusion(width=0.5, restarts=1)]),
        "an update of an earlier method is on",
    ),
    "updating merged FFNs in one plan": (
        "bert",
        [],
        fk.Combined([fk.Merging(layers="all", match=False), on_ffns()]),
        "an earlier method merges",
    ),
    "updating FFNs with a factor apart": (
        "bert",
        [fk.Fusion(width=0.5, restarts=1)],
        on_ffns(),
        r"edited already \(scaled\). Fold",
    ),
    "updating masked linears": ("bert", [fk.Prune(targets="attention")], on_attention(), r"edited already \(masked\)"),
    "heads that share a norm": ("olmo2", [], HEADS, "norm"),
    "a share of no heads": ("bert", [HEADS], HEADS, "one has to stay"),
    "updates of experts in one tensor": ("mixtral", [], on_ffns(), "several experts in one 3-D parameter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_compose_is_refused_and_nothing_changed(case: str) -> None:
    name, before, wrong, message = REFUSED[case]
    model = FAMILIES[name].model()
    data = batches(name, model)
    apply(model, *before, data=data)
    kept = {n: p.detach().clone() for n, p in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(FfnkitError, match=message) as error:
        apply(model, wrong, data=data)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, kept[n]) for n, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [fk.Prune(), HEADS, fk.Fusion(width=0.5)], ids=["prune", "heads", "fusion"])
def test_weights_in_few_bits_take_updates_but_no_pruning(method: Any) -> None:
    pytest.importorskip("bitsandbytes")
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    quantizing.quantize(model, "nf4", keep=["classifier", "bert.pooler"])
    with pytest.raises(FfnkitError, match="quantized"):
        fk.plan(model, method)
    apply(model, fk.Combined([on_attention(), on_attention(targets=r".*attention\.output\.dense")]))
    assert len(adapter_layers(model)) == 9
    trained(model, data)
    with pytest.raises(FfnkitError, match="quantized"):
        fk.plan(model, method)


@pytest.mark.parametrize("method", [fk.Prune(), HEADS, on_attention(), on_ffns(), on_ffns(targets="attention")])
def test_an_adapter_of_peft_is_merged_before_what_needs_its_linears(method: Any) -> None:
    model = FAMILIES["bert"].model()
    data = batches("bert", model)
    tuned: Any = tuners.get({"name": "lora", "targets": "all", "rank": 2}).prepare(model)
    with pytest.raises(FfnkitError, match="adapter of peft") as error:
        fk.plan(tuned.get_base_model(), method, data=data)
    assert "\n" not in str(error.value) and "Merge the adapter" in str(error.value)
    merged: Any = tuners.finish(tuned)
    fk.apply(merged, fk.plan(merged, method, data=data))  # the control


def test_lora_on_updates_merges_them_first() -> None:
    family = FAMILIES["bert"]
    model = family.model()
    data = batches("bert", model)
    after = family.outputs(trained(apply(model, on_ffns(), data=data), data))
    tuned: Any = tuners.get({"name": "lora", "targets": "all", "rank": 2}).prepare(model)
    assert not adapter_layers(tuned)
    close("bert", tuned.get_base_model(), after, "merged", rel=1e-6)


def test_sparsegrad_wants_weights_that_have_gradients() -> None:
    model = FAMILIES["bert"].model()
    model.bert.encoder.layer[0].intermediate.dense.__class__ = type("Linear4bit", (nn.Linear,), {})
    with pytest.raises(FfnkitError, match="quantized"):
        on_ffns(targets=r".*layer\.0\.intermediate\.dense").chosen(model)


@pytest.mark.parametrize(
    "methods",
    [
        [HEADS, fk.Prune()],
        [HEADS, fk.Fusion(width=0.5, restarts=1)],
        [fk.Merging(layers="all", match=False), fk.Prune()],
        [fk.Merging(layers="all", match=False), HEADS],
        [fk.Fusion(width=0.5, restarts=1), HEADS, fk.Prune(targets="attention")],
    ],
    ids=lambda methods: "+".join(method.name for method in methods),
)
def test_one_plan_does_what_several_do(methods: list[Any], tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    one, two = family.model(), family.model()
    before = family.outputs(one)["logits"]
    apply(one, fk.Combined(methods))
    apply(two, *methods)
    wanted = family.outputs(two)
    close("bert", one, wanted, "one plan", rel=1e-6)
    assert_differs(wanted["logits"], before)
    fk.save(one, tmp_path / "saved")
    close("bert", fk.load(tmp_path / "saved").eval(), wanted, "saved", rel=1e-6)
