"""Whole layers dropped, and FFNs alone: what is left is an ordinary, shorter model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_contract import same, snapshot
from tolerance import assert_close
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.layers import FfnDrop, LayerDrop
from ffnkit.model.finding import ffns
from ffnkit.surgery.temporary import temporarily

STACKS = {"bert": 3, "gpt2": 3, "llama": 3, "vit": 3, "bart": 5, "t5": 5, "gemma2": 3}


def data(name: str, model: nn.Module) -> list[dict[str, Any]]:
    return [FAMILIES[name].inputs(model, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("name", STACKS)
def test_a_model_without_a_layer_is_the_shorter_model(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    plan = fk.plan(model, LayerDrop(layers="1"))
    before = sum(p.numel() for p in model.parameters())
    whole, outputs = snapshot(model), family.outputs(model)
    with temporarily(model, plan.edits):
        tried = family.outputs(model)
    assert same(snapshot(model), whole)
    assert all(torch.equal(value, outputs[key]) for key, value in family.outputs(model).items())
    plan.save(tmp_path / "plan")
    fk.apply(model, fk.Plan.load(tmp_path / "plan"))
    assert sum(p.numel() for p in model.parameters()) == before - plan.saved_parameters
    assert len(ffns(model)) == STACKS[name] - (2 if name in ("bart", "t5") else 1)
    assert any(not torch.equal(value, outputs[key]) for key, value in tried.items())
    model.save_pretrained(tmp_path / "plain")  # an ordinary model: no ffnkit needed
    for opened in (model, type(model).from_pretrained(tmp_path / "plain")):
        for key, value in family.outputs(opened).items():
            assert_close(value, tried[key], rel=1e-6, what=key)


def test_the_cache_follows_the_new_numbers() -> None:
    family = FAMILIES["llama"]
    model = family.model()
    fk.apply(model, fk.plan(model, LayerDrop(layers="0")))
    ids = family.inputs(model)["input_ids"][:1]
    made = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=None)
    assert torch.equal(made, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False, eos_token_id=None))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_ragged_widths_stay_with_their_layers(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    fk.apply(model, fk.plan(model, fk.Fusion(width=8, layers="2")))
    fk.fold(model)
    fk.apply(model, fk.plan(model, LayerDrop(layers="0")))
    assert [ffn.width for ffn in ffns(model)] == [40, 8]
    fk.save(model, tmp_path / "small")
    for key, value in family.outputs(fk.load(tmp_path / "small")).items():
        assert_close(value, family.outputs(model)[key], rel=1e-6, what=key)


def test_a_dropped_ffn_adds_nothing_and_stays_so_under_training(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    model = family.model()
    silenced = copy.deepcopy(model)
    for ffn in ffns(silenced)[1:]:
        ffn.write(ffn.raw().map(torch.zeros_like))
    fk.apply(model, fk.plan(model, FfnDrop(layers="last:2")))
    assert [ffn.width for ffn in ffns(model)] == [24, 1, 1]
    for key, value in family.outputs(model).items():
        assert_close(value, family.outputs(silenced)[key], rel=1e-6, what=key)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    inputs = family.inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert all(not bool(value.any()) for ffn in ffns(model)[1:] for value in ffn.raw().tensors().values())
    fk.save(model, tmp_path / "small")
    assert [ffn.width for ffn in ffns(fk.load(tmp_path / "small"))] == [24, 1, 1]


@pytest.mark.parametrize("method", [LayerDrop, FfnDrop])
def test_every_window_is_searched(method: Any) -> None:
    model = FAMILIES["llama"].model()
    batches = data("llama", model)
    plan = fk.plan(model, method(window=2), data=batches)
    assert list(plan.report["search"]) == ["0-1", "1-2"]
    # a layer that adds nothing is the one to go
    last = model.model.layers[1]
    for linear in (last.self_attn.o_proj, last.mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    plan = fk.plan(model, method(window=1), data=batches)
    assert plan.report["groups"] == [["model.layers.1.mlp"]]
    plan = fk.plan(model, method(window=1, score=lambda tried: -float(len(ffns(tried)))))
    assert plan.report["groups"] == [["model.layers.0.mlp"]]


def test_what_cannot_go_is_named() -> None:
    model = FAMILIES["t5"].model()
    before = snapshot(model)
    with pytest.raises(FfnkitError, match="relative_attention_bias"):
        fk.apply(model, fk.plan(model, LayerDrop(layers="encoder:0")))
    assert same(snapshot(model), before)
    with pytest.raises(FfnkitError, match="no layer of the stack is left"):
        fk.apply(model, fk.plan(model, LayerDrop(layers="all")))
    for settings in ({}, {"layers": "0", "window": 1}, {"window": 0}, {"window": 9}):
        with pytest.raises(FfnkitError) as caught:
            fk.plan(model, LayerDrop(**settings), data=data("t5", model))
        assert "\n" not in str(caught.value)
