"""A layer's function may hang on its number, on lists, on what is written elsewhere: right after reload, or refused.

Each model is run with the layers skipped by hooks, with them dropped, and opened from the config that is written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from families import FAMILIES
from family import redraw
from test_contract import same, snapshot
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.io.config_text import written
from ffnkit.methods.drop.layers import LayerDrop
from ffnkit.methods.narrow.selection import Magnitude
from ffnkit.model import probe, running
from ffnkit.model.attention import attentions
from ffnkit.model.config_keys import width_keys
from ffnkit.model.finding import ffns

TEXT = {
    "vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "max_position_embeddings": 30, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SIDES = ["sliding_attention", "full_attention"]


def made(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config)
    redraw(model, seed=0)
    return model.eval()


def gpt2(**more: Any) -> Any:
    sizes = {"vocab_size": 99, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 30}
    return made(T.GPT2LMHeadModel, T.GPT2Config(**sizes, **more))


def llava(**more: Any) -> Any:
    parts = {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **IMAGE},
    }
    ids = {"image_token_index": 90, "image_token_id": 90}
    return made(T.LlavaForConditionalGeneration, T.LlavaConfig(**parts, **ids, **more))


def gemma3n(shared: int) -> Any:
    sizes = TEXT | {"num_hidden_layers": 6, "head_dim": 4, "sliding_window": 4, "intermediate_size": [24] * 6}
    more = {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": shared}
    lists = {"layer_types": SIDES * 3, "activation_sparsity_pattern": [0.0] * 6}
    return made(T.Gemma3nForCausalLM, T.Gemma3nTextConfig(**sizes, **more, **lists))


def qwen_vision() -> Any:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Vision

    sizes = {"depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    more = {"patch_size": 4, "window_size": 8, "fullatt_block_indexes": [1, 3], "spatial_merge_size": 1}
    return made(Vision, type(T.Qwen2_5_VLConfig().vision_config)(**sizes, **more))


def qwen_pixels(model: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {"hidden_states": torch.randn(36, 3 * 2 * 16, generator=draw), "grid_thw": torch.tensor([[1, 6, 6]])}


def backbone(kind: str, out: list[int]) -> Any:
    more = {"window_block_indices": [0, 2], "window_size": 2} if kind == "VitDet" else {}
    config = getattr(T, f"{kind}Config")(**IMAGE, **more, out_indices=out)
    return made(getattr(T, f"{kind}Backbone"), config)


def skipped(model: Any, layers: list[str], batch: dict[str, Any]) -> list[torch.Tensor]:
    def passed_by(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        return entered if isinstance(output, torch.Tensor) else (entered, *output[1:])

    handles = [model.get_submodule(n).register_forward_hook(passed_by, with_kwargs=True) for n in layers]
    outputs = running.outputs(model, batch)
    for handle in handles:
        handle.remove()
    return outputs


# The model, what goes, and keys of the config afterwards.
RIGHT: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "decays by the depth that are written": (
        lambda: made(T.MiniMaxForCausalLM, T.MiniMaxConfig(
            **TEXT, head_dim=4, num_local_experts=2, layer_types=["linear_attention", "full_attention"] * 2,
        )),
        "1,3", {"layer_types": ["linear_attention"] * 2},
    ),
    "full attention by number": (qwen_vision, "0", {"fullatt_block_indexes": [0, 2]}),
    "full attention gone": (qwen_vision, "1", {"fullatt_block_indexes": [2]}),
    "as many ends as layers": (
        lambda: made(T.LlamaForCausalLM, T.LlamaConfig(**TEXT | {"eos_token_id": [3, 4, 5, 6]})),
        "1", {"eos_token_id": [3, 4, 5, 6]},
    ),
    "types": (
        lambda: made(T.Qwen3ForCausalLM, T.Qwen3Config(
            **TEXT, head_dim=4, use_sliding_window=True, sliding_window=3, layer_types=[*SIDES, SIDES[1], SIDES[0]],
        )),
        "1", {"layer_types": [SIDES[0], SIDES[1], SIDES[0]]},
    ),
    "dense layers by number": (
        lambda: made(T.Qwen2MoeForCausalLM, T.Qwen2MoeConfig(
            **TEXT, mlp_only_layers=[1, 3], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        )),
        "0", {"mlp_only_layers": [0, 2]},
    ),
    "convolutions, as many as layers": (
        lambda: made(T.Wav2Vec2Model, T.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8, 8],
            conv_kernel=[10, 3, 3], conv_stride=[5, 2, 2], num_conv_pos_embeddings=4, num_feat_extract_layers=3,
            num_conv_pos_embedding_groups=2,
        )),
        "1", {"conv_dim": [8, 8, 8], "conv_kernel": [10, 3, 3]},
    ),
    "windows of the encoder alone": (
        lambda: made(T.LEDForConditionalGeneration, T.LEDConfig(
            vocab_size=99, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, attention_window=[4, 8, 4],
            max_encoder_position_embeddings=32, max_decoder_position_embeddings=32,
        )),
        "decoder:1", {"attention_window": [4, 8, 4], "decoder_layers": 2},
    ),
    "a state from the end": (lambda: llava(vision_feature_layer=-2), "encoder:3", {"vision_feature_layer": -1}),
    "a state in the middle": (
        lambda: llava(vision_feature_layer=[1, 3]), "encoder:1", {"vision_feature_layer": [1, 2]},
    ),
    "Dinov2": (lambda: backbone("Dinov2", [2, 4]), "0", {"out_indices": [1, 3]}),
    "DINOv3": (lambda: backbone("DINOv3ViT", [2, 4]), "2", {"out_indices": [2, 3]}),
    "BEiT": (lambda: made(T.BeitModel, T.BeitConfig(**IMAGE, vocab_size=99)), "1", {"out_features": ["stage3"]}),
    "ViTDet": (lambda: backbone("VitDet", [4]), "1", {"out_indices": [3], "window_block_indices": [0, 1]}),
    "the default's last stage": (
        lambda: made(T.Dinov2Model, T.Dinov2Config(**IMAGE)), "1", {"out_features": ["stage3"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_what_moves_up_does_what_it_did(case: str, tmp_path: Path) -> None:
    make, layers, keys = RIGHT[case]
    model = make()
    batch: Any = qwen_pixels(model) if "full attention" in case else probe.runnable(model)
    plan = fk.plan(model, LayerDrop(layers=layers), data=[batch])
    wanted = skipped(model, [edit.settings()["layer"] for edit in plan.edits], batch)
    whole = running.outputs(model, batch)
    fk.apply(model, plan)
    fk.save(model, tmp_path / "shorter")
    opened = type(model).from_pretrained(tmp_path / "shorter")
    for each in (model, opened):
        off = running.difference(wanted, running.outputs(each, batch))
        assert off is not None and off < 1e-6
        assert {key: getattr(each.config, key) for key in keys} == keys
    if case != "a state from the end":  # which that layer has no part in
        assert running.difference(whole, wanted) > 1e-3, "nothing was seen"


WRONG: dict[str, tuple[Callable[[], Any], str, str]] = {
    "scaled by the number": (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "1", r"h\.2\.attn\.scaling would be"),
    "lambda": (
        lambda: made(T.DiffLlamaForCausalLM, T.DiffLlamaConfig(**TEXT | {"num_key_value_heads": 4})), "0",
        "lambda_init would be",
    ),
    "embeddings by layer": (lambda: gemma3n(0), "1", "embed_tokens_per_layer"),
    "staggered blocks": (
        lambda: made(T.PegasusXForConditionalGeneration, T.PegasusXConfig(
            vocab_size=99, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, block_size=4, num_global_tokens=2,
            max_position_embeddings=32,
        )),
        "encoder:1", "stagger_blocks_this_layer",
    ),
    "two stages that would be one": (lambda: backbone("Dinov2", [1, 2]), "1", "would be the same"),
    "a head of all layers": (
        lambda: made(T.EsmForMaskedLM, FAMILIES["esm"].config()), "1", "contact_head.regression",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_would_be_another_layer_is_refused_by_the_plan(case: str) -> None:
    make, layers, match = WRONG[case]
    model = make()
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(FfnkitError, match=match) as caught:
        fk.plan(model, LayerDrop(layers=layers))
    assert "\n" not in str(caught.value)
    assert same(snapshot(model), before) and model.config.to_dict() == config


def test_the_last_layers_of_those_families_go() -> None:
    """What is refused is what moves: nothing moves behind the last layer."""
    model = gpt2(scale_attn_by_inverse_layer_idx=True)
    fk.apply(model, fk.plan(model, LayerDrop(layers="last:2")))
    assert len(model.transformer.h) == 2


class Numbered(nn.Module):
    """Computes with the number of its layer in its forward, where no comparison of structures sees it."""

    def __init__(self, inner: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.inner, self.layer_idx = inner, layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * (1 + self.layer_idx)


class NumberedBert(T.BertModel):  # type: ignore[misc]
    def __init__(self, config: Any, **more: Any) -> None:
        super().__init__(config, **more)
        for number, layer in enumerate(self.encoder.layer):
            layer.output = Numbered(layer.output, number)


@pytest.mark.parametrize("known", [True, False], ids=["compared", "no inputs"])
def test_a_number_that_the_forward_computes_with_is_seen(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffnkit.surgery import trial

    model = made(NumberedBert, T.BertConfig(**{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}))
    if not known:
        monkeypatch.setattr(trial.probe, "runnable", lambda _: None)
    numbered = [f"encoder.layer.{n}.output.inner" for n in range(4)]
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in numbered)
    plain = fk.LAYOUTS + [fk.Layout("numbered", up="intermediate.dense", down="output.inner.dense")]
    monkeypatch.setattr("ffnkit.model.finding.layouts", lambda: plain)
    with pytest.raises(FfnkitError, match="left out" if known else "computes with layer_idx, and no inputs are known"):
        fk.plan(model, LayerDrop(layers="1"))


# Heads and widths -------------------------------------------------------------------------------------------------


def test_heads_that_a_forward_does_not_bear_are_refused_by_the_plan() -> None:
    for model in (RIGHT["windows of the encoder alone"][0](), gemma3n(2), WRONG["staggered blocks"][0]()):
        with pytest.raises(FfnkitError, match="does not run|does not bear") as caught:
            fk.plan(model, fk.RemoveHeads(remove=0.5))
        assert "\n" not in str(caught.value)


def test_the_key_of_a_width_is_the_one_that_its_ffns_follow(tmp_path: Path) -> None:
    """Two stacks of equal width, a key that more than the FFN follows, and FFNs that follow none."""
    model = llava(text={"intermediate_size": 40})
    found = {ffn.stack: key for ffn, key in zip(ffns(model), width_keys(model, ffns(model)).values(), strict=True)}
    assert found == {
        "encoder": ("vision_config", "intermediate_size"),
        "language": ("text_config", "intermediate_size"),
    }
    batch = probe.runnable(model)
    assert batch is not None
    fk.apply(model, fk.plan(model, Magnitude(width=8, layers="language:all")))
    fk.save(model, tmp_path / "narrow")
    opened = type(model).from_pretrained(tmp_path / "narrow")
    assert running.difference(running.outputs(model, batch), running.outputs(opened, batch)) == 0
    assert (opened.config.text_config.intermediate_size, opened.config.vision_config.intermediate_size) == (8, 40)


def test_a_key_that_more_than_the_ffns_follows_is_none() -> None:
    sizes = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    model = made(T.LiltModel, T.LiltConfig(**sizes, max_2d_position_embeddings=64, channel_shrink_ratio=4))
    assert set(width_keys(model, ffns(model)).values()) == {None}  # the layout's own FFNs follow it too
    fk.apply(model, fk.plan(model, Magnitude(width=0.5)))
    assert model.config.quantization_config["ffns"]  # compact then


# What no class checks ---------------------------------------------------------------------------------------------


def whisper() -> Any:
    model = FAMILIES["whisper"].model()
    model.generation_config.alignment_heads = [[0, 1], [1, 0], [2, 1]]
    return model


def alignment(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text()).get("alignment_heads")


def test_the_generation_config_follows_layers_and_heads(tmp_path: Path) -> None:
    model = whisper()
    kept = model.generation_config
    fk.apply(model, fk.plan(model, LayerDrop(layers="decoder:1")))
    assert kept.alignment_heads == [[0, 1], [1, 0], [2, 1]]  # another one took its place
    fk.save(model, tmp_path / "shorter")
    assert alignment(tmp_path / "shorter") == [[0, 1], [1, 1]]
    model = whisper()
    cross = next(a for a in attentions(model) if a.cross and a.layer == 0)
    fk.apply(model, fk.plan(model, fk.RemoveHeads(remove={cross.name: 1})))
    stays = cross.kept.heads[0]  # type: ignore[union-attr]
    fk.save(model, tmp_path / "heads")
    fk.export(model, tmp_path / "standard")
    assert alignment(tmp_path / "heads") == ([[0, 0]] if stays == 1 else []) + [[1, 0], [2, 1]]
    assert alignment(tmp_path / "standard") == ([[0, 1]] if stays == 1 else []) + [[1, 0], [2, 1]]  # zeros are there
    model = whisper()
    model.generation_config.alignment_heads = [[1, 0]]
    fk.apply(model, fk.plan(model, LayerDrop(layers="decoder:1")))
    assert model.generation_config.alignment_heads is None  # asking for times raises then


# One name for a stack ---------------------------------------------------------------------------------------------


def test_a_stack_has_one_name_for_ffns_and_attention() -> None:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    config = T.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 16},
    )
    model = T.Qwen2_5_VLForConditionalGeneration(config)
    assert {a.stack for a in attentions(model)} <= {f.stack for f in ffns(model)} == {"visual", "language"}
    plan = fk.plan(model, fk.StructuredPruning(layers="language:all"))
    assert plan.edits and all("language_model" in edit.target for edit in plan.edits)


def test_the_config_is_compared_as_it_is_written() -> None:
    config = copy.deepcopy(FAMILIES["llama"].config())
    config.bound = float("inf")
    assert written(config).bound == float("inf")


def test_the_trial_takes_few_tokens_of_a_long_batch() -> None:
    """Answers of a whole batch in float64 are gigabytes where the vocabulary is large: 64 tokens tell the same."""
    from ffnkit.surgery.trial import try_out

    sizes = {"vocab_size": 99, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 200}
    model = made(T.GPT2LMHeadModel, T.GPT2Config(**sizes, bos_token_id=2, eos_token_id=3))
    batch = {"input_ids": torch.full((5, 150), 7), "attention_mask": torch.ones(5, 150, dtype=torch.long)}
    plan = fk.plan(model, LayerDrop(layers="1"))
    seen: list[torch.Size] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try_out(model, plan.edits, batch)
    handle.remove()
    assert seen and all(shape[-1] == running.FEW and shape[0] <= 2 for shape in seen)


@pytest.mark.parametrize("layers", ["1", "0-1", [2, 1]])
def test_a_layer_that_shares_an_ffn_is_told_whose(layers: Any) -> None:
    model = FAMILIES["llama"].model()
    fk.apply(model, fk.plan(model, fk.Merging(layers="0-1")))
    with pytest.raises(FfnkitError, match="layer 1 shares the FFN of layer 0"):
        fk.plan(model, fk.Fusion(width=0.5, layers=layers))
