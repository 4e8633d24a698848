"""Saved adapters back on a model, one with shared FFNs included, which peft alone would adapt in one place only."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnkit.errors import FfnkitError
from ffnkit.io.loading import open_errors
from ffnkit.surgery.untie import UntiedFfn, untie
from ffnkit.tune import lora, masks, sparing, zeros
from ffnkit.tune.lifecycle import preparing, undone


def load_adapter(
    model: nn.Module, folder: str | Path, *, trainable: bool = False, keep_zeros: bool = False
) -> nn.Module:
    """A peft model around ``model`` with the LoRA adapter that ``folder`` holds, in every layer that it was made for.

    Where layers share an FFN, the adapter is shared too, or each layer has its own over the shared weights, as the
    file says. ``ffnkit.tune.tuners.finish`` merges it. Special linears are folded first, as in tuning.

    Args:
        model: the model that was tuned, compact, exported or quantized; changed in place. A tuner that was
            prepared on it and never finished is undone first; where this fails the model is as it was.
        folder: what ``adapter_dir`` named. trainable: whether the adapter trains further.
        keep_zeros: weights that are zero now (pruned) are zero after merging too.

    Raises:
        FfnkitError: no adapter is there, or the model lacks a linear that it was made for.
    """
    asked = f"adapter {folder}"
    state = _state(folder, asked)
    model = undone(model)
    with preparing(model) as preparation:
        masked = masks.set_aside(model, preparation)
        parted = _parted_where_needed(cast(PreTrainedModel, model), state)
        preparation.from_here()
        preparation.afterwards(partial(lora.settled, parted=parted, flags=None))
        _check_places(model, state, asked)
        names = list(dict.fromkeys(_module(key) for key in state))
        ties = lora.tied_places(model, [name for name in names if _has(model, name)])
        with open_errors(asked):
            noted = zeros.note(model) if keep_zeros or masked else {}
            tuned = lora.adapted(model, lambda base: _opened(base, folder, trainable), ties, parted)
            _check_whole(tuned, state, asked)
            sparing.spare(tuned, noted if keep_zeros else sparing.of(noted, masked))
            zeros.hold(tuned, noted if keep_zeros else {})
            return tuned


def _opened(model: Any, folder: str | Path, trainable: bool) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def _state(folder: str | Path, asked: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = Path(folder).expanduser() / "adapter_model.safetensors"
    if not os.path.isfile(path):
        raise FfnkitError(asked, f"there is no {path.name}", "Name a folder that adapter_dir wrote")
    with open_errors(asked):
        return load_file(path)


def _parted_where_needed(model: PreTrainedModel, state: dict[str, Tensor]) -> list[UntiedFfn]:
    """The shared FFNs of the model, parted if the file holds unlike adapters for places of one of them."""
    from ffnkit.model.finding import ffns

    shared = [ffn for ffn in ffns(model) if ffn.tied and not ffn.layout.experts]
    for ffn in shared:
        for site in ffn.sites:
            tensors = [_of(state, f"{name}.{ffn.path(site)}") for name in ffn.owners]
            if any(own and not _equal(own, tensors[0]) for own in tensors[1:]):
                return untie(model)
    return []


def _of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{lora.PREFIX}{name}."
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def _check_places(model: nn.Module, state: dict[str, Tensor], asked: str) -> None:
    lost = [key for key in state if ".lora_" in key and not _has(model, _module(key))]
    if lost:
        found = f"{type(model).__name__} has no {_module(lost[0])}"
        raise FfnkitError(asked, found, "Give the model that was tuned")


def _check_whole(tuned: Any, state: dict[str, Tensor], asked: str) -> None:
    """Raises FfnkitError where the file lacks a tensor: peft warns, and leaves it as it was drawn."""
    from peft import get_peft_model_state_dict

    lost = sorted(get_peft_model_state_dict(tuned, save_embedding_layers=False).keys() - state.keys())
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise FfnkitError(asked, f"its file lacks {lost[0]}{more}", "Save it anew")


def _module(key: str) -> str:
    return key.removeprefix(lora.PREFIX).split(".lora_")[0]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
