"""Shared FFNs in 4 bits and int8, one weight in memory and on disk, with adapters over them.

What needs bitsandbytes or torchao is skipped where they are not installed (``pip install -e '.[quantized]'``).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from test_tied_lora import disturbed, output, tied
from test_tune import assert_same, fit, gpt2, killed_at, llama
from tolerance import assert_close, assert_differs, relative_error
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.methods.share.merging import Merging
from ffnkit.model.finding import ffns
from ffnkit.tune import load_adapter, tuners

pytestmark = pytest.mark.filterwarnings("ignore")  # of these libraries

NAMES = ["bert", "gpt2", "llama"]
# int8 rounds what goes into a product too, so that the same weights in float give outputs a few per cent away
CLOSE = {"nf4": 1e-5, "int8": 0.1, "torchao": 1e-5}


def configuration(kind: str) -> Any:
    """What ``fk.load`` takes as quantization_config."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def weights(model: nn.Module) -> list[Any]:
    """The distinct weights of the FFN's linears, adapters left out."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        linear = getattr(module, "base_layer", module)
        inside = any(part in name for part in ("mlp", "intermediate.dense", "output.dense"))
        if inside and "attention" not in name and isinstance(linear, nn.Linear) and "lora" not in name:
            found[id(linear.weight)] = linear.weight
    return list(found.values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("adapters", ["shared", "each"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_train_over_one_quantized_weight_and_merge_right(name: str, adapters: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = tied(name)
    before, sites, classes = output(name, model), sum(len(f.sites) for f in ffns(model)), linear_classes(model)
    heads = {key: value.clone() for key, value in model.state_dict().items() if "classifier" in key or "lm_head" in key}
    tuned = tuners.prepare(model, {"name": "lora", "rank": 2, "tied": adapters, "quantize": kind})
    assert len(weights(tuned)) == sites
    assert {type(weight).__name__ for weight in weights(tuned)} == {"Params4bit" if kind == "nf4" else "Int8Params"}
    quantized = output(name, tuned)
    assert 1e-3 < relative_error(quantized, before) < 1.5
    disturbed(tuned)
    adapted = output(name, tuned)
    assert_differs(adapted, quantized, rel=0.1)
    plain: Any = tuners.finish(tuned)
    assert_close(output(name, plain), adapted, rel=CLOSE[kind])
    assert len(ffns(plain)) == (2 if adapters == "shared" else 3)
    assert linear_classes(plain) == classes and all(p.is_floating_point() for p in plain.parameters())
    assert heads and not getattr(plain, "is_quantized", False)


def linear_classes(model: nn.Module) -> list[str]:
    return [type(ffn.linear(site)).__name__ for ffn in ffns(model)[:1] for site in ffn.sites]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in NAMES for k in ("nf4", "int8", "torchao") if (n, k) != ("gpt2", "torchao")],  # it leaves Conv1D
)
def test_a_tied_model_is_quantized_once_saved_once_and_comes_back(name: str, kind: str, tmp_path: Path) -> None:
    config = configuration(kind)
    model = tied(name)
    fk.save(model, tmp_path / "float")
    opened = fk.load(tmp_path / "float", quantization_config=config)
    places = [list(ffn.owners) for ffn in ffns(model)]
    assert [list(ffn.owners) for ffn in ffns(opened)] == places
    # what is tied is quantized too, in one object
    kinds = {"nf4": "Params4bit", "int8": "Int8Params", "torchao": "Int8Tensor"}
    linears = [ffn.linear(site) for ffn in ffns(opened) for site in ffn.sites]
    assert {type(linear.weight).__name__ for linear in linears} == {kinds[kind]}
    assert len(weights(opened)) == len(linears)
    assert 1e-4 < relative_error(output(name, opened), output(name, model)) < 1
    fk.save(opened, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        further = tuple(f"{o}.{f.path(s)}." for f in ffns(model) for o in f.tied for s in f.sites)
        assert not [key for key in file.keys() if key.startswith(further)]  # noqa: SIM118
    again = fk.load(tmp_path / "small")
    assert [list(ffn.owners) for ffn in ffns(again)] == places and len(weights(again)) == len(linears)
    assert_close(output(name, again), output(name, opened), rel=1e-6)
    fk.save(again, tmp_path / "later")
    assert_close(output(name, fk.load(tmp_path / "later")), output(name, opened), rel=1e-6)
    for adapters in ("shared", "each"):
        tuned = disturbed(tuners.prepare(fk.load(tmp_path / "small"), {"name": "lora", "rank": 2, "tied": adapters}))
        assert len(weights(tuned)) == len(linears)
        adapted = output(name, tuned)
        assert_differs(adapted, output(name, opened))
        plain: Any = tuners.finish(tuned)
        assert_close(output(name, plain), adapted, rel=CLOSE[kind])
        fk.save(plain, tmp_path / adapters)
        assert_close(output(name, fk.load(tmp_path / adapters)), output(name, plain), rel=1e-6)
        assert "base" not in (getattr(plain.config, "quantization_config", None) or {})


@pytest.mark.parametrize("adapters", ["shared", "each"])
def test_an_adapter_goes_on_a_quantized_tied_base(adapters: str, tmp_path: Path) -> None:
    config = configuration("nf4")
    fk.save(tied("llama"), tmp_path / "base")
    tuner = tuners.get(
        {"name": "lora", "rank": 2, "tied": adapters, "quantize": "nf4", "adapter_dir": tmp_path / "adapter"}
    )
    tuned = disturbed(tuner.prepare(tied("llama")))
    adapted = output("llama", tuned)
    tuner.finish(tuned)
    base = fk.load(tmp_path / "base", quantization_config=config)
    assert_close(output("llama", load_adapter(base, tmp_path / "adapter")), adapted, rel=1e-5)
    assert_differs(output("llama", fk.load(tmp_path / "base", quantization_config=config)), adapted)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_tuning_over_a_quantized_base_resumes(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")

    def model() -> Any:
        fresh = build()
        return fk.apply(fresh, fk.plan(fresh, Merging(layers="all", match=False)))

    tuner = {"name": "lora", "tied": "each", "quantize": "nf4"}
    more = {"eval_every": 4, "learning_rate": 0.01, "epochs": 3, "tuner": tuner}
    whole = fit(model(), tmp_path / "whole", **more)
    assert whole.losses[-1]["loss"] < whole.losses[0]["loss"] and len(ffns(whole.model)) == 2
    killed_at(6, monkeypatch, lambda: fit(model(), tmp_path / "killed", **more))
    assert_same(fit(model(), tmp_path / "killed", **more).model, whole.model)


def test_quantizing_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(FfnkitError, match="bitsandbytes is not installed"):
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        tuners.prepare(tied("llama"), {"name": "lora", "quantize": "nf4"})
    config = configuration("nf4")
    fk.save(tied("llama"), tmp_path)
    with pytest.raises(FfnkitError, match="quantized already"):
        tuners.prepare(fk.load(tmp_path, quantization_config=config), {"name": "lora", "quantize": "int8"})
