"""LoRA adapters in peft's form, as they are read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.nn.quantized import quantized_features

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_HEADS = {"classifier", "score"}  # peft names both for a classifier, which has one of them
_BEYOND = {"use_dora": "DoRA", "lora_bias": "biases in B", "layer_replication": "replicated layers"}


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter.

    Attributes:
        layers: by the linear's name A (r, in), B (out, r) and the scale of B A. beside: parameters that trained too.
    """

    layers: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)

    def placed(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> Lora:
        """The adapter under the names of these linears, where they hang in several places.

        Raises:
            FfnkitError: it adapts a linear that is not among them, or of other sides.
        """
        names = {id(linear): name for name, linear in linears.items()}
        every = dict(model.named_modules(remove_duplicate=False))
        layers = {}
        for name, (down, up, scale) in self.layers.items():
            asked, linear = f"the LoRA adapter's update of {name}", every.get(name)
            if linear is None or id(linear) not in names:
                raise FfnkitError(asked, "that linear gets no update", "Name with targets all that the adapter adapts")
            if (len(up), down.shape[1]) != quantized_features(linear):
                raise FfnkitError(
                    asked, f"it is for {len(up)} x {down.shape[1]}", f"Here it is {quantized_features(linear)}"
                )
            layers[names[id(linear)]] = (down, up, scale)
        return Lora(layers, self.beside)


def read_lora(folder: str | Path) -> Lora:
    """A LoRA adapter that peft saved.

    Raises:
        FfnkitError: there is none, or it is of a kind that is more than B A.
    """
    from safetensors.torch import load_file

    asked, path = f"LoRA adapter {folder}", Path(folder)
    if not os.path.isfile(path / CONFIG) or not os.path.isfile(path / TENSORS):
        raise FfnkitError(asked, f"there is no {CONFIG} with {TENSORS}", "Name a folder that peft saved")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        state = {key.removeprefix(PREFIX): value for key, value in load_file(path / TENSORS).items()}
    except Exception as error:
        raise FfnkitError(asked, f"it cannot be read ({error})", "Save it anew") from None
    if config.get("peft_type") != "LORA":
        raise FfnkitError(asked, f"it is of kind {config.get('peft_type')}", "Name a LoRA adapter")
    for key, what in _BEYOND.items():
        if config.get(key):
            raise FfnkitError(asked, f"it has {what}", "Only plain LoRA can be read")
    layers, beside = {}, {}
    for key, value in state.items():
        name, mark, rest = key.partition(".lora_")
        if not mark:
            beside[key] = value
        elif name.endswith(".base_layer") or rest not in ("A.weight", "B.weight"):
            raise FfnkitError(asked, f"it adapts {key}", "Only adapters of linears can be read")
        elif not {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= state.keys():
            raise FfnkitError(asked, f"of the pair on {name} it holds {key} alone", "Save it anew")
        elif rest == "A.weight":
            layers[name] = (value.float(), state[f"{name}.lora_B.weight"].float(), _scale(config, name, len(value)))
    parts = config.get("modules_to_save") or ()
    lacking = {part for part in parts if not any(f".{part}." in f".{key}" for key in beside)}
    if lacking - _HEADS or (lacking and lacking >= _HEADS):
        raise FfnkitError(
            asked, f"its file lacks {', '.join(sorted(lacking))}, which trained beside it", "Save it anew"
        )
    if not layers:
        raise FfnkitError(asked, "it adapts no linear", "Name a LoRA adapter")
    return Lora(layers, beside)


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), as the config has it for a linear."""
    own = (v for key, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(own, config["lora_alpha"]))
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
