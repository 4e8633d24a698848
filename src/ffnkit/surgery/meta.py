"""A model's structure without its weights, on which edits are tried before anything is changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.io.config_text import written
from ffnkit.model import probe, running
from ffnkit.model.fresh import built
from ffnkit.model.linear import walk
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.nn.grouped_experts import are_uneven, run_by_loop, run_uneven_experts
from ffnkit.surgery import description
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
    if isinstance(model, PreTrainedModel) and (found := structure(twin)) not in _passed:
        _check_opens(model, twin)
        _check_runs(model, twin)
        _passed.add(found)
    return twin


_passed: set[int] = set()  # structures that opened and ran


def structure(model: nn.Module) -> int:
    """What rehearsals hang on, as one number: config, modules, and shapes, dtypes and ties of their tensors."""
    numbers: dict[int, int] = {}
    rows = []
    for name, module in walk(model):
        held = (*module._parameters.items(), *module._buffers.items())
        values = [
            (key, tuple(value.shape), value.dtype, value.requires_grad, numbers.setdefault(id(value), len(numbers)))
            for key, value in held
            if value is not None
        ]
        rows.append((name, type(module), tuple(values)))
    config = model.config.to_json_string() if isinstance(model, PreTrainedModel) else ""
    return hash((config, tuple(rows)))


def rebuild(model: PreTrainedModel, described: dict[str, object]) -> None:
    """Give a freshly built, empty model the structure that a compact checkpoint describes."""
    writer = ModelWriter(model, empty=True)
    with torch.no_grad():
        for edit in description.edits_of(model, described):
            edit.perform(writer)
    run_uneven_experts(model)


def _check_opens(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Raises FfnkitError where what is built from the config that would be written has other shapes than the model."""
    odd, why = _otherwise(twin)
    if not odd:
        return
    before = _otherwise(model)[0]  # a class of somebody's own, or weights that were changed by hand
    new = {name: shape for name, shape in odd.items() if name not in before and "" not in before}
    if new:
        name, shape = next(iter(new.items()))
        built_as = why or f"{name} would be {shape}, not {tuple(twin.state_dict()[name].shape)}"
        what = f"a model that is opened from the config would be another one ({built_as})"
        raise FfnkitError(f"editing {type(model).__name__}", what, "Edit other layers, or all of them alike")


def _otherwise(model: PreTrainedModel) -> tuple[dict[str, tuple[int, ...]], str]:
    """The tensors of another shape in what is built from the model's config; {"": ()} and why where nothing is."""
    try:
        fresh = built(type(model), written(model.config))
    except Exception as error:  # whatever the classes raise
        return {"": ()}, f"{type(error).__name__}: {error}"[:200]
    if (described := description.description(model)) is not None:
        rebuild(fresh, described)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in fresh.state_dict().items()}
    return {name: shape for name, shape in there.items() if name in own and own[name] != shape}, ""


def _check_runs(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Raises FfnkitError where the family's forward does not bear the shapes; known where it runs without numbers."""
    batch = None if adapter_layers(twin) else probe.inputs(model)  # updates ask for autocast, which meta has not
    why = "" if batch is None else _stopped(twin, batch)
    if batch is None or not why:
        return
    before = skeleton(model)
    if are_uneven(twin):  # their loop looks at numbers, whatever the shapes
        run_by_loop(before)
    if not _stopped(before, batch):
        what = f"its forward does not bear these shapes ({why})"
        raise FfnkitError(f"editing {type(model).__name__}", what, "Leave these places out for this family")


def _stopped(model: nn.Module, batch: dict[str, Tensor]) -> str:
    try:
        running.outputs(model, batch)
    except Exception as error:  # whatever a family raises, or torch where numbers are needed
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


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
