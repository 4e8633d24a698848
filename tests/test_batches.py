"""Data in every form, dtype and mode give every method with data the same plan; what is no data is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from families import ENCODER, FAMILIES
from methods import slow_but
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

import ffnkit as fk
from ffnkit.calibration.batches import evaluating, run
from ffnkit.errors import FfnkitError
from ffnkit.methods import FfnDrop, Importance, LayerDrop
from ffnkit.model.finding import ffns
from ffnkit.model.running import few_rows
from ffnkit.plans import Plan

# every method that takes data, in a form that needs them
METHODS: dict[str, Any] = {
    "importance": Importance(0.5),
    "calibrated": fk.CalibratedFusion(0.5, refine=3),
    "calibrated-sequential": fk.CalibratedFusion(0.5, refine=0, sequential=True),
    "merging": fk.Merging(layers="all", features="up", tokens=40),
    "merging-similar": fk.Merging(groups="similar", keep=2, features="up", tokens=40),
    "layer-drop": LayerDrop(window=1),
    "ffn-drop": FfnDrop(window=1),
    "wanda": fk.Prune(by="wanda"),
    "heads": fk.RemoveHeads(0.5, by="activation"),
    "structured": fk.StructuredPruning(remove_heads=0.5, remove_neurons=0.25, by="activation"),
    "sparsegrad": fk.SparseGrad(batches=4),
    "dsee": fk.DSEE(support="gradient"),
    "combined": fk.Combined([Importance(0.5, layers="0"), fk.CalibratedFusion(0.5, layers="1", refine=0)]),
}


class Again:
    """Neither list nor iterator."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "generator": lambda batches: (batch for batch in batches),
    "iterator": iter,
    "loader": lambda batches: DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
    "again": Again,
    "encoding": lambda batches: [BatchEncoding(batch) for batch in batches],
}


def _model() -> nn.Module:
    return FAMILIES["bert"].model()


def _batches(model: nn.Module) -> list[dict[str, Any]]:
    family = FAMILIES["bert"]
    return [family.inputs(model, seed=seed) | {"labels": torch.tensor([0, seed % 3])} for seed in range(4)]


def _same(one: Plan, two: Plan) -> bool:
    if len(one.edits) != len(two.edits) or str(one) != str(two):
        return False
    for a, b in zip(one.edits, two.edits, strict=True):
        first, second = a.tensors(), b.tensors()
        if list(first) != list(second) or not all(torch.equal(first[k], second[k]) for k in first):
            return False
    return True


@pytest.mark.parametrize(
    "name", slow_but({"importance", "calibrated", "merging", "layer-drop", "heads", "sparsegrad"}, METHODS)
)
def test_every_form_of_data_gives_the_same_plan(name: str) -> None:
    model, method = _model(), METHODS[name]
    batches = _batches(model)
    wanted = fk.plan(model, method, data=batches)
    for form, make in FORMS.items():
        assert _same(fk.plan(model, method, data=make(batches)), wanted), form
    model.train()  # dropout would change what is measured
    assert _same(fk.plan(model, method, data=batches), wanted)
    assert model.training
    # the negative control: other data, another plan
    others = [{**batch, "input_ids": batch["input_ids"].flip(0, 1), "labels": 2 - batch["labels"]} for batch in batches]
    if not name.endswith("drop") and name not in ("heads", "merging-similar"):
        assert not _same(fk.plan(model, method, data=others[:1]), wanted)


BAD: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "none": (lambda _: [], "there are no batches"),
    "spent": (lambda _: iter(()), "only once"),
    "one batch": (lambda batches: batches[0], "a lone dict"),
    "one encoding": (lambda batches: BatchEncoding(batches[0]), "a lone BatchEncoding"),
    "tuples": (lambda batches: [tuple(batch.values()) for batch in batches], "a tuple of Tensor"),
    "tensors": (lambda batches: [batch["input_ids"] for batch in batches], "a Tensor, not a dict"),
    "rows of lists": (lambda batches: [{"input_ids": [5, 6, 7], "labels": 1}], "input_ids is a list"),
    "rows of tensors": (lambda batches: [{"input_ids": batches[0]["input_ids"][0]}], "a single row"),
    "empty batch": (lambda batches: [{}], "batch 0 is empty"),
    "no rows": (lambda batches: [{k: v[:0] for k, v in batches[0].items()}], "batch 0 is empty"),
    "a number": (lambda _: 3, "a int"),
    "a name": (lambda _: "texts.txt", "a str"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_data_is_refused_in_one_line(name: str, bad: str) -> None:
    model = _model()
    make, said = BAD[bad]
    data = make(_batches(model))
    with pytest.raises(FfnkitError) as caught:
        fk.plan(model, METHODS[name], data=data)
    assert said in caught.value.found, str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.do
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["vit", "clip", "whisper"])
def test_floats_come_in_the_models_dtype(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    inputs = family.inputs(family.model())
    model = family.model().to(dtype)
    fk.plan(model, Importance(0.5), data=[inputs])
    if name == "whisper":  # which this family, unlike the others, does not do itself
        with pytest.raises(RuntimeError):
            model(**inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_labels_of_a_regression_come_in_the_models_dtype(dtype: torch.dtype) -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER, num_labels=1)).to(dtype)
    batch = FAMILIES["bert"].inputs(FAMILIES["bert"].model()) | {"labels": torch.tensor([0.5, 1.5])}
    fk.plan(model, fk.DSEE(support="gradient"), data=[batch])


