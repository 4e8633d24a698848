"""What plain transformers needs of an edited model: its config, and tensors folded, padded and written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ffnkit.io import files
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.config_keys import spread
from ffnkit.model.config_values import Place, entry, largest, write
from ffnkit.model.families.attentions import Role, places
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.generation_numbers import renumber
from ffnkit.model.linear import is_transposed
from ffnkit.nn.adapter_layer import plain_state
from ffnkit.nn.expert_weights import PREFIX
from ffnkit.nn.grouped_experts import grouped_step
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery.description import Keys, description, original_widths, standing_apart, tell


def padded_widths(model: PreTrainedModel, found: list[FFN], keys: Keys, multiple: int = 1) -> dict[str, int]:
    """The width that plain transformers can build and run for each FFN: the widest under its key, or the family's.

    Where a key holds it, the next multiple of ``multiple``.
    """
    original = original_widths(model, found)
    widest = largest((key, _even_width(ffn, multiple)) for ffn in found if (key := keys[ffn.name]) is not None)
    return {
        ffn.name: original[ffn.name] if (key := keys[ffn.name]) is None else Place.of(key[1]).meant(widest[entry(key)])
        for ffn in found
    }


def _even_width(ffn: FFN, multiple: int) -> int:
    """The next multiple, for experts in 3-D parameters one that transformers' grouped product bears."""
    step = math.lcm(grouped_step(ffn.parameters()[0]), multiple) if ffn.layout.experts else multiple
    return -(-ffn.width // step) * step


def standard_config(model: PreTrainedModel, found: list[FFN], keys: Keys, targets: dict[str, int]) -> Any:
    """The config with the widths that each key is to say, and without what ffnkit wrote there."""
    config = copy.deepcopy(model.config)
    if _head_alone(model):  # engines read the embeddings in its place
        for each in (config, config.get_text_config()):
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False
    config.dtype = model.dtype  # where save_pretrained was called its name is there, which not every class takes
    described = description(model)
    if described is not None:
        tell(config, None)
        if described.get("base") is not None:
            config.quantization_config = described["base"]
    write(config, spread(found, keys, targets))
    return config


def _head_alone(model: PreTrainedModel) -> bool:
    """Whether the head, alone of what the config ties, has other numbers than the embeddings that it is tied to.

    transformers opens what has both in its files as it is, whatever its config says; others may not.
    """
    ties = _own_ties(model)
    if len(ties) != 1:
        return False
    named = dict(model.named_parameters(remove_duplicate=False))
    head, embeddings = (named.get(name) for name in next(iter(ties.items())))
    if head is None or embeddings is None or head is embeddings or head.is_meta or embeddings.is_meta:
        return False
    return not torch.equal(head, embeddings.to(head.device))


def _own_ties(model: PreTrainedModel) -> dict[str, str]:
    """What class and config tie, by name, FFNs that share their weights left out. Opening forgets its own."""
    inside = tuple(f"{owner}." for ffn in ffns(model) for owner in ffn.owners)
    held = vars(model)
    before = {"_tied_weights_keys": held["_tied_weights_keys"]} if "_tied_weights_keys" in held else {}
    every = model._tied_weights_keys or {}
    held["_tied_weights_keys"] = {name: first for name, first in every.items() if not name.startswith(inside)}
    try:
        return dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    finally:
        del held["_tied_weights_keys"]
        held.update(before)


def written_once(state: dict[str, Tensor], ties: dict[str, str]) -> dict[str, Tensor]:
    """A state dict without the tensors that opening ties to another one; those that are not equal to it stay.

    Args:
        ties: names of tied tensors, and of what they are tied to.
    """

    def is_tied(name: str) -> bool:
        first = state.get(ties.get(name, ""))
        return name in ties and (first is None or _equal(state[name], first))

    return {name: value for name, value in state.items() if not is_tied(name)}


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return (one.data_ptr() == other.data_ptr() and one.numel() > 0) or torch.equal(one, other)


def standard_state(model: PreTrainedModel, found: list[FFN], targets: dict[str, int]) -> dict[str, Tensor]:
    """The model's state dict with folded, padded, written-out FFNs; tensors that stay as they are are not copied."""
    state = plain_state(model)
    for ffn in found:
        short = targets[ffn.name] - ffn.width
        if not ffn.special and not short and not ffn.tied:
            continue
        values: dict[str, Tensor] = {}
        for owner in ffn.apart():
            if not values or ffn.differing:
                neurons = owner.read()
                values = _named_values(ffn, pad(neurons, targets[ffn.name]) if short else neurons)
            for name, value in values.items():
                new = value.detach() if owner.name == ffn.name else value.detach().clone()
                state[f"{owner.name}.{name}"] = files.held(new)
            for name in _special_names(ffn, owner.name, state):
                del state[name]
    for name, layer in standing_apart(model, found).items():
        own = [key for key in state if key.startswith(f"{name}.") and key.rpartition(".")[2] not in ("weight", "bias")]
        for key in own:
            del state[key]
        state[f"{name}.weight"] = files.held(layer.folded().detach())
    pad_heads(model, state)
    return {name: value.contiguous() for name, value in state.items()}


def _special_names(ffn: FFN, owner: str, state: dict[str, Tensor]) -> list[str]:
    """Entries of the state dict that no plain layer has: factors, masks, thin pairs."""
    places = [f"{owner}.{ffn.path(site)}." for site in ffn.special] if not ffn.layout.experts else []
    plain = {place + name for place in places for name in ("weight", "bias")}
    starts = (*places, f"{owner}.{PREFIX}")
    return [name for name in state if name.startswith(starts) and name not in plain]


def pad(neurons: Neurons, width: int) -> Neurons:
    """Further neurons of zeros: ``down`` ignores them, so no output changes."""
    more = width - neurons.ff
    shapes_of = {"up": (0, 0, 0, more), "gate": (0, 0, 0, more), "down": (0, more)}
    padded = {
        name: value if name == "down_bias" else functional.pad(value, shapes_of.get(name, (0, more)))
        for name, value in neurons.tensors().items()
    }
    return Neurons(**padded)


def _named_values(ffn: FFN, neurons: Neurons) -> dict[str, Tensor]:
    """The FFN's tensors under their names in the state dict below the owner."""
    named = {}
    for path, (weight, bias) in ffn.site_values(neurons).items():
        if ffn.layout.experts:
            named[path] = weight.mT if ffn.layout.transposed else weight
            if bias is not None:
                named[f"{path}_bias"] = bias
            continue
        transposed = is_transposed(ffn.module.get_submodule(path))
        named[f"{path}.weight"] = weight.mT if transposed else weight
        if bias is not None:
            named[f"{path}.bias"] = bias
    return named


def standard_generation_config(model: nn.Module) -> Any:
    """The generation config with the numbers that heads have once zeros stand in for those that went, or None."""
    config = getattr(model, "generation_config", None)
    kept = {each.layer: each.kept.heads for each in attentions(model) if each.cross and each.kept is not None}
    if config is None or not kept:
        return config
    return renumber(config, lambda layer, head: (layer, kept[layer][head] if layer in kept else head))


def pad_heads(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Put zeros where heads were removed into a plain state dict, so that the config's class takes it.

    Heads of zeros give nothing, so outputs stay. Returns the names of the attentions that got some.
    """
    changed = []
    for attention in attentions(model):
        record = attention.kept
        if record is None:
            continue
        changed.append(attention.name)
        whole: dict[Role, int] = {"q": record.of[0], "k": record.of[1], "v": record.of[1]}
        stay = {"q": torch.tensor(record.heads), "k": torch.tensor(record.kv), "v": torch.tensor(record.kv)}
        for name in (attention.name, *attention.tied):
            for path, value, axis, index, size in _spread(attention, whole, stay, state, name):  # type: ignore[arg-type]
                shape = list(value.shape)
                shape[axis] = size
                state[path] = value.new_zeros(shape).index_copy_(axis, index.to(value.device), value)
    return changed


def _spread(
    attention: Attention, whole: dict[Role, int], stay: dict[Role, Tensor], state: dict[str, Tensor], name: str
) -> Iterator[tuple[str, Tensor, int, Tensor, int]]:
    """(name, tensor, axis, places of what is there, size) of each tensor that lacks heads."""
    width, order, layout = attention.head_dim, attention.layout.order, attention.layout
    for path, roles in attention.paths().items():
        old, new = places(order, roles, whole, width), places(order, roles, attention.counts, width)
        index = torch.empty(sum(attention.counts[role] for role in roles) * width, dtype=torch.long)
        for role in roles:
            index[new[role]] = old[role][stay[role]]
        size = sum(whole[role] for role in roles) * width
        axis = 1 if is_transposed(attention.module.get_submodule(path)) else 0
        yield f"{name}.{path}.weight", state[f"{name}.{path}.weight"], axis, index, size
        if f"{name}.{path}.bias" in state:
            yield f"{name}.{path}.bias", state[f"{name}.{path}.bias"], 0, index, size
    columns = (stay["q"][:, None] * width + torch.arange(width)).flatten()
    axis = 0 if is_transposed(attention.linear("o")) else 1
    yield f"{name}.{layout.o}.weight", state[f"{name}.{layout.o}.weight"], axis, columns, whole["q"] * width
    for path, what, follows in attention.following():
        who, count = stay[follows or "q"], whole[follows or "q"]
        each = 1 if follows is None else width
        index = (who[:, None] * each + torch.arange(each)).flatten()
        inside = [path] if isinstance(what, Tensor) else [f"{path}.weight", f"{path}.bias"]
        for key in (f"{name}.{part}" for part in inside):
            if key in state:
                yield key, state[key], attention.axis(path), index, count * each
