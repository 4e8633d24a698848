"""LoRA on shared FFNs: one adapter that the layers share, or one for each layer, merged right, saved and reloaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_tune import assert_same, bert, fit, gpt2, killed_at, llama
from tolerance import assert_close, assert_differs
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.methods.share.merging import Merging
from ffnkit.model.finding import ffns
from ffnkit.tune import load_adapter, tuners

MODELS = ["bert", "gpt2", "llama", "phi3", "t5"]


def tied(name: str, layers: str = "0-1") -> Any:
    """A model of the family whose first layers share one FFN; the last layer of a stack has its own."""
    model = FAMILIES[name].model()
    return fk.apply(model, fk.plan(model, Merging(layers=layers, match=False)))


def disturbed(model: nn.Module) -> nn.Module:
    """The model with adapters that do something, each something else."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in fk.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def output(name: str, model: nn.Module) -> torch.Tensor:
    found = model.eval()(**FAMILIES[name].inputs(model))
    return next(value for value in found.values() if isinstance(value, torch.Tensor))


def adapters(model: nn.Module) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_has_its_adapter_over_one_weight_and_merges_right(name: str, tmp_path: Path) -> None:
    model = tied(name)
    before, shared = output(name, model), ffns(model)
    weights = {id(p) for ffn in shared for p in ffn.parameters()}
    places = sum(len(ffn.sites) * len(ffn.owners) for ffn in shared)
    tuned = tuners.prepare(model, {"name": "lora", "rank": 2, "tied": "each"})
    assert len(adapters(tuned)) == places
    assert {id(p) for p in tuned.parameters()} >= weights and not any(
        p.requires_grad for p in tuned.parameters() if id(p) in weights
    )
    assert_close(output(name, tuned), before)
    disturbed(tuned)
    adapted = output(name, tuned)
    assert_differs(adapted, before)
    plain: Any = tuners.finish(tuned)
    assert_close(output(name, plain), adapted, rel=1e-5)
    assert len(ffns(plain)) == FAMILIES[name].count and not any(ffn.tied for ffn in ffns(plain))
    assert not hasattr(plain.config, "quantization_config")  # nothing is shared any more, and widths are whole
    plain.tie_weights()  # what was declared is taken back
    assert_close(output(name, plain), adapted, rel=1e-5)
    fk.save(plain, tmp_path / "compact")
    fk.export(plain, tmp_path / "standard")
    for opened in (fk.load(tmp_path / "compact"), type(plain).from_pretrained(tmp_path / "standard")):
        assert_close(output(name, opened), output(name, plain), rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_peft_alone_merges_wrong(name: str) -> None:
    """The negative control: merged in place, several adapters land in one weight."""
    tuned = disturbed(tuners.prepare(tied(name), {"name": "lora", "rank": 2, "tied": "each"}))
    adapted = output(name, tuned)
    assert_differs(output(name, tuned.merge_and_unload()), adapted)  # type: ignore[operator]


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_adapter_leaves_the_tie(name: str, tmp_path: Path) -> None:
    model = tied(name)
    owners = [list(ffn.owners) for ffn in ffns(model)]
    tuned = disturbed(tuners.prepare(model, {"name": "lora", "rank": 2}))
    adapted = output(name, tuned)
    plain: Any = tuners.finish(tuned)
    assert [list(ffn.owners) for ffn in ffns(plain)] == owners
    assert_close(output(name, plain), adapted, rel=1e-5)
    fk.save(plain, tmp_path / "compact")
    assert_close(output(name, fk.load(tmp_path / "compact")), adapted, rel=1e-5)


def test_what_has_no_adapter_stays_shared(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    fk.apply(model, fk.plan(model, Merging(layers="0-1", match=False)))
    only = {"name": "lora", "targets": r".*self_attn\.q_proj", "tied": "each"}
    tuned = disturbed(tuners.prepare(model, only))
    adapted = output("llama", tuned)
    plain: Any = tuners.finish(tuned)
    assert len(ffns(plain)) == 2 and plain.model.layers[0].mlp is plain.model.layers[1].mlp
    assert_close(output("llama", plain), adapted, rel=1e-5)
    fk.save(plain, tmp_path / "tied")
    assert len(ffns(fk.load(tmp_path / "tied"))) == 2
    one = {"name": "lora", "targets": r".*layers\.1\.mlp\.down_proj", "tied": "each"}
    tuned = disturbed(tuners.prepare(plain, one))
    adapted = output("llama", tuned)
    plain = tuners.finish(tuned)
    assert len(ffns(plain)) == 3 and len({id(p) for f in ffns(plain) for p in f.parameters()}) == 9
    assert_close(output("llama", plain), adapted, rel=1e-5)
    fk.save(plain, tmp_path / "apart")
    assert_close(output("llama", fk.load(tmp_path / "apart")), adapted, rel=1e-5)


def test_one_group_comes_apart_and_another_stays(tmp_path: Path) -> None:
    config = FAMILIES["bert"].config()
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = type(FAMILIES["bert"].model())(config).eval()
    fk.apply(model, fk.plan(model, Merging(groups=["0-1", "2-3"], match=False)))
    only = {"name": "lora", "targets": r".*layer\.[23]\.(intermediate|output)\.dense", "tied": "each"}
    tuned = disturbed(tuners.prepare(model, only))
    adapted = output("bert", tuned)
    plain: Any = tuners.finish(tuned)
    assert [len(ffn.owners) for ffn in ffns(plain)] == [2, 1, 1]
    assert_close(output("bert", plain), adapted, rel=1e-5)
    fk.save(plain, tmp_path / "compact")
    again = fk.load(tmp_path / "compact")
    assert [len(ffn.owners) for ffn in ffns(again)] == [2, 1, 1]
    fk.export(again, tmp_path / "standard")
    for opened in (again, type(plain).from_pretrained(tmp_path / "standard")):
        assert_close(output("bert", opened), output("bert", plain), rel=1e-6)


@pytest.mark.parametrize("kind", ["shared", "each"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_saved_adapter_goes_back_on_the_tied_model(name: str, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    fk.save(tied(name), tmp_path / "base")
    fk.export(tied(name), tmp_path / "expanded")
    tuner = tuners.get({"name": "lora", "rank": 2, "tied": kind, "adapter_dir": tmp_path / "adapter"})
    tuned = disturbed(tuner.prepare(tied(name)))
    adapted = output(name, tuned)
    tuner.finish(tuned)
    again = load_adapter(fk.load(tmp_path / "base"), tmp_path / "adapter")
    assert_close(output(name, again), adapted, rel=1e-5)
    assert_close(output(name, tuners.finish(again)), adapted, rel=1e-5)
    expanded = type(FAMILIES[name].model()).from_pretrained(tmp_path / "expanded")
    assert_close(output(name, PeftModel.from_pretrained(expanded, tmp_path / "adapter")), adapted, rel=1e-5)
    if kind == "each":  # the negative control: peft alone knows one place, and is stopped where that is a linear's
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that it misses, in some families
            try:
                alone = PeftModel.from_pretrained(fk.load(tmp_path / "base"), tmp_path / "adapter")
            except FfnkitError as error:
                assert "are one linear" in str(error)
            else:
                assert_differs(output(name, alone), adapted)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tuner = tuners.get({"name": "lora", "rank": 2, "tied": "each", "adapter_dir": tmp_path / "adapter"})
    tuner.finish(disturbed(tuner.prepare(tied("bert"))))
    with pytest.raises(FfnkitError, match="has no bert.encoder.layer.0.intermediate.dense"):
        load_adapter(FAMILIES["llama"].model(), tmp_path / "adapter")
    with pytest.raises(FfnkitError, match="there is no adapter_model"):
        load_adapter(bert(), tmp_path)


def test_adapters_for_each_layer_are_refused_where_they_make_no_sense() -> None:
    with pytest.raises(FfnkitError, match="no FFN is shared"):
        tuners.prepare(bert(), {"name": "lora", "tied": "each"})
    whole: Any = bert()
    whole.bert.encoder.layer[1] = whole.bert.encoder.layer[0]
    with pytest.raises(FfnkitError, match="holds more than the FFN"):
        tuners.prepare(whole, {"name": "lora", "tied": "each"})
    model = tied("llama")
    with pytest.raises(FfnkitError, match="no linear of the model matches"):
        tuners.prepare(model, {"name": "lora", "targets": "nothing", "tied": "each"})
    assert model.model.layers[0].mlp is model.model.layers[1].mlp


@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_tuning_with_an_adapter_for_each_layer_resumes(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> Any:
        fresh = build()
        return fk.apply(fresh, fk.plan(fresh, Merging(layers="all", match=False)))

    more = {"eval_every": 4, "learning_rate": 0.01, "tuner": {"name": "lora", "tied": "each"}}
    whole = fit(model(), tmp_path / "whole", **more)
    assert len(ffns(whole.model)) == 2
    first, second = (ffn.raw() for ffn in ffns(whole.model))
    assert_differs(first.up, second.up)
    killed_at(6, monkeypatch, lambda: fit(model(), tmp_path / "killed", **more))
    assert_same(fit(model(), tmp_path / "killed", **more).model, whole.model)


def test_settings_that_are_not_given_are_not_told() -> None:
    assert {"tied", "quantize"}.isdisjoint(tuners.get("lora").model_dump())
    assert tuners.get({"name": "lora", "tied": "each"}).model_dump()["tied"] == "each"
