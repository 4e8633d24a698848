"""``from_config`` with the config of a compact checkpoint: its shape with new numbers or a line, no other model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, NAMES
from methods import EVERY, case_of, slow_but
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, EncoderDecoderConfig

import ffnkit as fk
from ffnkit.checkpoint.hook import is_compact
from ffnkit.errors import FfnkitError
from ffnkit.testing.contract import distance

FAST = ("llama", "bert", "t5", "gpt2", "mixtral", "clip")
KINDS = ("magnitude", "merging", "svd", "fusion", "heads", "unstructured")  # ragged, tied, factored, scaled, masked


def compact(name: str, method: str, folder: Path) -> Any:
    """An edited model whose config describes it, saved; skips where the family does not bear that."""
    model = FAMILIES[name].model()
    ask = EVERY[method]()
    if method == "magnitude":
        ask = replace(ask, width=4, layers="last:1")
    try:
        fk.apply(model, fk.plan(model, ask, data=case_of(name).batches(model)))
    except FfnkitError as error:
        pytest.skip(str(error)[:80])
    fk.save(model, folder)
    if not is_compact(json.loads((folder / "config.json").read_text()).get("quantization_config")):
        pytest.skip("its config says the shape")
    return model


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def drawn(model: Any, folder: Path, **how: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    made = type(model)._from_config(config, **how)
    assert made.config is config
    return made


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("name", slow_but(FAST, NAMES))
def test_a_model_is_drawn_in_the_shape_of_the_checkpoint(name: str, method: str, tmp_path: Path) -> None:
    model = compact(name, method, tmp_path / "out")
    made = drawn(model, tmp_path / "out").eval()
    assert shapes(made) == shapes(model)
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in model.parameters())  # what is tied is
    assert all(bool(value.isfinite().all()) for value in made.state_dict().values())
    assert made.config.quantization_config == model.config.quantization_config
    fk.save(made, tmp_path / "drawn")
    again = fk.load(tmp_path / "drawn")
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in again.state_dict().items())
    made.load_state_dict(model.state_dict())
    inputs = FAMILIES[name].inputs(model)
    given, wanted = FAMILIES[name].outputs(made, inputs), FAMILIES[name].outputs(model, inputs)
    assert distance(given, wanted) < 1e-6


def test_numbers_are_drawn_as_the_family_draws(tmp_path: Path) -> None:
    model = compact("llama", "magnitude", tmp_path)
    made = drawn(model, tmp_path)
    weights = [layer.mlp.up_proj.weight for layer in made.model.layers]
    assert len({len(weight) for weight in weights}) == 2  # ragged
    assert all(0.5 < float(w.detach().std()) / made.config.initializer_range < 1.5 for w in weights)
    again = drawn(model, tmp_path)
    assert not torch.equal(weights[-1], again.model.layers[-1].mlp.up_proj.weight)


def test_structure_alone_on_the_meta_device(tmp_path: Path) -> None:
    model = compact("gpt2", "merging", tmp_path)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    assert shapes(made) == shapes(model)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in made.parameters())
    assert made.transformer.h[0].mlp is made.transformer.h[1].mlp


def test_parts_and_bodies_by_configs_of_their_own(tmp_path: Path) -> None:
    model = compact("clip", "svd", tmp_path / "clip")
    config = AutoConfig.from_pretrained(tmp_path / "clip")
    vision = transformers.CLIPVisionModel._from_config(config.vision_config)
    wanted = transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip")
    assert shapes(vision) == shapes(wanted)
    body = compact("llama", "fusion", tmp_path / "llama")
    assert shapes(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "llama"))) == shapes(body.model)
    assert shapes(model.vision_model) == shapes(wanted.vision_model if hasattr(wanted, "vision_model") else wanted)


def test_a_composite_whose_parts_are_built_by_from_config(tmp_path: Path) -> None:
    part: Any = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = BertConfig(**part, intermediate_size=24, is_decoder=True, add_cross_attention=True)
    both = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**part, intermediate_size=40), decoder)
    both.decoder_start_token_id = both.pad_token_id = 0
    model: Any = transformers.EncoderDecoderModel(config=both).eval()
    fk.apply(model, fk.plan(model, EVERY["svd"]()))
    fk.save(model, tmp_path)
    opened = transformers.EncoderDecoderModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in opened.state_dict().items())
    assert shapes(drawn(model, tmp_path)) == shapes(model)


def test_a_class_by_itself_refuses(tmp_path: Path) -> None:
    model = compact("bert", "merging", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for kind in (type(model), transformers.BertModel):
        with pytest.raises(FfnkitError, match="Call from_config of an Auto class") as caught:
            kind(config)
        assert "\n" not in str(caught.value)
    assert is_compact(config.quantization_config)
    with pytest.raises(FfnkitError, match="Call from_config"):
        type(model)(model.config)
    type(model)(FAMILIES["bert"].config())  # the control


def test_what_fails_leaves_the_config_as_it_was(tmp_path: Path) -> None:
    compact("llama", "svd", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    described = config.quantization_config
    described["ffns"] = {"other.mlp": next(iter(described["ffns"].values()))}
    with pytest.raises(FfnkitError, match="does not describe the FFN"):
        AutoModel.from_config(config)
    assert config.quantization_config is described
    described["format"] = 99
    with pytest.raises(FfnkitError, match="format 99"):
        AutoModel.from_config(config)


def test_without_ffnkit_it_is_the_placeholder(tmp_path: Path) -> None:
    """The control: transformers alone asks nothing of ``quantization_config`` there."""
    model = compact("llama", "magnitude", tmp_path)
    code = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM as A\n"
        "print(*(p.numel() for n, p in A.from_config(AutoConfig.from_pretrained(sys.argv[1])).named_parameters()"
        " if 'up_proj' in n))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert set(map(int, done.stdout.split())) == {model.config.hidden_size}, done.stderr
