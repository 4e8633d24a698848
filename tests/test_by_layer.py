"""Configs that say values by layer: transformers' per_layer_config, and lists with an entry a layer.

Of transformers' classes the vision tower of Dots 3 builds each FFN from its layer's own config; Gemma 4, EmbeddingGemma
2, NeoMME, Step 3.7 and the text of Dots 3 read heads, windows or experts so, and one width for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import save_file
from test_layer_numbers import gemma3n
from tolerance import assert_close, assert_differs
from torch import Tensor, nn

import ffnkit as fk
from ffnkit.budget.targets import window
from ffnkit.checkpoint.sizes import best_form
from ffnkit.methods import get
from ffnkit.model.attention import attentions
from ffnkit.model.config_keys import width_keys
from ffnkit.model.config_values import Place, config_value, held, overrides, write
from ffnkit.model.finding import ffns

TEXT = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
SIDES = ["sliding_attention", "sliding_attention", "full_attention"]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tower(sparse: int = 0, **own: Any) -> Any:
    """The vision tower of Dots 3: three dense FFNs, then layers of experts."""
    kinds = ["dense"] * 3 + ["sparse"] * sparse
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": len(kinds), "num_attention_heads": 4}
    more = {"patch_size": 4, "adapter_in_dim": 16, "adapter_out_dim": 16, "mlp_layer_types": kinds}
    experts = {"moe_intermediate_size": 12, "num_local_experts": 4}
    return made(T.Dots3NoteVisionModel, T.Dots3NoteVisionConfig(**sizes, **more, **experts, **own))


def pixels() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(16, 48, generator=draw), "grid_thw": torch.tensor([[1, 4, 4]])}


def gemma4() -> Any:
    heads = {"head_dim": 4, "global_head_dim": 8, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    more = {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 4}
    return made(T.Gemma4ForCausalLM, T.Gemma4TextConfig(**TEXT, **heads, **more, layer_types=SIDES))


def neomme() -> Any:
    return made(T.NeoMMEForMaskedLM, T.NeoMMEConfig(**{**TEXT, "head_dim": 16}))


def embedding() -> Any:
    sizes = {"head_dim": 4, "global_head_dim": 8, "hidden_size_per_layer_input": 4, "embedding_dim": 8}
    return made(T.AutoModel.from_config, T.EmbeddingGemma2TextConfig(**TEXT, **sizes, layer_types=SIDES))


def step() -> Any:
    experts = {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "share_expert_dim": 12}
    sides = ["full_attention", "sliding_attention", "full_attention"]
    kinds = {"layer_types": sides, "mlp_layer_types": ["dense", "sparse", "sparse"], "num_sliding_attention_heads": 2}
    return made(T.Step3p7TextModel, T.Step3p7TextConfig(**TEXT, **experts, **kinds, head_dim=4, sliding_window=8))


def widths(model: Any) -> list[int]:
    return [ffn.width for ffn in ffns(model)]


def narrowed(model: Any, *wanted: int) -> Any:
    named = dict(zip((ffn.name for ffn in ffns(model)), wanted, strict=False))
    return fk.apply(model, fk.plan(model, get("magnitude")(width=named)))


# --- a class that reads its widths so


@pytest.mark.slow  # a fresh process
def test_ragged_widths_are_standard_where_the_class_reads_them(tmp_path: Path) -> None:
    model = narrowed(tower(), 8, 16, 24)
    with torch.no_grad():
        expected = model(**pixels())
    assert best_form(model) == "standard"
    report = fk.export(model, tmp_path / "out")
    assert report.padding == 0 and report.parameters == sum(p.numel() for p in model.parameters())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"] == {"0": {"intermediate_size": 8}, "1": {"intermediate_size": 16}}
    assert config["intermediate_size"] == 24 and "quantization_config" not in config
    fk.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).keys() == config.keys()
    save_file(pixels() | {"expected": expected.pooler_output.contiguous()}, tmp_path / "case.safetensors")
    script = """
import sys
sys.modules["ffnkit"] = None  # importing it raises
import torch
from safetensors.torch import load_file
from transformers import Dots3NoteVisionModel

