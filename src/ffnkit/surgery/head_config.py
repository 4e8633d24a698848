"""The config of a model says how many heads there are, where its class can build that number."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.io.config_text import written
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.config_values import config_tree, config_value
from ffnkit.model.finding import ffns
from ffnkit.model.fresh import built
from ffnkit.model.linear import features, is_linear
from ffnkit.nn.pruned_attention import prune_attention


def settle(model: PreTrainedModel) -> None:
    """Let the config say how many heads there are, where its class builds the very same attention from it.

    That needs one number of heads in all layers, and a family that keeps the width of a head apart. Elsewhere the
    config goes on saying what was there before, and ``description.update_config`` describes what is left.
    """
    found = attentions(model)
    if not any(attention.kept for attention in found):
        return
    counts = {(attention.heads, attention.kv_heads, attention.head_dim) for attention in found}
    if len(counts) != 1 or any(attention.incoming for attention in found):
        return
    heads, kv_heads, width = counts.pop()
    config = copy.deepcopy(model.config)
    try:
        for each in _speaking(config, found[0]):
            _say(each, heads, kv_heads, width)
        if not _alike(model, built(type(model), written(config))):  # as it would be opened
            return
    except Exception:  # whatever the config's class raises: it does not bear it
        return
    for each in _speaking(model.config, found[0]):
        _say(each, heads, kv_heads, width)
    for attention in found:
        prune_attention(attention.inner, None, "", False)


def _speaking(config: PreTrainedConfig, attention: Attention) -> Iterator[PreTrainedConfig]:
    """The configs of the tree that say how many heads there are."""
    of = attention.kept.of[0] if attention.kept else attention.heads
    for _, each in config_tree(config):
        if config_value(each, "num_attention_heads", attention.layer) == of:
            yield each


def _say(config: Any, heads: int, kv_heads: int, width: int) -> None:
    config.num_attention_heads = heads
    if config_value(config, "num_key_value_heads") is not None:
        config.num_key_value_heads = kv_heads
    config.head_dim = width


def _alike(model: nn.Module, fresh: nn.Module) -> bool:
    """Whether a model built from the config computes like ``model`` but for its weights, FFNs left out."""
    owners = {name for ffn in ffns(model) for name in ffn.owners}
    inside = {f"{n}.{ffn.path(s)}".lstrip(".") for ffn in ffns(model) for n in ffn.owners for s in ffn.sites}
    theirs = dict(fresh.named_modules())
    for name, module in model.named_modules():
        if name in inside or not (other := theirs.get(name)):
            continue
        if is_linear(module):
            if features(module) != features(other):
                return False
        elif name not in owners and _facts(module) != _facts(other):
            return False
    return True


def _facts(module: nn.Module) -> dict[str, Any]:
    """Numbers and shapes that a module computes with."""
    own = {k: v for k, v in vars(module).items() if type(v) in (int, float, bool)}
    plain = {k: v for k, v in own.items() if not k.startswith("_") and k != "training"}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return plain | {name: tuple(value.shape) for name, value in tensors}
