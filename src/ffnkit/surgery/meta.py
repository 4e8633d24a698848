"""A model's structure without its weights, on which edits are tried before anything is changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ffnkit.edits import Edit
from ffnkit.surgery.journal import reachable
from ffnkit.surgery.writer import ModelWriter

_PLAIN = (str, int, float, bool, type(None), dict, list, tuple, set, PreTrainedConfig, nn.Module)


def rehearse(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """What a model becomes by edits, without weights; the model itself is only read.

    Raises:
        FfnkitError: one of them cannot be carried out, or what they leave cannot be described.
    """
    twin = skeleton(model)
    ModelWriter(twin, empty=True).carry_out(edits)
    return twin


def skeleton(model: nn.Module) -> Any:
    """A copy of a model whose plain tensors are on the meta device. What is quantized, and what is no part of its
    structure (hooks, quantizers, caches), is left out or shared with the model."""
    memo: dict[int, Any] = {}
    modules = list(reachable(model))
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            else:
                _note(value, memo)
        for held in (module._parameters, module._buffers):
            for value in held.values():
                if value is not None:
                    memo[id(value)] = _without_numbers(value)
    return copy.deepcopy(model, memo)


def _note(value: Any, memo: dict[int, Any]) -> None:
    """What stays the model's own object: tensors outside of parameters and buffers, and objects of unknown kinds."""
    if isinstance(value, Tensor) or not (isinstance(value, _PLAIN) or hasattr(type(value), "__deepcopy__")):
        memo.setdefault(id(value), value)
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            _note(each, memo)


def _without_numbers(value: Tensor) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter):
        return value  # quantized
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
