"""Whole layers of a stack, taken out of the model and out of its config."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.model.config_keys import candidates, config_tree
from ffnkit.model.families.keys import DEPTH_KEYS, LAYER_NUMBER_ATTRIBUTES
from ffnkit.model.finding import ffns
from ffnkit.model.linear import walk


def without_layers(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """Take layers out of their stacks, in place; the layers behind move up and are told their new numbers.

    Args:
        layers: paths of whole layers, such as "model.layers.3".

    Returns:
        the new path of every layer that stays in a stack that changed, by its old one.

    Raises:
        FfnkitError: a stack whose depth stands in no config key, its last layer, a first layer that holds what all
            use, layers that share FFNs; what was changed until then is the caller's to undo (``journal``).
    """
    by_holder: dict[str, list[str]] = defaultdict(list)
    for layer in dict.fromkeys(layers):
        by_holder[layer.rpartition(".")[0]].append(layer)
    if any(ffn.tied for ffn in ffns(model)):
        raise FfnkitError("dropping layers", "some layers share an FFN", "Drop layers first, then merge")
    renamed: dict[str, str] = {}
    for holder, gone in by_holder.items():
        renamed |= _shorten(model, holder, gone)
    _check(model)
    return renamed


def moved(by_name: dict[str, Any], renamed: dict[str, str], gone: Iterable[str]) -> dict[str, Any]:
    """What was known of FFNs by name, under the names that they have once the layers ``gone`` are taken out."""
    result = {}
    for name, value in by_name.items():
        inside = next((old for old in (*gone, *renamed) if name == old or name.startswith(f"{old}.")), None)
        if inside is None:
            result[name] = value
        elif inside in renamed:
            result[renamed[inside] + name[len(inside) :]] = value
    return result


def _shorten(model: PreTrainedModel, holder: str, gone: list[str]) -> dict[str, str]:
    stack = model.get_submodule(holder)
    asked = f"dropping {', '.join(gone)}"
    if not isinstance(stack, nn.ModuleList):
        raise FfnkitError(asked, f"{holder or 'the model'} is no list of layers", "Name layers of a plain stack")
    before = dict(stack._modules)
    kept = [name for name in before if f"{holder}.{name}" not in gone]
    if not kept:
        raise FfnkitError(asked, "no layer of the stack is left", "Keep at least one")
    owned = [{name for name, _ in before[n].named_parameters()} for n in (next(iter(before)), kept[0])]
    if owned[0] - owned[1]:
        what = f"the first layer holds {sorted(owned[0] - owned[1])[0]}, which all of them use"
        raise FfnkitError(asked, what, "Keep the first layer")
    places = _depth(model, holder, len(before))
    if not places:
        raise FfnkitError(asked, f"no key of the config says that {holder} has {len(before)} layers", "Keep them all")
    numbers = [int(name) for name in kept]
    for config, key in places:
        setattr(config, key, len(kept))
    for config in {id(c): c for c, _ in places}.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == len(before):
                setattr(config, key, type(value)(value[n] for n in numbers))
    for new, old in enumerate(kept):
        for module in before[old].modules():
            for key in LAYER_NUMBER_ATTRIBUTES:
                if module.__dict__.get(key) == int(old):
                    setattr(module, key, new)
    stack._modules.clear()
    stack._modules.update({str(new): before[old] for new, old in enumerate(kept)})
    return {f"{holder}.{old}": f"{holder}.{new}" for new, old in enumerate(kept)}


def _depth(model: PreTrainedModel, holder: str, layers: int) -> list[tuple[PreTrainedConfig, str]]:
    """Every (config, key) that says how many layers the stack has: that of the nearest config, and its copies."""
    word = next((part for part in ("encoder", "decoder") if part in holder.split(".")), None)
    other = {"encoder": "decoder", "decoder": "encoder"}.get(word or "")
    two = other is not None and any(other in name.split(".") for name, _ in model.named_modules())
    for config in _configs(model, holder):
        keys = [key for key in DEPTH_KEYS if vars(config).get(key) == layers]
        if two:
            own = [key for key in keys if word in key.split("_")]
            plain = [key for key in keys if not {"encoder", "decoder"} & set(key.split("_"))]
            # T5 and BART keep the encoder's depth in the plain key
            keys = own + (plain if word == "encoder" or not own else [])
        else:
            keys = [key for key in keys if word is None or other not in key.split("_")] or keys
        if keys:
            return [(config, key) for key in keys]
    return []


def _configs(model: PreTrainedModel, holder: str) -> list[PreTrainedConfig]:
    """The configs of the model's tree that may speak of a module, nearest first."""
    tree = list(config_tree(model.config))
    modules = dict(walk(model))
    return [config for _, config in candidates(tree, modules, holder)]


def _check(model: PreTrainedModel) -> None:
    """That plain transformers builds the same tensors from the config. Raises FfnkitError where it does not."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    built, here = set(fresh.state_dict()), set(model.state_dict())
    special = {name for name in here - built if name.rpartition(".")[2] not in ("weight", "bias")}
    odd = sorted((built ^ here) - special)
    if odd:
        what = f"a model built from the shorter config differs in {len(odd)} tensors, such as {odd[0]}"
        raise FfnkitError("dropping layers", what, "Keep the layers of this family")
