"""Sizes that are constants of ours, data of one token, padding without an embedding, data from a generator."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods import EVERY, crossed, slow_but

import ffnkit as fk
from ffnkit import methods, tasks, tune
from ffnkit.analysis.energy import gradient_energy
from ffnkit.analysis.ntk import NtkSettings
from ffnkit.analysis.similarity import similarity
from ffnkit.errors import FfnkitError
from ffnkit.report.sparsity import merge_costs

VOCAB, DOCS = 96, Path(__file__).resolve().parents[1] / "docs"
CONFIGS: dict[str, tuple[str, str, dict[str, str]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", {}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
         "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
    ),
}  # fmt: skip
# d, ff, rows, tokens: probes hold 64 tokens and 64 neurons, blocks 512 and 1024, widths go by 8 and 64.
SIZES = [(64, 64, 8, 8), (32, 64, 64, 1), (64, 128, 1, 64), (16, 512, 16, 32)]


def model_of(name: str, d: int = 16, ff: int = 24) -> Any:
    model, config, names = CONFIGS[name]
    sizes = {"hidden_size": d, "intermediate_size": ff, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {names.get(key, key): value for key, value in {**sizes, "max_position_embeddings": 80}.items()}
    torch.manual_seed(0)
    built = getattr(transformers, config)(vocab_size=VOCAB, **given)
    return getattr(transformers, model)(built).eval()


def batch(model: Any, rows: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    ids = torch.randint(4, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__ else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def finite(model: Any, plan: fk.Plan) -> bool:
    fk.apply(model, plan)
    with torch.no_grad():
        return bool(torch.isfinite(model(batch(model, 2, 5)["input_ids"]).logits).all())


@pytest.mark.parametrize(("name", "size"), crossed(CONFIGS, SIZES))
def test_sizes_that_are_constants_of_ours(name: str, size: tuple[int, int, int, int]) -> None:
    d, ff, rows, tokens = size
    model = model_of(name, d, ff)
    data = [batch(model, rows, tokens)]
    for method in (fk.CalibratedFusion(0.5, refine=1), methods.Importance(0.5), fk.Merging(layers="0-1")):
        found = fk.plan(model, method, data=data)
        assert found.edits
    kernel = NtkSettings(examples=2, layers="last:1") if rows > 1 and tokens > 1 else False
    row = fk.analyze(model, [methods.Importance(0.5)], calibration=data, data=data, ntk=kernel).rows[0]
    assert row.errors is not None and all(0 < each < 2 for each in row.errors.output.values() if each is not None)
    assert sum(fk.allocate(model, 0.6, data=data).values()) < 2 * ff


REFUSED = {"merging": "1 tokens, too few to compare", "heads": "", "combined": ""}


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("method", slow_but(["calibrated-fusion", "importance", "merging"], EVERY))
def test_data_of_one_token(method: str, name: str) -> None:
    model = model_of(name, 16, 24)
    data = [batch(model, 1, 1)]
    if method == "merging":
        with pytest.raises(FfnkitError, match=REFUSED[method]):
            fk.plan(model, EVERY[method](features="up"), data=data)
        return
    makes = {"heads": fk.RemoveHeads(remove=1)}
    made = makes[method] if method in makes else EVERY[method]()
    try:
        found = fk.plan(model, made, data=data)
    except FfnkitError as error:  # nothing to forecast: a decoder's one token has no loss
        assert "\n" not in str(error)
        return
    assert finite(model, found)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_widths_by_layer_from_hardly_any_data(name: str, tokens: int) -> None:
    model = model_of(name, 32, 48)
    found = fk.allocate(model, 0.5, data=[batch(model, 1, tokens)])
    assert 0 < sum(found.values()) <= 48 and all(row.cost is not None and row.cost >= 0 for row in found.rows)


# ---- padding


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_padding_may_have_no_embedding(name: str) -> None:
    """A "[PAD]" that was added to the tokenizer, and no row for it to the model."""
    model = model_of(name)
    good = batch(model, 4, 6)
    good["attention_mask"][1:, 3:] = 0
    if good["labels"].ndim == 2:
        good["labels"] = good["labels"].masked_fill(good["attention_mask"] == 0, -100)
    good["input_ids"] = good["input_ids"].masked_fill(good["attention_mask"] == 0, 0)
    beyond = {**good, "input_ids": good["input_ids"].masked_fill(good["attention_mask"] == 0, VOCAB)}
    asked: list[Any] = [
        fk.CalibratedFusion(0.5, refine=1), methods.Importance(0.5), fk.Merging(layers="0-1"),
        methods.build("layer-drop", window=1), fk.SparseGrad(density=0.1), fk.Prune(sparsity=0.5, by="wanda"),
    ]  # fmt: skip
    for method in asked:
        assert fk.plan(model, method, data=[beyond]) == fk.plan(model, method, data=[good]), method.name
    assert fk.allocate(model, 0.5, data=[beyond]) == fk.allocate(model, 0.5, data=[good])
    kernel = NtkSettings(examples=2, layers="last:1")
    fk.analyze(model, [methods.Magnitude(0.5)], data=[beyond], ntk=kernel)
    student = model_of(name)
    fk.apply(student, fk.plan(student, methods.Magnitude(0.5)))
    tune.distil(student, model, [beyond], tune.DistilSettings(steps=1), progress=False)
    counted = {**good, "input_ids": good["input_ids"].index_fill(1, torch.tensor([0]), VOCAB + 3)}
    with pytest.raises(FfnkitError, match=f"token {VOCAB + 3}, and the model has embeddings for {VOCAB} tokens"):
        fk.plan(model, methods.Importance(0.5), data=[counted])


# ---- generators


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_generator_works_wherever_a_list_does(name: str) -> None:
    model = model_of(name)
    held = [batch(model, 4, 6, seed) for seed in range(3)]

    def given() -> Iterator[dict[str, Any]]:
        yield from held

    asked: list[Any] = [make() for key, make in EVERY.items() if key not in ("heads", "layer-drop", "ffn-drop")]
    asked += [methods.build("layer-drop", window=1), methods.build("ffn-drop", window=1), fk.Merging(window=2)]
    asked += [fk.Merging(layers="0-1", correct="output"), fk.Prune(sparsity=0.5, by="wanda")]
    asked += [fk.RemoveHeads(remove=1, by="activation"), fk.DSEE(rank=2, nonzeros=4, support="gradient")]
    for method in asked:
        assert fk.plan(model, method, data=given()) == fk.plan(model, method, data=held), method
    assert fk.allocate(model, 0.5, data=given()) == fk.allocate(model, 0.5, data=held)
    found = [
        fk.analyze(model, [fk.CalibratedFusion(0.5)], data=data(), calibration=data(), ntk=NtkSettings(examples=4))
        for data in (given, lambda: held)
    ]
    assert found[0].rows == found[1].rows and found[0].conditions == found[1].conditions
    assert str(similarity(model, given())) == str(similarity(model, held))
    energy = [
        gradient_energy(model, one(), one(), steps=(0, 1), training=one(), targets="ffn").layers
        for one in (given, lambda: held)
    ]
    assert energy[0] == energy[1]
    weights = []
    for one in (given, lambda: held):
        student = model_of(name)
        fk.apply(student, fk.plan(student, methods.Magnitude(0.5)))
        tune.distil(student, model, one(), tune.DistilSettings(steps=7), progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*weights)
    for tuner in ("sparsegrad", "meprop", {"name": "dsee", "support": "gradient"}):
        tuned = model_of(name)
        tune.tuners.prepare(tuned, tuner, given())
        assert fk.trainable_parameters(tuned)
    costs = [merge_costs(tuned, one()) for one in (given, lambda: held)]
    assert costs[0] == costs[1]


def test_no_more_of_a_generator_is_taken_than_is_needed() -> None:
    model, student = model_of("bert"), model_of("bert")
    fk.apply(student, fk.plan(student, methods.Magnitude(0.5)))
    taken = []

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            taken.append(len(taken))
            yield batch(model, 2, 4, len(taken))

    tune.distil(student, model, endless(), tune.DistilSettings(steps=3), progress=False)
    assert len(taken) <= 4


# ---- as documented


def test_names_in_the_docs_are_there() -> None:
    """``tune.tuners.prepare`` and the like: each dotted name of ours in a page, from a fresh look-up."""
    roots = {"fk": fk, "ffnkit": fk, "tune": tune, "tasks": tasks, "methods": methods}
    found: set[str] = set()
    for page in sorted(DOCS.glob("*.md")):
        for name in re.findall(
            r"(?<![\w./])((?:fk|tune|tasks|methods)(?:\.[A-Za-z_]\w*)+)(?=[(`,) ])", page.read_text()
        ):
            if name.endswith(".md"):
                continue
            found.add(f"{page.name}: {name}")
    assert len(found) > 60
    missing = []
    for each in sorted(found):
        parts = each.partition(": ")[2].split(".")
        value: Any = roots[parts[0]]
        for part in parts[1:]:
            if not hasattr(value, part):
                missing.append(each)
                break
            value = getattr(value, part)
    assert not missing, missing
    assert "data" in inspect.signature(tune.tuners.prepare).parameters
