"""FFNs tied by their parameters, by a family (Zamba) or by hand: each owner has linears of its own over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from tolerance import assert_close, assert_differs
from transformers import LlamaConfig, LlamaForCausalLM, ZambaConfig, ZambaForCausalLM

import ffnkit as fk
from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns

SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
ZAMBA: dict[str, Any] = {
    **{"attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 5, "attn_layer_period": 2},
    **{
        "num_key_value_heads": 4,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
}
CASES = {
    "fusion": {"width": 0.5},
    "calibrated-fusion": {"width": 0.5},
    "unstructured": {"width": 0.5},
    "prune": {},
    "svd": {"width": 0.5},
}


def llama(**more: Any) -> LlamaForCausalLM:
    """Layers 1 and 2 have an MLP each, over the same parameters."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=4, **more))
    for site in ("up_proj", "gate_proj", "down_proj"):
        first, second = (getattr(model.model.layers[layer].mlp, site) for layer in (1, 2))
        second.weight = first.weight
    return model


def zamba() -> ZambaForCausalLM:
    return ZambaForCausalLM(ZambaConfig(**SIZES, **ZAMBA))


MODELS: dict[str, Any] = {"llama": llama, "zamba": zamba}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=value.shape[-1] ** -0.5, generator=generator)
    return model


def batch(seed: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(4, 99, (2, 12), generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**batch(9)).logits


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_what_stands_beside_tied_weights_is_held_once_and_reopens(name: str, method: str, tmp_path: Path) -> None:
    model = made(name)
    before, places = logits(model), [list(ffn.owners) for ffn in ffns(model)]
    fk.apply(model, fk.plan(model, methods.build(method, **CASES[method]), data=[batch(s) for s in range(4)]))
    edited = logits(model)
    assert_differs(edited, before)
    assert [list(ffn.owners) for ffn in ffns(model)] == places
    for folder in ("first", "again"):
        fk.save(model, tmp_path / folder)
        model = fk.load(tmp_path / folder).eval()
        assert torch.equal(logits(model), edited)
        assert [list(ffn.owners) for ffn in ffns(model)] == places
    twins = tuple(f"{twin}." for ffn in ffns(model) for twin in ffn.tied)
    assert not [key for key in load_file(tmp_path / "again" / "model.safetensors") if key.startswith(twins)]
    fk.fold(model)
    assert_close(logits(model), edited, rel=1e-5)
    assert [list(ffn.owners) for ffn in ffns(model)] == places


@pytest.mark.parametrize("method", ["fusion", "unstructured"])
def test_so_are_factors_of_tied_experts(method: str, tmp_path: Path) -> None:
    row = FAMILIES["mixtral"]
    model = row.model()
    first, second = ffns(model)[:2]
    for name in first.tensor_names:
        second.module._parameters[name] = first.module._parameters[name]
    fk.apply(model, fk.plan(model, methods.build(method, width=0.5)))
    with torch.no_grad():
        edited = model(**row.inputs(model)).logits
        fk.save(model, tmp_path)
        assert torch.equal(fk.load(tmp_path)(**row.inputs(model)).logits, edited)


@pytest.mark.parametrize("method", ["fusion", "unstructured", "svd", "magnitude"])
def test_biases_of_their_own_are_not_made_one(method: str) -> None:
    torch.manual_seed(0)
    model = llama(mlp_bias=True)
    with pytest.raises(FfnkitError, match="places that share its weights have biases of their own") as caught:
        fk.apply(model, fk.plan(model, methods.build(method, width=0.5)))
    assert "\n" not in str(caught.value)
