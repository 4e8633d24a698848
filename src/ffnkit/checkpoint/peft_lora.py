"""The low-rank part of updates as a LoRA adapter in peft's form."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.io.folders import staging
from ffnkit.io.peft_files import PREFIX, TENSORS
from ffnkit.io.snapshots import name_of
from ffnkit.model.trainable import head_modules
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.nn.dsee import SparseLowRank
from ffnkit.surgery.writer import parts_beside


def only_low_rank(model: PreTrainedModel) -> bool:
    """Whether peft's form holds all of the updates on a model, and what trained beside them."""
    layers = adapter_layers(model).values()
    plain = all(isinstance(m, SparseLowRank) and m.rank and m.values is None and m.coefficients is None for m in layers)
    return plain and not {*parts_beside(model)} - {"head"}


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
    layers = {name: m for name, m in adapter_layers(model).items() if isinstance(m, SparseLowRank) and m.rank}
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
        base_model_name_or_path=name_of(model) or None,
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
    with staging(folder, "lora") as temporary:
        config.save_pretrained(str(temporary))
        save_file(state, temporary / TENSORS, metadata={"format": "pt"})
    return Path(folder)
