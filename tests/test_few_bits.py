"""Checkpoints in FP8 and MXFP4 are opened as what they mean, and what becomes of them is in plain weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from torch import Tensor

import ffnkit as fk
from ffnkit.io.architectures import load_any
from ffnkit.io.sizes import opened_bytes
from ffnkit.methods.narrow.selection import Magnitude

BLOCK = 16


def fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight by blocks of 16 x 16 in FP8, the scale of each block, and what they stand for."""
    grid = tuple(math.ceil(side / BLOCK) for side in weight.shape)
    stored, means, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight), torch.empty(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            place = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scale = weight[place].float().abs().max() / 448
            stored[place] = (weight[place].float() / scale).to(torch.float8_e4m3fn)
            scales[row, column] = scale
            means[place] = (stored[place].float() * scale).to(weight.dtype)
    return stored, scales, means


def store(family: str, folder: Path) -> dict[str, Tensor]:
    """A checkpoint whose linears of the layers are in FP8; gives what its tensors stand for."""
    build(family).bfloat16().save_pretrained(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    new, means = {}, {}
    for name, value in load_file(file).items():
        new[name] = means[name] = value
        if ".layers." in name and name.endswith("proj.weight"):
            new[name], new[f"{name}_scale_inv"], means[name] = fp8(value)
    save_file(new, file, metadata={"format": "pt"})
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": told}))
    return means


def same(folder: Path, means: dict[str, Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == means.keys()
    assert all(value.dtype == means[name].dtype and value.equal(means[name]) for name, value in found.items())