case = load_file(sys.argv[1] + "/case.safetensors")
expected = case.pop("expected")
for folder in ("out", "saved"):
    model = Dots3NoteVisionModel.from_pretrained(f"{sys.argv[1]}/{folder}").eval()
    assert [block.mlp.up_proj.out_features for block in model.blocks] == [8, 16, 24]
    with torch.no_grad():
        assert torch.equal(model(**case).pooler_output, expected)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_width_stands_once_again(tmp_path: Path) -> None:
    model = narrowed(narrowed(tower(), 20, 16, 24), 8, 8, 8)
    assert model.config.intermediate_size == 8 and overrides(model.config) == {}
    fk.export(model, tmp_path / "out")
    assert widths(type(model).from_pretrained(tmp_path / "out")) == [8, 8, 8]


def test_a_config_with_widths_of_its_own_is_compressed_saved_and_exported(tmp_path: Path) -> None:
    rows = {0: {"intermediate_size": 20}, 3: {"num_local_experts": 3}, 4: {"moe_intermediate_size": 8}}
    model = tower(2, per_layer_config=rows)
    assert widths(model) == [20, 24, 24, 12, 8] and "16 x 20" in str(fk.inspect(model))
    keys = [key[1] for key in width_keys(model, ffns(model)).values() if key is not None]
    assert keys[0] == "per_layer_config[0].intermediate_size" and keys[4] == "per_layer_config[4].moe_intermediate_size"
    with torch.no_grad():
        before = model(**pixels()).pooler_output
    assert (fk.apply(model, fk.plan(model, get("magnitude")(width=0.5))), widths(model))[1] == [10, 12, 12, 6, 4]
    with torch.no_grad():
        expected = model(**pixels()).pooler_output
    assert_differs(expected, before)
    fk.save(model, tmp_path / "saved")
    fk.export(model, tmp_path / "out")
    for opened in (fk.load(tmp_path / "saved"), type(model).from_pretrained(tmp_path / "out")):
        assert opened.config.per_layer_config[3].num_local_experts == 3
        with torch.no_grad():
            assert_close(opened.eval()(**pixels()).pooler_output, expected, rel=1e-5)
    # experts are padded to what transformers' product bears, dense FFNs are as wide as they were
    assert widths(type(model).from_pretrained(tmp_path / "out"))[:3] == [10, 12, 12]


def test_compact_forms_and_fewer_layers_keep_what_layers_say(tmp_path: Path) -> None:
    model = tower(2, per_layer_config={0: {"intermediate_size": 20}, 3: {"num_local_experts": 3}})
    fk.apply(model, fk.plan(model, fk.Merging(groups=[["1", "2"]])))
    fk.save(model, tmp_path / "shared")
    opened = fk.load(tmp_path / "shared")
    assert widths(opened) == [20, 24, 12, 12] and len(ffns(opened)[1].owners) == 2
    fk.export(opened, tmp_path / "out")
    assert widths(type(model).from_pretrained(tmp_path / "out")) == [20, 24, 24, 12, 12]
    fk.apply(opened, fk.plan(opened, get("layer-drop")(layers="0")))  # another class stands in a layer's old place
    said = [row.get("num_local_experts") for _, row in sorted(overrides(opened.config).items())]
    assert said == [None, None, 3, None]
    with torch.no_grad():
        expected = opened(**pixels()).pooler_output
    fk.export(opened, tmp_path / "short")
    with torch.no_grad():
        assert_close(type(model).from_pretrained(tmp_path / "short").eval()(**pixels()).pooler_output, expected)


# --- classes that read other values so


@pytest.mark.parametrize("build", [gemma4, neomme, embedding, step])
def test_values_by_layer_of_other_kinds_are_no_hindrance(tmp_path: Path, build: Any) -> None:
    model = build()
    assert model.config.is_heterogeneous
    keys = {key for key in width_keys(model, ffns(model)).values()}
    assert keys <= {("", name) for name in ("intermediate_size", "moe_intermediate_size", "share_expert_dim")}
    said = overrides(model.config)
    narrowed(model, *([8] if build is not step else [24, 12, 12, 12, 6]))
    assert overrides(model.config) == said
    fk.save(model, tmp_path / "compact")
    opened = fk.load(tmp_path / "compact").eval()
    assert widths(opened) == widths(model) and overrides(opened.config) == said
    assert fk.export(model, tmp_path / "out").padding > 0
    with torch.no_grad():
        assert_close(opened(IDS)[0], model(IDS)[0])


