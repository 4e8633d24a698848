"""Shared FFNs over several devices: which device maps hold, and the way from the one device to the other and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.surgery.description import rows_for


def check_map(model: PreTrainedModel, described: dict[str, Any], device_map: Any) -> None:
    """Raises FfnkitError where a map leaves the weights of a shared FFN on disk and puts a layer that uses them apart.

    So it does where layers keep something of their own beside the weights that they share and one of them goes to disk:
    what is fetched from there is found by the name of one layer, and each has linears of its own.

    Args:
        model: empty, of the described shape. device_map: as ``from_pretrained`` takes it; as ``hf_device_map`` says it.
    """
    if not isinstance(device_map, dict):
        return
    differing = {name for ffn in ffns(model) if ffn.differing for name in ffn.owners}
    for _, names in rows_for(model, described):
        places = [_place(device_map, name) for name in names]
        if "disk" in places and len(names) > 1 and differing.intersection(names):
            found = f"{names[places.index('disk')]} goes to disk, and keeps something of its own beside shared weights"
            raise FfnkitError("device_map", found, f"Put {' and '.join(names)} elsewhere, or export the standard form")
        if places[0] == "disk" and any(place != "disk" for place in places):
            other = next(i for i, place in enumerate(places) if place != "disk")
            found = f"{names[0]} goes to disk and {names[other]}, which shares its weights, to {places[other]}"
            raise FfnkitError("device_map", found, f"Put {names[0]} where {names[other]} is, or both on disk")


def bridge(model: PreTrainedModel) -> list[str]:
    """Let layers on several devices use the FFN that they share, where it lies; the names of such FFNs come back.

    Its inputs are sent to its device and its outputs back to where the inputs came from, so that it stays one copy of
    the weights. ``ffnkit.load`` and ``from_pretrained`` do this for a ``device_map``; call it after
    ``accelerate.dispatch_model``.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not isinstance(device_map, dict):
        return []
    crossing = []
    for ffn in ffns(model):
        devices = {_runs_on(device_map, name) for name in ffn.owners}
        if len(devices) > 1:
            crossing.append(ffn.name)
            for module in _shared(ffn):
                _stay(module, _runs_on(device_map, ffn.name))
    return crossing


def _shared(ffn: FFN) -> list[nn.Module]:
    """The modules that stand in several layers."""
    owners = list(ffn.owners.values())
    if all(owner is owners[0] for owner in owners):
        return [owners[0]]
    return list(dict.fromkeys(owner.get_submodule(ffn.path(site)) for owner in owners for site in ffn.sites))


def _stay(module: nn.Module, device: torch.device) -> None:
    """Have a module run on one device whoever calls it, and hand its outputs back to the caller's."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for inner in module.modules():
        hook: Any = getattr(inner, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook):
            hook.execution_device = device
        for parameters in (inner._parameters, inner._buffers):
            for value in parameters.values():
                if value is not None and not value.is_meta and value.device != device:
                    value.data = value.data.to(device)
    outer: Any = getattr(module, "_hf_hook", None)
    if isinstance(outer, AlignDevicesHook):
        outer.io_same_device = True
    else:
        add_hook_to_module(module, AlignDevicesHook(execution_device=device, io_same_device=True))


def _place(device_map: dict[str, Any], name: str) -> Any:
    """What a map says of a module: the entry of the longest name that it begins with."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        if ".".join(parts[:end]) in device_map:
            return device_map[".".join(parts[:end])]
    return next((place for key, place in device_map.items() if key.startswith(f"{name}.")), None)


def _runs_on(device_map: dict[str, Any], name: str) -> torch.device:
    """The device on which a module computes: what lies on disk or, beside an accelerator, on the CPU is fetched."""
    real = [place for place in device_map.values() if place not in ("cpu", "disk") and str(place) != "cpu"]
    main = real[0] if real else "cpu"
    place = _place(device_map, name)
    return torch.device(main if place in (None, "cpu", "disk") or str(place) == "cpu" else place)
