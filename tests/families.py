"""One small real configuration for each model family.

``FAMILIES["gpt2"].model()`` builds the model by its real transformers class with random weights, ``.inputs(model)``
gives keyword arguments for ``model(**inputs)`` (some padding masked where the family has a mask) and
``.outputs(model, inputs)`` the output tensors that tests compare. All is on the CPU, in float32 and eval mode.
"""

from __future__ import annotations

from typing import Any

from family import PAD, VOCAB, Expect, Family

IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = IDS | {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 30,
}  # fmt: skip
LLAMA = ENCODER | {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
MOE = LLAMA | {"num_hidden_layers": 2, "num_experts_per_tok": 2}
BART = IDS | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 24, "max_position_embeddings": 30,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = IDS | {
    "d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2,
    "relative_attention_num_buckets": 8, "decoder_start_token_id": 1,
}  # fmt: skip
GPT2 = IDS | {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 40, "n_positions": 30}
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40,
    "image_size": 8, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
CLIP_TEXT = ENCODER | {"eos_token_id": 4}
WIDTH = {"intermediate_size": 40}
GATED_WIDTH = {"intermediate_size": 24}
BART_WIDTH = {"encoder_ffn_dim": 40, "decoder_ffn_dim": 24}
BART_FFNS = (Expect(2, 40, stack="encoder"), Expect(3, 24, stack="decoder"))


def _encoder(name: str, model_class: str, **more: Any) -> Family:
    return Family(name, model_class, ENCODER | more, (Expect(3, 40),), WIDTH)


def _decoder(name: str, model_class: str, **more: Any) -> Family:
    """A decoder without gates."""
    return Family(name, model_class, ENCODER | more, (Expect(3, 40),), WIDTH)


def _gated(name: str, model_class: str, **more: Any) -> Family:
    return Family(name, model_class, LLAMA | more, (Expect(3, 24, gated=True),), GATED_WIDTH)


def _gpt2(name: str, model_class: str, **more: Any) -> Family:
    return Family(name, model_class, GPT2 | more, (Expect(3, 40),), {"n_inner": 40})


def _bart(name: str, model_class: str, **more: Any) -> Family:
    return Family(name, model_class, BART | more, BART_FFNS, BART_WIDTH, kind="seq2seq")


def _t5(name: str, model_class: str, *, gated: bool, **more: Any) -> Family:
    expect = (Expect(2, 40, gated=gated, stack="encoder"), Expect(3, 40, gated=gated, stack="decoder"))
    return Family(name, model_class, T5 | more, expect, {"d_ff": 40}, kind="seq2seq")


def _experts(name: str, model_class: str, *expect: Expect, keys: dict[str, int], **more: Any) -> Family:
    return Family(name, model_class, MOE | more, expect, keys)


# fmt: off
_ROWS = (
    # Encoders
    _encoder("bert", "BertForSequenceClassification", num_labels=3),
    _encoder("roberta", "RobertaForSequenceClassification", num_labels=2),
    _encoder("xlm-roberta", "XLMRobertaForMaskedLM"),
    _encoder("camembert", "CamembertForMaskedLM"),
    Family(
        "distilbert", "DistilBertForSequenceClassification",
        IDS | {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 30},
        (Expect(3, 40),), {"hidden_dim": 40},
    ),
    Family("albert", "AlbertForMaskedLM", ENCODER | {"embedding_size": 12}, (Expect(1, 40),), WIDTH),
    Family(
        "albert-groups", "AlbertModel",
        ENCODER | {"embedding_size": 12, "num_hidden_layers": 4, "num_hidden_groups": 2}, (Expect(2, 40),), WIDTH,
    ),
    _encoder("electra", "ElectraForSequenceClassification", embedding_size=12),
    _encoder(
        "deberta-v2", "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
    ),
    _encoder("deberta", "DebertaForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("mpnet", "MPNetForSequenceClassification"),
    _encoder("ernie", "ErnieModel"),
    _encoder("esm", "EsmForMaskedLM", mask_token_id=4, position_embedding_type="rotary", token_dropout=False),
    _encoder("roformer", "RoFormerForMaskedLM", embedding_size=16),
    _encoder("layoutlm", "LayoutLMModel", max_2d_position_embeddings=32),
    Family(
        "modernbert", "ModernBertForSequenceClassification",
        ENCODER | {"intermediate_size": 24, "cls_token_id": 2, "sep_token_id": 3, "mlp_bias": True},
        (Expect(3, 24, gated=True),), GATED_WIDTH,
    ),
    # Decoders
    _gpt2("gpt2", "GPT2LMHeadModel"),
    # its width is the default: None in the configuration, four times the hidden size in the model
    Family("gpt2-default", "GPT2LMHeadModel", GPT2 | {"n_inner": None}, (Expect(3, 64),), {"n_inner": 64}),
    _gpt2("gpt-bigcode", "GPTBigCodeForCausalLM"),
    _gpt2("gptj", "GPTJForCausalLM", rotary_dim=4),
    _gpt2("codegen", "CodeGenForCausalLM", n_head=4, n_embd=16, rotary_dim=4, n_ctx=30),
    Family(
        "gpt-neo", "GPTNeoForCausalLM",
        IDS | {
            "hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 40, "max_position_embeddings": 30,
            "attention_types": [[["global"], 3]],
        },
        (Expect(3, 40),), WIDTH,
    ),
    _decoder("gpt-neox", "GPTNeoXForCausalLM"),
    _decoder("phi", "PhiForCausalLM"),
    _decoder("starcoder2", "Starcoder2ForCausalLM", num_key_value_heads=1),
    _decoder("nemotron", "NemotronForCausalLM", num_key_value_heads=1),
    _decoder("apertus", "ApertusForCausalLM", num_key_value_heads=1),
    _decoder("biogpt", "BioGptForCausalLM"),
    Family(
        "opt", "OPTForCausalLM",
        IDS | {
            "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 40,
            "word_embed_proj_dim": 16, "max_position_embeddings": 30,
        },
        (Expect(3, 40),), {"ffn_dim": 40},
    ),
    Family(
        "falcon", "FalconForCausalLM",
        IDS
        | {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_hidden_size": 40, "bias": True},
        (Expect(3, 40),), {"ffn_hidden_size": 40},
    ),
    # Its width has no key in the configuration: always four times the hidden size.
    Family("bloom", "BloomForCausalLM", IDS | {"hidden_size": 16, "n_layer": 3, "n_head": 2}, (Expect(3, 64),)),
    _gated("llama", "LlamaForCausalLM"),
    _gated("llama-bias", "LlamaForSequenceClassification", mlp_bias=True),
    _gated("mistral", "MistralForCausalLM"),
    _gated("olmo", "OlmoForCausalLM"),
    _gated("olmo2", "Olmo2ForCausalLM"),
    _gated("qwen2", "Qwen2ForSequenceClassification"),
    _gated("qwen3", "Qwen3ForCausalLM", head_dim=4),
    _gated("gemma", "GemmaForCausalLM", head_dim=4),
    _gated("gemma2", "Gemma2ForCausalLM", head_dim=4, query_pre_attn_scalar=4, sliding_window=4),
    _gated("gemma3", "Gemma3ForCausalLM", head_dim=4, query_pre_attn_scalar=4, sliding_window=4),
    _gated("phi3", "Phi3ForCausalLM"),
    _gated("glm", "GlmForCausalLM", head_dim=4),
    _gated("granite", "GraniteForCausalLM"),
    _gated("smollm3", "SmolLM3ForCausalLM"),
    _gated("cohere", "CohereForCausalLM"),
    _gated("stablelm", "StableLmForCausalLM"),
    _gated(
        "lfm2", "Lfm2ForCausalLM", block_auto_adjust_ff_dim=False, layer_types=["full_attention", "conv", "conv"]
    ),
    _gated("ernie4-5", "Ernie4_5ForCausalLM", head_dim=4),
    # Vision, text with vision, speech
    Family("vit", "ViTForImageClassification", IMAGE, (Expect(3, 40),), WIDTH, kind="image"),
    Family("deit", "DeiTForImageClassification", IMAGE, (Expect(3, 40),), WIDTH, kind="image"),
    Family(
        "clip", "CLIPModel",
        {
            "text_config": CLIP_TEXT | {"intermediate_size": 24, "projection_dim": 12},
            "vision_config": IMAGE | {"projection_dim": 12, "num_hidden_layers": 2},
            "projection_dim": 12,
        },
        (Expect(3, 24), Expect(2, 40)),
        {"text_config.intermediate_size": 24, "vision_config.intermediate_size": 40}, kind="clip",
    ),
    Family(
        "clip-equal", "CLIPModel",  # text and image of equal width, each with its own key
        {
            "text_config": CLIP_TEXT | {"projection_dim": 12, "num_hidden_layers": 2},
            "vision_config": IMAGE | {"projection_dim": 12},
            "projection_dim": 12,
        },
        (Expect(5, 40),), {"text_config.intermediate_size": 40, "vision_config.intermediate_size": 40}, kind="clip",
    ),
    Family(
        "siglip", "SiglipModel",
        {"text_config": CLIP_TEXT | {"intermediate_size": 24}, "vision_config": IMAGE},
        (Expect(3, 24), Expect(4, 40)),  # the pooling head of the images has an FFN of its own
        {"text_config.intermediate_size": 24, "vision_config.intermediate_size": 40}, kind="clip",
    ),
    Family(
        "whisper", "WhisperForConditionalGeneration",
        BART | {
            "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 30,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        BART_FFNS, BART_WIDTH, kind="audio",
    ),
    # Encoder-decoders
    _bart("bart", "BartForConditionalGeneration"),
    Family(
        "bart-equal", "BartForConditionalGeneration", BART | {"decoder_ffn_dim": 40},
        (Expect(2, 40, stack="encoder"), Expect(3, 40, stack="decoder")),
        {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40}, kind="seq2seq",
    ),
    _bart("mbart", "MBartForConditionalGeneration"),
    _bart("marian", "MarianMTModel", decoder_start_token_id=1),
    _bart("pegasus", "PegasusForConditionalGeneration", decoder_start_token_id=1),
    _bart("m2m-100", "M2M100ForConditionalGeneration"),
    _bart("blenderbot", "BlenderbotForConditionalGeneration"),
    _t5("t5", "T5ForConditionalGeneration", gated=False),
    _t5("t5-gated", "T5ForConditionalGeneration", gated=True, feed_forward_proj="gated-gelu"),
    _t5("mt5", "MT5ForConditionalGeneration", gated=True, feed_forward_proj="gated-gelu"),
    _t5("umt5", "UMT5ForConditionalGeneration", gated=True, feed_forward_proj="gated-gelu"),
    # Mixtures of experts
    Family(
        "switch", "SwitchTransformersForConditionalGeneration",  # every expert is an FFN of its own
        T5 | {
            "num_experts": 3, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2,
            "num_sparse_decoder_layers": 1, "expert_capacity": 16,
        },
        (Expect(1 + 3, 40, stack="encoder"), Expect(1 + 3, 40, stack="decoder")),
        {"d_ff": 40}, kind="seq2seq", seed=31,
    ),
    _experts(
        "mixtral", "MixtralForCausalLM", Expect(2, 24, gated=True, experts=4), keys=GATED_WIDTH, num_local_experts=4
    ),
    _experts("olmoe", "OlmoeForCausalLM", Expect(2, 24, gated=True, experts=4), keys=GATED_WIDTH, num_experts=4),
    _experts(
        "qwen2-moe", "Qwen2MoeForCausalLM",
        Expect(1, 40, gated=True), Expect(2, 24, gated=True, experts=4), Expect(2, 32, gated=True),
        keys={"intermediate_size": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32},
        num_hidden_layers=3, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=32,
        num_experts=4, mlp_only_layers=[0],
    ),
    _experts(
        "qwen2-moe-equal", "Qwen2MoeForCausalLM",  # three keys of one value
        Expect(1 + 2, 24, gated=True), Expect(2, 24, gated=True, experts=4),
        keys={"intermediate_size": 24, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        num_hidden_layers=3, intermediate_size=24, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        num_experts=4, mlp_only_layers=[1],
    ),
    _experts(
        "qwen3-moe", "Qwen3MoeForCausalLM", Expect(1, 40, gated=True), Expect(2, 24, gated=True, experts=4),
        keys={"intermediate_size": 40, "moe_intermediate_size": 24},
        num_hidden_layers=3, intermediate_size=40, moe_intermediate_size=24, num_experts=4, mlp_only_layers=[1],
        head_dim=4,
    ),
    _experts(
        "granitemoe", "GraniteMoeForCausalLM", Expect(2, 24, gated=True, experts=4), keys=GATED_WIDTH,
        num_local_experts=4,
    ),
    _experts(
        "llama4", "Llama4ForCausalLM",  # weights of its experts lie as (E, in, out); every second layer is dense
        Expect(1, 40, gated=True), Expect(1, 24, gated=True, experts=4), Expect(1, 24, gated=True),
        keys={"intermediate_size": 24, "intermediate_size_mlp": 40},
        intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2, head_dim=4,
    ),
    _experts(
        "gpt-oss", "GptOssForCausalLM",  # experts with biases; rows of gate and up take turns
        Expect(2, 24, gated=True, experts=4), keys=GATED_WIDTH, num_local_experts=4, head_dim=4,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    _experts(
        "aria", "AriaTextForCausalLM", Expect(2, 24, gated=True, experts=4), Expect(2, 24, gated=True),
        keys=GATED_WIDTH, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1,
    ),
)
# fmt: on

FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
assert len(FAMILIES) == len(_ROWS), "two families share a name"
NAMES = list(FAMILIES)
GATED = [row.name for row in _ROWS if row.gated]
CLAMPED = ("gpt-oss",)  # gated, and not linear in up
RESIZABLE = [row.name for row in _ROWS if row.width_keys]  # a configuration of another width can be made
