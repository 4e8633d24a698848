"""Configs that hold the ratio of the FFNs' width to that of the model (Swin, DINOv2, FocalNet, Qwen2-VL's images)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from tolerance import assert_close

import ffnkit as fk
from ffnkit.checkpoint.sizes import best_form
from ffnkit.cli import console, forms
from ffnkit.errors import FfnkitError
from ffnkit.methods import build
from ffnkit.model.config_values import Place, entry, write
from ffnkit.model.finding import ffns
from ffnkit.surgery.description import width_keys

IMAGE = {"image_size": 16, "patch_size": 4, "num_labels": 3}
PLAIN = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
STAGES = {"embed_dim": 12, "depths": [1, 2]}
SWIN = {**STAGES, "num_heads": [2, 2], "window_size": 2}
PVT = {
    "num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [12, 24], "num_attention_heads": [1, 2],
    "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [4, 4],
}  # fmt: skip
VISION = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "hidden_size": 16}
TEXT = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
}  # fmt: skip
# Family: class, config, whether its ratio is a whole number.
FAMILIES: dict[str, tuple[Any, Any, bool]] = {
    "swin": (T.SwinForImageClassification, lambda: T.SwinConfig(**IMAGE, **SWIN), False),
    "swinv2": (T.Swinv2ForImageClassification, lambda: T.Swinv2Config(**IMAGE, **SWIN), False),
    "focalnet": (
        T.FocalNetForImageClassification,
        lambda: T.FocalNetConfig(**IMAGE, **STAGES, focal_levels=[1, 1], focal_windows=[1, 1]),
        False,
    ),
    "pvt": (T.PvtForImageClassification, lambda: T.PvtConfig(**{**IMAGE, **PVT}), True),
    "dinov2": (T.Dinov2ForImageClassification, lambda: T.Dinov2Config(**IMAGE, **PLAIN), True),
    "dinov2_with_registers": (
        T.Dinov2WithRegistersForImageClassification,
        lambda: T.Dinov2WithRegistersConfig(**IMAGE, **PLAIN),
        True,
    ),
    "vitdet": (T.VitDetModel, lambda: T.VitDetConfig(**{**IMAGE, "num_labels": 2}, **PLAIN), True),
    "qwen2_vl": (
        T.Qwen2VLForConditionalGeneration,
        lambda: T.Qwen2VLConfig(text_config=TEXT, vision_config=VISION),
        True,
    ),
}


def made(family: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    return kind(config()).to(dtype).eval()


def answers(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    if model.main_input_name == "input_ids":
        pixels = torch.randn(16, 3 * 2 * 4 * 4).to(model.dtype)
        tower = model.model.visual
        with torch.no_grad():
            return tower(pixels, grid_thw=torch.tensor([[1, 4, 4]])).last_hidden_state
    with torch.no_grad():
        return model(torch.randn(2, 3, 16, 16).to(model.dtype))[0]


def cut(model: Any, width: float, layers: str = "all") -> Any:
    return fk.apply(model, fk.plan(model, build("magnitude", width=width, layers=layers)))


def visual(model: Any) -> list[Any]:
    return [ffn for ffn in ffns(model) if "language_model" not in ffn.name]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_width_opens_everywhere(family: str, tmp_path: Path) -> None:
    model = made(family)
    before = sum(p.numel() for p in model.parameters())
    keys = width_keys(model, ffns(model))
    for ffn in visual(model):
        assert keys[ffn.name] is not None
        place = Place.of(keys[ffn.name][1])
        assert (place.times, place.whole) == (ffn.d, FAMILIES[family][2])
    cut(model, 0.5)
    assert best_form(model) == "standard" and not hasattr(model.config, "quantization_config")
    expected = answers(model)
    report = fk.export(model, tmp_path / "out")
    assert report.parameters == report.compact_parameters < before and not report.padded
    model.save_pretrained(tmp_path / "saved")
    for folder in ("out", "saved"):
        again = type(model).from_pretrained(tmp_path / folder).eval()
        assert [ffn.width for ffn in ffns(again)] == [ffn.width for ffn in ffns(model)]
        assert_close(answers(again), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["swin", "dinov2", "qwen2_vl"])
def test_other_widths_are_padded_to_the_next_ratio(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, whole = made(family, dtype), FAMILIES[family][2]
    before = sum(p.numel() for p in model.parameters())
    cut(model, 0.55)
    expected = answers(model)
    report = fk.export(model, tmp_path / "out")
    now = sum(p.numel() for p in model.parameters())
    assert now <= report.parameters < before and (report.parameters > now) == whole
    again = type(model).from_pretrained(tmp_path / "out").eval()
    for old, new in zip(visual(model), visual(again), strict=True):
        assert old.width <= new.width <= (-(-old.width // old.d) * old.d if whole else old.width + 2)
    assert_close(answers(again), expected, rel=1e-5 if dtype is torch.float32 else 2e-2)
    # without ffnkit nobody takes the compact form for a plain model
    fk.save(model, tmp_path / "compact")
    opened = fk.load(tmp_path / "compact").eval()
    assert_close(answers(opened), expected)
    assert {ffn.name: ffn.width for ffn in ffns(opened)} == {ffn.name: ffn.width for ffn in ffns(model)}


def test_a_few_zeros_are_no_reason_for_a_form_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stages = {"embed_dim": 32, "depths": [1] * 4, "num_heads": [2] * 4, "window_size": 2, "patch_size": 1}
    model = T.SwinForImageClassification(T.SwinConfig(**{**IMAGE, **stages})).eval()
    cut(model, 0.3)
    expected = answers(model)
    assert (
        hasattr(model.config, "quantization_config") and best_form(model) == "standard"
    )  # 77 and 307: no ratio is both
    report = fk.export(model, tmp_path / "out")
    assert 0 < report.padding < 0.005 * report.parameters
    assert_close(answers(type(model).from_pretrained(tmp_path / "out").eval()), expected)
    assert best_form(cut(made("dinov2"), 0.55)) == "compact"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "dinov2"])
def test_a_compact_checkpoint_is_no_plain_one(family: str, tmp_path: Path) -> None:
    model = cut(made(family), 0.5, layers="last:1")
    fk.save(model, tmp_path / "compact")
    code = (
        f"import transformers; kind = transformers.{type(model).__name__}\n"
        f"config = kind.config_class.from_pretrained({str(tmp_path / 'compact')!r}); del config.quantization_config\n"
        f"kind.from_pretrained({str(tmp_path / 'compact')!r}, config=config)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "size mismatch" in done.stderr.lower() + done.stdout.lower()
    written = json.loads((tmp_path / "compact" / "config.json").read_text())
    written["mlp_ratio"] = 1
    (tmp_path / "compact" / "config.json").write_text(json.dumps(written))
    with pytest.raises(FfnkitError, match="mlp_ratio"):
        fk.load(tmp_path / "compact")


def test_what_saves_nothing_is_said_by_what_the_ratio_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    for family, layers, nothing in (("swin", "all", False), ("dinov2", "all", False), ("dinov2", "last:1", True)):
        model = made(family)
        method = build("magnitude", width=0.5, layers=layers)
        assert forms.warn_early(model, method.chosen(model)) == nothing
        forms.warn_planned(model, fk.plan(model, method))
        assert bool(said) == nothing
    assert all("saves nothing as a standard checkpoint" in line for line in said)


def test_a_ratio_says_a_width_to_the_neuron() -> None:
    for times in (7, 96, 384, 1536):
        place = Place.of(f"mlp_ratio*{times}")
        assert not place.whole and str(place) == f"mlp_ratio*{times}"
        for width in range(1, 5 * times, max(1, times // 50)):
            assert place.meant(place.said(width)) == width
    whole = Place.of("mlp_ratios[1]*64 whole")
    assert whole == Place("mlp_ratios", 1, times=64) and str(whole) == "mlp_ratios[1]*64 whole"
    assert [whole.said(width) for width in (1, 64, 65)] == [1, 1, 2]
    config = T.SwinConfig(mlp_ratio=4.0)
    write(config, {("", "mlp_ratio*96"): 96, ("", "mlp_ratio*192"): 193})
    assert config.mlp_ratio == math.nextafter(193 / 192, 2) or int(192 * config.mlp_ratio) == 193
    assert entry(("a", "mlp_ratio*96")) == entry(("a", "mlp_ratio*192 whole")) == ("a", "mlp_ratio")


def test_numbers_that_only_look_like_a_ratio_are_none() -> None:
    """BLOOM's FFNs are four times as wide as the model whatever its config says, and it has four heads and layers."""
    config = T.BloomConfig(vocab_size=60, hidden_size=16, n_layer=4, n_head=4)
    model = T.BloomForCausalLM(config)
    assert set(width_keys(model, ffns(model)).values()) == {None}
