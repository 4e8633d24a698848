"""Whole layers of a stack, taken out of the model and out of its config."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.model.generation_numbers import set_numbers
from ffnkit.surgery.layer_config import Shorter, shorten


def without_layers(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """Take layers out of their stacks, in place; the layers behind move up and are told their new numbers.

    Args:
        layers: paths of whole layers, such as "model.layers.3".

    Returns:
        the new path of every layer that stays in a stack that changed, by its old one.

    Raises:
        FfnkitError: a stack whose depth stands in no config key, its last layer, layers that share FFNs, layers that
            would be others in their new places (or would hold what the first one holds for all); what was changed
            until then is the caller's to undo (``journal``).
    """
    by_holder: dict[str, list[str]] = defaultdict(list)
    for layer in dict.fromkeys(layers):
        by_holder[layer.rpartition(".")[0]].append(layer)
    gone = tuple(f"{layer}." for each in by_holder.values() for layer in each)
    for ffn in ffns(model):
        if inside := [name for name in ffn.owners if ffn.tied and f"{name}.".startswith(gone)]:
            raise FfnkitError("dropping layers", f"{inside[0]} shares its FFN", "Drop layers first, then merge")
    stacks = [_shorter(model, holder, gone) for holder, gone in by_holder.items()]
    shorten(model, stacks)
    renamed: dict[str, str] = {}
    for stack in stacks:
        held = model.get_submodule(stack.holder)
        stay = [held[number] for number in stack.kept]  # type: ignore[index]
        held._modules.clear()
        held._modules.update({str(new): layer for new, layer in enumerate(stay)})
        set_numbers(
            model, partial(_moved_pair, stack), **({"first": stack.upto} if not _coder(stack, "encoder") else {})
        )
        renamed |= {f"{stack.holder}.{old}": f"{stack.holder}.{new}" for new, old in enumerate(stack.kept)}
    return renamed


def _moved_pair(stack: Shorter, layer: int, head: int) -> tuple[int, int] | None:
    """The new [layer, head] of a decoder's cross-attention."""
    if not _coder(stack, "decoder"):
        return layer, head
    return (stack.kept.index(layer), head) if layer in stack.kept else None


def _coder(stack: Shorter, word: str) -> bool:
    return word in stack.holder.split(".")


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


def _shorter(model: PreTrainedModel, holder: str, gone: list[str]) -> Shorter:
    stack = model.get_submodule(holder)
    asked = f"dropping {', '.join(gone)}"
    if not isinstance(stack, nn.ModuleList):
        raise FfnkitError(asked, f"{holder or 'the model'} is no list of layers", "Name layers of a plain stack")
    before = stack._modules
    kept = [name for name in before if f"{holder}.{name}" not in gone]
    if not kept:
        raise FfnkitError(asked, "no layer of the stack is left", "Keep at least one")
    return Shorter(holder, len(before), tuple(int(name) for name in kept))
