"""Applying and folding are whole or not at all, planning reads only, and what is tied stays tied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from methods import crossed
from tolerance import relative_error
from torch import nn

import ffnkit as fk
from ffnkit import methods
from ffnkit.checkpoint import adapters
from ffnkit.edits import SelectNeurons
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.plans import Plan
from ffnkit.surgery import apply as applying
from ffnkit.surgery import writer
from ffnkit.surgery.journal import State, reachable
from ffnkit.surgery.meta import rehearse
from ffnkit.tune import tuners

PLANS: dict[str, Callable[[], Any]] = {
    "fusion": lambda: fk.Fusion(width=0.5, restarts=1),
    "fusion-last": lambda: fk.Fusion(width=0.5, restarts=1, layers="last:1"),
    "calibrated-fusion": lambda: fk.CalibratedFusion(width=0.5, refine=2),
    "sketch": lambda: methods.build("sketch", width=0.5, keep=3),
    "svd": lambda: methods.build("svd", width=0.5),
    "mmd": lambda: methods.build("mmd", width=0.5, steps=2),
    "magnitude": lambda: methods.build("magnitude", width=0.5),
    "importance": lambda: methods.build("importance", width=0.5),
    "reinit": lambda: methods.build("reinit", width=0.5),
    "unstructured": lambda: methods.build("unstructured", width=0.5),
    "prune": lambda: fk.Prune(sparsity=0.5),
    "heads": lambda: fk.RemoveHeads(remove=1),
    "structured": lambda: fk.StructuredPruning(remove_heads=1, remove_neurons=0.5),
    "merging": lambda: fk.Merging(layers="0-1"),
    "layer-drop": lambda: methods.build("layer-drop", layers="last:1"),
    "ffn-drop": lambda: methods.build("ffn-drop", layers="last:1"),
    "sparsegrad": lambda: fk.SparseGrad(density=0.1, batches=1),
    "sparsegrad-magnitude": lambda: fk.SparseGrad(density=0.1, basis="none", choose="magnitude"),
    "sparsegrad-core": lambda: fk.SparseGrad(density=0.1, choose="magnitude", batches=1),
    "dsee": lambda: fk.DSEE(rank=2, nonzeros=4),
    "dsee-magnitude": lambda: fk.DSEE(rank=2, nonzeros=4, support="magnitude", targets="ffn"),
    "dsee-gradient": lambda: fk.DSEE(rank=2, nonzeros=4, support="gradient", batches=1),
    "combined": lambda: fk.Combined([fk.Fusion(width=0.5, restarts=1), fk.RemoveHeads(remove=1)]),
}
KINDS = ("bert", "gpt2", "llama")


def batches(name: str, model: nn.Module) -> list[dict[str, Any]]:
    inputs = FAMILIES[name].inputs(model)
    labels = torch.tensor([0, 1]) if name == "bert" else inputs["input_ids"]
    return [inputs | {"labels": labels}]


def made(name: str, model: nn.Module, method: str) -> Plan:
    return fk.plan(model, PLANS[method](), data=batches(name, model))


def bits(model: nn.Module) -> dict[str, Any]:
    """Every tensor, whether it trains, what modules are, and what the config says."""
    state: dict[str, Any] = {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    state |= {n: (b, b.clone(), False) for n, b in model.named_buffers()}
    modules = {n: (m, type(m), m.training, m.extra_repr()) for n, m in model.named_modules(remove_duplicate=False)}
    return {"tensors": state, "modules": modules, "config": model.config.to_dict()}  # type: ignore[operator,union-attr]


def check_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["modules"] == second["modules"]
    assert first["config"] == second["config"]
    assert list(first["tensors"]) == list(second["tensors"])
    for name, (tensor, value, trains) in first["tensors"].items():
        other, now, still = second["tensors"][name]
        assert tensor is other and trains is still, name
        assert value.dtype == now.dtype and torch.equal(value, now), name


# Planning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "dtype"), crossed(PLANS, [torch.float32, torch.bfloat16, torch.float64]))
def test_planning_changes_no_bit(method: str, dtype: torch.dtype) -> None:
    name = "llama" if method in ("sparsegrad-magnitude", "calibrated-fusion", "dsee") else "bert"
    model = FAMILIES[name].model().to(dtype).train()
    before = bits(model)
    plan = made(name, model, method)
    check_same(bits(model), before)
    copied = copy.deepcopy(model)
    fk.apply(copied, plan)  # and a plan's tensors are its own: what is done to the model is not done to it
    shared = ("left", "right")  # bases are never written to, and too large to be held twice
    again = [{k: v for k, v in edit.tensors().items() if k not in shared} for edit in plan.edits]
    kept = [{k: v.clone() for k, v in each.items()} for each in again]
    for value in [*copied.parameters(), *copied.buffers()]:
        value.data.zero_()
    assert all(torch.equal(v, kept[i][k]) for i, each in enumerate(again) for k, v in each.items())
    check_same(bits(model), before)


def test_a_plan_that_writes_is_seen() -> None:
    """The control: one bit is enough."""
    model = FAMILIES["bert"].model()
    before = bits(model)
    next(model.parameters()).data.view(-1)[0] += 1
    with pytest.raises(AssertionError):
        check_same(bits(model), before)


# All or nothing ------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def breaking(patch: pytest.MonkeyPatch, at: int, error: type[BaseException]) -> list[int]:
    """From the ``at``-th call on of what writes into a real model, an error; the count of calls is in the list."""
    calls = [0]

    def wrap(function: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            if not any(p.is_meta for a in args if isinstance(a, nn.Module) for p in a.parameters()):
                calls[0] += 1
                if calls[0] == at:
                    raise error("on purpose")
            return function(*args, **kwargs)

        return inner

    patch.setattr(writer, "put", wrap(writer.put))
    patch.setattr(applying, "put", wrap(applying.put))
    patch.setattr(nn.Module, "set_submodule", wrap(nn.Module.set_submodule))
    patch.setattr(writer, "let_train", wrap(writer.let_train))
    patch.setattr(writer.description, "update_config", wrap(writer.description.update_config))
    patch.setattr(writer, "run_uneven_experts", wrap(writer.run_uneven_experts))
    return calls


@pytest.mark.parametrize(
    ("method", "name"), crossed([m for m in PLANS if m not in ("fusion-last", "sketch", "reinit", "mmd")], KINDS)
)
def test_what_fails_half_way_leaves_the_model_as_it_was(name: str, method: str) -> None:
    original = FAMILIES[name].model()
    plan = made(name, original, method)
    tries = 0
    for at in (1, 2, 3, 5, 8, 13, 21, 34):
        model = copy.deepcopy(original)
        before = bits(model)
        with pytest.MonkeyPatch.context() as patch:
            error = (Broken, MemoryError, KeyboardInterrupt)[at % 3]
            breaking(patch, at, error)
            try:
                fk.apply(model, plan)
            except error:
                tries += 1
                check_same(bits(model), before)
                continue
        break
    assert tries, "nothing broke"
    applied = fk.apply(copy.deepcopy(original), plan)
    for at in (1, 2, 3, 5, 8, 13):
        model = copy.deepcopy(applied)
        before = bits(model)
        with pytest.MonkeyPatch.context() as patch:
            breaking(patch, at, Broken)
            try:
                fk.fold(model)
            except Broken:
                check_same(bits(model), before)
                continue
        break


def test_without_a_journal_half_of_it_stays() -> None:
    """The control of the breaking: the writer alone undoes nothing."""
    model = FAMILIES["bert"].model()
    plan = made("bert", model, "fusion")
    before = bits(model)
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, 5, Broken)
        with pytest.raises(Broken):
            writer.ModelWriter(model).carry_out(plan.edits)
    with pytest.raises(AssertionError):
        check_same(bits(model), before)


@pytest.mark.parametrize("method", ["dsee", "sparsegrad"])
def test_an_adapter_that_cannot_be_put_on_changes_nothing(method: str, tmp_path: Path) -> None:
    base = FAMILIES["bert"].model()
    tuned = fk.apply(copy.deepcopy(base), made("bert", base, method))
    for parameter in fk.trainable_parameters(tuned):
        parameter.data.add_(0.1)
    fk.save_adapter(tuned, tmp_path / "adapter")
    held = fk.apply(copy.deepcopy(base), made("bert", base, "dsee-magnitude"))
    for at in (1, 2, 3, 5, 8, 13, 21):
        before = bits(held)
        with pytest.MonkeyPatch.context() as patch:
            breaking(patch, at, MemoryError)
            try:
                adapters.load_adapter(held, tmp_path / "adapter")
            except MemoryError:
                check_same(bits(held), before)
                continue
        break
    other = FAMILIES["bert"].model(seed=5)
    before = bits(other)
    with pytest.raises(FfnkitError, match="another one"):
        fk.load_adapter(other, tmp_path / "adapter")
    check_same(bits(other), before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "mixtral", "albert", "switch", "phi3"])
def test_the_rehearsal_has_the_shapes_of_what_comes(name: str) -> None:
    model = FAMILIES[name].model()
    plan = fk.plan(model, PLANS["fusion-last"]())
    before = bits(model)
    twin = rehearse(model, plan.edits)
    check_same(bits(model), before)
    assert all(p.is_meta for p in twin.parameters())
    fk.apply(model, plan)
    here = {n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}
    assert {n: (tuple(t.shape), t.dtype) for n, t in twin.state_dict().items()} == here
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert twin.config.to_dict() == model.config.to_dict()


def test_what_the_rehearsal_refuses_is_refused_before_the_first_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["bert"].model()
    plan = fk.plan(model, methods.build("layer-drop", layers="0-1"))
    whole = Plan(
        plan.method, plan.settings, plan.model,
        (*plan.edits, *fk.plan(model, methods.build("layer-drop", layers="2")).edits),
        plan.shapes, plan.parameters,
    )  # fmt: skip
    seen: list[bool] = []
    real = writer.ModelWriter.carry_out

    def noting(self: Any, edits: Any) -> None:
        seen.append(self.empty)
        real(self, edits)

    monkeypatch.setattr(writer.ModelWriter, "carry_out", noting)
    with pytest.raises(FfnkitError, match="no layer of the stack is left"):
        fk.apply(model, whole)
    assert seen == [True], "on the meta device only"


def test_states_are_references_and_come_back() -> None:
    model = FAMILIES["llama"].model()
    state, before = State.of(model), bits(model)
    fk.apply(model, made("llama", model, "fusion"))
    fk.apply(model, fk.plan(model, fk.DSEE(rank=1, nonzeros=2)))
    state.restore()
    check_same(bits(model), before)
    assert len(list(reachable(model))) == len(list(model.modules())), "no layer hides another one any more"


# Normal form ---------------------------------------------------------------------------------------------------------


def test_edits_out_of_order_are_refused() -> None:
    model = FAMILIES["bert"].model()
    plan = fk.plan(model, fk.Fusion(width=0.5, restarts=1))
    first, scale = plan.edits[0], plan.edits[1]
    for edits, words in (((scale, first), "before it"), ((first, first), "twice")):
        broken = Plan(plan.method, plan.settings, plan.model, edits, plan.shapes, plan.parameters)
        with pytest.raises(FfnkitError, match=words):
            fk.apply(model, broken)
    index = torch.tensor([0, 99], dtype=torch.int32)
    wrong = Plan(
        "x", {}, plan.model, (SelectNeurons(first.target, width=2, index=index),), plan.shapes, plan.parameters
    )
    with pytest.raises(FfnkitError, match="numbers do not fit"):
        fk.apply(model, wrong)


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_and_its_successor_are_one_plan(name: str, tmp_path: Path) -> None:
    base = FAMILIES[name].model()
    heads = fk.plan(base, fk.RemoveHeads(remove=1))
    step = fk.apply(copy.deepcopy(base), heads)
    neurons = fk.plan(step, methods.build("magnitude", width=0.5))
    expected = fk.apply(step, neurons)
    masks = fk.plan(expected, fk.Prune(sparsity=0.5))
    fk.apply(expected, masks)
    whole = heads.then(neurons).then(masks)
    whole.save(tmp_path / "plan")
    model = fk.apply(copy.deepcopy(base), Plan.load(tmp_path / "plan"))
    for one, two in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    assert sum(p.numel() for p in model.parameters()) == whole.parameters - whole.saved_parameters
    with pytest.raises(FfnkitError, match="has .* before it|was made for"):
        masks.then(heads)
    with pytest.raises(FfnkitError, match="twice"):
        heads.then(neurons).then(fk.plan(fk.apply(copy.deepcopy(base), heads.then(neurons)), PLANS["magnitude"]()))
    gone = fk.plan(base, methods.build("layer-drop", layers="last:1"))
    later = fk.plan(fk.apply(copy.deepcopy(base), gone), methods.build("magnitude", width=0.5))
    with pytest.raises(FfnkitError, match="other numbers by then"):
        gone.then(later)


# Ties ----------------------------------------------------------------------------------------------------------------


def tied_by_parameter(cls: Any, config: Any) -> Any:
    """A model whose FFNs of layers 1 and 2 hold the very same parameters in linears of their own."""
    torch.manual_seed(0)
    model = cls(config).eval()
    first, second = ffns(model)[1:3]
    for site in first.sites:
        one, two = first.linear(site), second.linear(site)
        two.weight = one.weight
        if one.bias is not None:
            two.bias = one.bias
    assert len(ffns(model)) == 3
    return model


SMALL = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4,
    "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
TIED = {
    "llama": lambda: (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL)),
    "bert": lambda: (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=96, n_embd=16, n_layer=4, n_head=2, n_positions=32, initializer_range=0.3),
    ),
}
IDS = torch.arange(3, 27).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in fk.trainable_parameters(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize(("name", "tuner"), crossed(TIED, ["lora", "sparsegrad", "dsee", "mask"]))
def test_ffns_tied_by_parameter_are_tuned_as_one(name: str, tuner: str, tmp_path: Path) -> None:
    model = tied_by_parameter(*TIED[name]())
    settings: dict[str, Any] = {"name": tuner, "targets": "ffn", "head": False}
    tuned: Any
    if tuner == "sparsegrad":
        tuned = fk.apply(
            model, fk.plan(model, fk.SparseGrad(density=0.1, basis="none", choose="random", modules_to_train=()))
        )
    else:
        tuned = tuners.prepare(model, settings)
    expected = logits(trained(tuned))
    plain = fk.fold(tuned) if tuner == "sparsegrad" else tuners.finish(tuned)
    assert relative_error(logits(plain), expected) < 1e-5
    one, two = ffns(plain)[1], plain.get_submodule(next(iter(ffns(plain)[1].tied)))
    assert one.linear("up").weight is one.linear("up", two).weight, "what is tied stays tied"
    fk.save(plain, tmp_path / "compact")
    assert relative_error(logits(fk.load(tmp_path / "compact")), expected) < 1e-5
    fk.export(plain, tmp_path / "standard")
    assert relative_error(logits(type(plain).from_pretrained(tmp_path / "standard")), expected) < 1e-5


@pytest.mark.parametrize("name", list(TIED))
def test_updates_of_a_head_tied_to_the_embeddings_are_refused(name: str) -> None:
    cls, config = TIED[name]()
    config.tie_word_embeddings = True
    model = cls(config)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    for refuse in (
        lambda: fk.apply(model, fk.plan(model, fk.DSEE(rank=1, nonzeros=2, targets=head.replace(".", r"\.")))),
        lambda: fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5, targets=head.replace(".", r"\.")))),
        lambda: tuners.prepare(model, {"name": "lora", "targets": head.replace(".", r"\."), "head": False}),
    ):
        before = bits(model)
        with pytest.raises(FfnkitError, match="tied to|no linear that can be pruned"):
            refuse()
        check_same(bits(model), before)
    config = copy.deepcopy(config)  # the control: with weights of its own it goes
    config.tie_word_embeddings = False
    fk.apply(other := cls(config), fk.plan(other, fk.DSEE(rank=1, nonzeros=2, targets=head.replace(".", r"\."))))


@pytest.mark.parametrize("tuner", ["lora", "sparsegrad", "dsee", "full", "ffn", "head"])
def test_masked_language_models_reopen_as_they_were_tuned(tuner: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).eval()
    if tuner == "sparsegrad":
        tuned: Any = fk.apply(model, fk.plan(model, fk.SparseGrad(density=0.1, basis="none", choose="random")))
    else:
        tuned = tuners.prepare(model, tuner)
    expected = logits(trained(tuned))
    plain = fk.fold(tuned) if tuner == "sparsegrad" else tuners.finish(tuned)
    assert relative_error(logits(plain), expected) < 1e-5
    plain.save_pretrained(tmp_path / "plain")
    assert relative_error(logits(transformers.BertForMaskedLM.from_pretrained(tmp_path / "plain")), expected) < 1e-5


def test_a_tie_that_an_edit_does_not_reach_is_refused() -> None:
    model = FAMILIES["llama"].model()
    first, second = ffns(model)[:2]
    second.linear("up").weight = first.linear("up").weight  # type: ignore[assignment]
    before = bits(model)
    with pytest.raises(FfnkitError, match="tied to"):
        fk.plan(model, methods.build("magnitude", width=0.5))
    check_same(bits(model), before)