def test_the_window_and_the_heads_of_a_layer_are_its_own() -> None:
    found = [(each.heads, each.kv_heads, each.head_dim) for each in attentions(embedding())]
    assert found == [(4, 2, 4), (4, 2, 4), (4, 1, 8)]
    config = T.NeoMMEConfig(**{**TEXT, "head_dim": 16})
    assert [config_value(config, "sliding_window", layer) for layer in range(3)] == [256, 1024, None]

    class Here:
        layer = 1

    class Model:
        pass

    Model.config = config  # type: ignore[attr-defined]
    assert window(Model, Here) == 1024  # type: ignore[arg-type]


def test_heads_and_layers_go_where_layers_differ(tmp_path: Path) -> None:
    model = embedding()
    fk.apply(model, fk.plan(model, fk.RemoveHeads(remove=0.5, by="random")))
    fk.save(model, tmp_path / "heads")
    with torch.no_grad():
        assert_close(fk.load(tmp_path / "heads").eval()(IDS)[0], model(IDS)[0])
    with pytest.raises(fk.FfnkitError, match="another one: ple"):  # one width for all layers' inputs together
        fk.apply(embedding(), fk.plan(embedding(), get("layer-drop")(layers="1")))
    model = neomme()
    fk.apply(model, fk.plan(model, get("layer-drop")(layers="0")))
    assert overrides(model.config) == {0: {"sliding_window": 1024}, 1: {"sliding_window": None}}


# --- lists with an entry a layer


def test_shared_and_narrowed_layers_of_a_list_open_and_export(tmp_path: Path) -> None:
    """What one FFN says stands at every layer that shares it."""
    model = gemma3n(0)
    fk.apply(model, fk.plan(model, fk.Merging(groups=[["0", "3"]])))
    narrowed(model, 8, 16)
    fk.save(model, tmp_path / "compact")
    opened = fk.load(tmp_path / "compact").eval()
    assert widths(opened) == [8, 16, 24, 24, 24]
    fk.export(opened, tmp_path / "out")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert plain.config.intermediate_size == [8, 16, 24, 8, 24, 24]
    with torch.no_grad():
        for each in (opened, plain):
            assert_close(each(IDS).logits, model(IDS).logits, rel=1e-5)


# --- the keys


def test_keys_are_read_as_they_are_written() -> None:
    for text in ("d_ff", "d_ff[3]", "per_layer_config[3].d_ff"):
        assert str(Place.of(text)) == text
    config = T.LlamaConfig(**TEXT)
    write(config, {("", "per_layer_config[1].intermediate_size"): 8, ("", "vocab_size"): 7})
    with pytest.raises(RuntimeError, match="may vary"):  # what every read by name would meet
        _ = config.intermediate_size
    assert [config_value(config, "intermediate_size", layer) for layer in (0, 1, 2, None)] == [24, 8, 24, 24]
    assert held(config, ("", "per_layer_config[1].intermediate_size")) == 8 and held(config, ("", "vocab_size")) == 7
    assert held(T.Gemma3nTextConfig(**{**TEXT, "intermediate_size": [1, 2, 3]}), ("", "intermediate_size[2]")) == 3
    assert held(config, ("", "vocab_size[2]")) is None
    every = {("", f"per_layer_config[{layer}].intermediate_size"): 1 for layer in range(3)}
    write(config, every)
    assert config.intermediate_size == 1 and overrides(config) == {}


def test_a_class_that_reads_one_width_gets_none_by_layer() -> None:
    model = made(T.LlamaForCausalLM, T.LlamaConfig(**TEXT))
    assert set(width_keys(model, ffns(model)).values()) == {("", "intermediate_size")}
