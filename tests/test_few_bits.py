"""Checkpoints in FP8 and MXFP4 are opened as what they mean, and what becomes of them is in plain weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

import ffnkit as fk
from ffnkit.io import conversions, files
from ffnkit.io.architectures import load_any
from ffnkit.io.sizes import opened_bytes
from ffnkit.methods.narrow.selection import Magnitude
from ffnkit.stream.pages import is_mapped

BLOCK = 16
FOUR = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight by blocks of 16 x 16 in FP8, the scale of each block, and what they stand for."""
    grid = tuple(math.ceil(side / BLOCK) for side in weight.shape)
    stored, means = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            place = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scale = weight[place].float().abs().max() / 448
            stored[place] = (weight[place].float() / scale).to(torch.float8_e4m3fn)
            scales[row, column] = scale
            means[place] = (stored[place].float() * scale).to(weight.dtype)
    return stored, scales, means


def mxfp4(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks and scales of experts (E, in, out) in MXFP4, drawn, and what they stand for."""
    experts, inner, out = shape
    blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 126, (experts, out, inner // 32), dtype=torch.uint8)
    means = torch.empty(shape)
    for expert, row, place in itertools.product(range(experts), range(out), range(inner)):
        byte = int(blocks[expert, row, place // 32, place % 32 // 2])
        digit, scale = (byte >> 4 if place % 2 else byte & 15), int(scales[expert, row, place // 32])
        means[expert, place, row] = (-1 if digit > 7 else 1) * FOUR[digit & 7] * 2.0 ** (scale - 127)
    return blocks, scales, means.bfloat16()


def store(name: str, folder: Path, **more: Any) -> dict[str, Tensor]:
    """A checkpoint with weights in few bits, as DeepSeek and GPT-OSS have them; gives what its tensors stand for."""
    family = dataclasses.replace(FAMILIES[name], config_args=FAMILIES[name].config_args | more, width_keys={})
    torch.manual_seed(0)
    family.model().bfloat16().save_pretrained(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    new, means = {}, {}
    for key, value in load_file(file).items():
        new[key] = means[key] = value
        if name == "gpt-oss" and key.endswith(("gate_up_proj", "down_proj")):
            del new[key]
            new[f"{key}_blocks"], new[f"{key}_scales"], means[key] = mxfp4(tuple(value.shape))
        elif name != "gpt-oss" and key.endswith("proj.weight"):
            new[key], new[f"{key}_scale_inv"], means[key] = fp8(value)
    save_file(new, file, metadata={"format": "pt"})
    told: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    if name != "gpt-oss":
        told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": told}))
    return means


MXFP4 = ("gpt-oss", {"hidden_size": 32, "intermediate_size": 32})
# 24 rows are blocks of 16 and 8: transformers takes two of 12, and refuses 25 rows
FP8 = [("llama", {}), ("llama", {"intermediate_size": 25}), ("olmoe", {})]
CASES = [FP8[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in (FP8[1], FP8[2], MXFP4))]


@pytest.mark.parametrize(("name", "more"), CASES)
def test_it_is_opened_as_it_is_meant_and_saved_in_plain_weights(
    name: str, more: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    means = store(name, tmp_path / "source", **more)
    model = load_any(str(tmp_path / "source"))
    assert "it is opened, and what is made of it is written, in bfloat16" in caplog.text
    fk.save(model, tmp_path / "plain")
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == means.keys()
    assert all(value.dtype == means[key].dtype and value.equal(means[key]) for key, value in found.items())
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    read = opened_bytes([tmp_path / "source" / "model.safetensors"], 2)
    assert read == sum(value.numel() * value.element_size() for value in means.values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compact", "standard"])
@pytest.mark.parametrize(("name", "more"), [*FP8, MXFP4])
def test_from_its_files_it_is_what_the_plain_model_becomes(
    name: str, more: dict[str, int], form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SPOOL_FROM", 1)
    means = store(name, tmp_path / "source", **more)
    shutil.copytree(tmp_path / "source", tmp_path / "plain")
    save_file(means, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "plain" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k[:5] != "quant"}))
    for source, stream in (("source", True), ("plain", False)):
        fk.compress(tmp_path / source, Magnitude(width=16), tmp_path / f"{source}-out", form=form, stream=stream)
    a, b = (load_file(tmp_path / f"{each}-out" / "model.safetensors") for each in ("source", "plain"))
    assert a.keys() == b.keys() and all(value.equal(b[key]) for key, value in a.items())


def test_what_becomes_of_experts_lies_in_files_as_they_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SPOOL_FROM", 1)
    with files.in_files(tmp_path):
        model: Any = FAMILIES["mixtral"].model()
        held = {name: p.detach() for name, p in model.named_parameters()}

        def parts() -> list[bool]:
            made = revert_weight_conversion(model, held)
            return [is_mapped(value.data_ptr()) for key, value in made.items() if ".experts." in key]

        assert parts() and not any(parts())
        conversions.into_files(model)
        assert parts() and all(parts())
