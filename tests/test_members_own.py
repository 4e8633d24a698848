"""Layers that share weights and keep something of their own: adapters, device maps and few bits, or one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import case_of
from safetensors import safe_open
from test_tied_lora import disturbed, output
from test_tied_placement import LAYERS, by_layer
from test_tied_quantized import configuration
from tolerance import assert_close, assert_differs

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.tune import tuners
from ffnkit.tune.sharding import wrap_classes

NAMES = ["bert", "gpt2", "llama"]


def shared(name: str, rank: int = 1) -> Any:
    """A model whose first two layers share an FFN, each with a scale, a bias and a thin difference of its own."""
    case = case_of(name)
    model = case.model()
    method = fk.CalibratedMerging(layers="0-1", refine=2, extra_rank=rank)
    fk.apply(model, fk.plan(model, method, data=case.batches(model)))
    first, other = (each.linear("down") for each in ffns(model)[0].apart())
    assert first.weight is other.weight
    with torch.no_grad():
        other.scale.mul_(torch.linspace(0.5, 2, len(other.scale)))  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("adapters", ["shared", "each"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_gives_each_layer_weights_of_its_own_and_says_so(
    name: str, adapters: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shared(name)
    before = output(name, model)
    tuned = tuners.prepare(model, {"name": "lora", "rank": 2, "tied": adapters})
    assert "get weights of their own" in caplog.text
    assert_close(output(name, tuned), before, rel=1e-5)
    disturbed(tuned)
    adapted = output(name, tuned)
    assert_differs(adapted, before)
    plain: Any = tuners.finish(tuned)
    assert_close(output(name, plain), adapted, rel=1e-5)
    assert len(ffns(plain)) == FAMILIES[name].count
    fk.save(plain, tmp_path / "compact")
    assert_close(output(name, fk.load(tmp_path / "compact")), adapted, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_anything_of_their_own_nothing_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = case_of(name)
    model = case.model()
    method = fk.CalibratedMerging(layers="0-1", refine=0, extras=False)
    fk.apply(model, fk.plan(model, method, data=case.batches(model)))
    tuners.prepare(model, {"name": "lora", "rank": 2, "tied": "each"})
    assert "of their own" not in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_a_device_map_keeps_what_is_shared_and_what_is_not(name: str, tmp_path: Path) -> None:
    model = shared(name)
    fk.save(model, tmp_path / "compact")
    opened = fk.load(tmp_path / "compact", device_map={"": "cpu"})
    first, other = (each.linear("down") for each in ffns(opened)[0].apart())
    assert first.weight is other.weight and not torch.equal(first.scale, other.scale)  # type: ignore[arg-type]
    assert_close(output(name, opened), output(name, model), rel=1e-6)
    last = by_layer(model, LAYERS[name], {2})  # what shares nothing may lie on disk
    opened = fk.load(tmp_path / "compact", device_map=last, offload_folder=tmp_path / "offloaded")
    assert_close(output(name, opened), output(name, model), rel=1e-6)


@pytest.mark.parametrize("on_disk", [{0}, {1}, {0, 1}], ids=["the first", "the second", "both"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_on_disk_they_are_refused(name: str, on_disk: set[int], tmp_path: Path) -> None:
    model = shared(name)
    fk.save(model, tmp_path / "compact")
    device_map = by_layer(model, LAYERS[name], on_disk)
    with pytest.raises(FfnkitError, match="keeps something of its own beside shared weights") as caught:
        fk.load(tmp_path / "compact", device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_few_bits_are_saved_once_with_what_is_not_shared(name: str, kind: str, tmp_path: Path) -> None:
    model = shared(name)
    fk.save(model, tmp_path / "compact")
    opened = fk.load(tmp_path / "compact", quantization_config=configuration(kind))
    first, other = (each.linear("down") for each in ffns(opened)[0].apart())
    assert first.weight is other.weight and not torch.equal(first.scale, other.scale)  # type: ignore[arg-type]
    fk.save(opened, tmp_path / "few")
    with safe_open(next((tmp_path / "few").glob("*.safetensors")), "pt") as file:
        keys = set(file.keys())
    (second,) = ffns(opened)[0].tied
    path = f"{second}.{ffns(opened)[0].path('down')}"
    assert f"{path}.scale" in keys and f"{path}.weight" not in keys
    again = fk.load(tmp_path / "few")
    assert len(ffns(again)) == len(ffns(opened))
    assert_close(output(name, again), output(name, opened), rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_shards_refuse_them_and_take_what_shares_nothing(name: str) -> None:
    """FSDP2 takes no weight of two groups; two processes train the rest (``test_together``)."""
    model = shared(name)
    with pytest.raises(FfnkitError, match="each keeps something of its own") as caught:
        wrap_classes(model)
    assert "\n" not in str(caught.value)
    assert wrap_classes(tuners.prepare(model, {"name": "lora", "rank": 2}))
