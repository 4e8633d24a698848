"""The low-rank part of updates as a LoRA adapter in peft's form, and updates that start from one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.files import staging
from ffnkit.nn.adapted import adapted
from ffnkit.nn.dsee import SparseLowRank
from ffnkit.nn.quantized import sides
from ffnkit.parts import head_modules
from ffnkit.surgery import parts_beside

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
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
                raise FfnkitError(asked, "that linear gets no update", "Name with sites all that the adapter adapts")
            if (len(up), down.shape[1]) != sides(linear):
                raise FfnkitError(asked, f"it is for {len(up)} x {down.shape[1]}", f"Here it is {sides(linear)}")
            layers[names[id(linear)]] = (down, up, scale)
        return Lora(layers, self.beside)


def read_lora(folder: str | Path) -> Lora:
    """A LoRA adapter that peft saved.

    Raises:
        FfnkitError: there is none, or it is of a kind that is more than B A.
    """
    from safetensors.torch import load_file

    asked, path = f"LoRA adapter {folder}", Path(folder)
    if not (path / CONFIG).is_file() or not (path / TENSORS).is_file():
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
        elif rest == "A.weight" and f"{name}.lora_B.weight" in state and not name.endswith(".base_layer"):
            layers[name] = (value.float(), state[f"{name}.lora_B.weight"].float(), _scale(config, name, len(value)))
        elif rest != "B.weight":
            raise FfnkitError(asked, f"it adapts {key}", "Only adapters of linears can be read")
    if not layers:
        raise FfnkitError(asked, "it adapts no linear", "Name a LoRA adapter")
    return Lora(layers, beside)


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), as the config has it for a linear."""
    own = (v for key, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(own, config["lora_alpha"]))
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


@torch.no_grad()
def save_lora(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write the low-rank part of the updates on a model as a peft LoRA adapter, whole or not at all.

    A task head that trained beside them goes along. Single entries (S2) have no place in that form: the adapter
    computes what the model does without them.

    Raises:
        FfnkitError: no low-rank update is on the model, other parts than the head trained too, or the folder cannot be
            written.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    asked = f"a LoRA adapter of {type(model).__name__}"
    layers = {name: m for name, m in adapted(model).items() if isinstance(m, SparseLowRank) and m.rank}
    if not layers:
        raise FfnkitError(asked, "no low-rank update is on it", "Apply a plan of DSEE with a rank")
    further = [part for part in parts_beside(model) if part != "head"]
    if further:
        what = f"{', '.join(further)} trained too, and peft's form does not hold them"
        raise FfnkitError(asked, what, "Keep the adapter with save_adapter, or train the head alone beside it")
    heads = list(head_modules(model)) if "head" in parts_beside(model) else []
    modules = dict(model.named_modules(remove_duplicate=False))
    everywhere = {name: m for name, m in modules.items() if isinstance(m, SparseLowRank) and m.rank}
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]
        target_modules="|".join(re.escape(name) for name in everywhere),
        rank_pattern={re.escape(name): m.rank for name, m in everywhere.items() if m.rank != first.rank},
        alpha_pattern={re.escape(name): m.alpha for name, m in everywhere.items() if m.alpha != first.alpha},
        modules_to_save=heads or None,
        fan_in_fan_out=isinstance(first.__dict__["_shell"], Conv1D),
        base_model_name_or_path=getattr(model.config, "_name_or_path", None) or None,
        inference_mode=True,
    )
    state: dict[str, Tensor] = {}
    for name, layer in everywhere.items():
        assert layer.up is not None and layer.down is not None
        up = layer.up.detach()
        if layer.rows is not None:
            up = up.new_zeros(layer.features[0], layer.rank).index_copy_(0, layer.rows.long(), up)
        state[f"{PREFIX}{name}.lora_A.weight"] = layer.down.detach().cpu().clone()
        state[f"{PREFIX}{name}.lora_B.weight"] = up.cpu().clone()
    for head in heads:
        for name, value in modules[head].state_dict(prefix=f"{PREFIX}{head}.").items():
            state[name] = value.detach().cpu().clone()
    with staging(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_file(state, temporary / TENSORS, metadata={"format": "pt"})
    return Path(folder)