def test_each_modules_own_mode_comes_back_whatever_happens() -> None:
    model = _model().train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.LayerNorm)).eval()
    with pytest.raises(FfnkitError, match="token 10000"):
        run(model, [{"input_ids": torch.full((1, 3), 10_000)}])
    assert [module for module in model.modules() if not module.training] == [frozen]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        model.train()
        raise KeyError
    assert [module for module in model.modules() if not module.training] == [frozen]


def test_labels_are_left_out_or_kept_as_asked() -> None:
    model, seen = _model(), []
    batches = _batches(model)[:1]
    run(model, batches, after=lambda _, output: seen.append(output.loss))
    run(model, batches, after=lambda _, output: seen.append(output.loss), labels=True)
    assert seen[0] is None and seen[1] is not None
    writes = FAMILIES["t5"].model()
    run(writes, [{"input_ids": torch.full((1, 3), 7), "labels": torch.full((1, 2), 8)}])
    with pytest.raises(ValueError):  # whose decoder has no inputs without them
        run(writes, [{"input_ids": torch.full((1, 3), 7)}])


def test_gradients_that_were_there_stay() -> None:
    model = _model()
    held = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = held[name]
    frozen = next(model.parameters()).requires_grad_(False)
    fk.plan(model, fk.DSEE(support="gradient"), data=_batches(model))
    assert all(parameter.grad is held[name] for name, parameter in model.named_parameters())
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]


@pytest.mark.parametrize(
    ("more", "length"),
    [
        ({}, 3),
        ({"attention_mask": torch.ones(4, 9, dtype=torch.long)}, 3),
        ({"labels": torch.ones(4, dtype=torch.long)}, 3),
        ({"attention_mask": (torch.arange(9) > 4).long().expand(4, 9)}, 9),  # padding on the left
        ({"pixel_values": torch.ones(4, 3, 2, 2)}, 9),  # a text that tells where its images go
        ({"decoder_input_ids": torch.ones(4, 5, dtype=torch.long)}, 9),
    ],
    ids=["text", "mask", "classes", "left", "image", "two"],
)
def test_few_tokens_are_taken_of_text_alone(more: dict[str, torch.Tensor], length: int) -> None:
    found = few_rows({"input_ids": torch.ones(4, 9, dtype=torch.long), **more}, tokens=3)
    assert found["input_ids"].shape == (2, length)
    assert all(len(value) == 2 for value in found.values())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "bart"])
def test_logits_that_nobody_reads_are_not_made(name: str) -> None:
    """A pass for hidden neurons alone gives the same ones; whoever listens to the head gets every token."""
    model = FAMILIES[name].model()
    given = [FAMILIES[name].inputs(model, seed=seed) for seed in range(2)]
    head, seen = model.get_output_embeddings(), list[int]()
    real = head.forward

    def forward(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return real(x)

    whole = given[0].get("decoder_input_ids", given[0]["input_ids"]).shape[1]
    head.forward = forward
    least = 1 if "logits_to_keep" in inspect.signature(model.forward).parameters else whole
    run(model, given)
    assert set(seen) == {least}
    run(model, given, after=lambda *_: None, logits=False)
    assert set(seen) == {least}
    seen.clear()
    run(model, given, after=lambda *_: None)
    handle = head.register_forward_hook(lambda *_: None)
    run(model, given)
    handle.remove()
    assert set(seen) == {whole}
    del head.forward
    one, all_of = (neurons_of(model, given, after) for after in (None, lambda *_: None))
    assert torch.equal(one, all_of)


def neurons_of(model: nn.Module, given: list[dict[str, Tensor]], after: Any) -> Tensor:
    ffn, found = ffns(model)[-1], list[Tensor]()
    handle = ffn.linear("down").register_forward_pre_hook(lambda _, args: found.append(args[0].flatten()))
    run(model, given, after=after)
    handle.remove()
    return torch.cat(found)
