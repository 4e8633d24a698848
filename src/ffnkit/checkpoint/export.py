"""Forms that other tools open: plain transformers, and engines that read a width for each layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffnkit.checkpoint import nemotron
from ffnkit.checkpoint.companions import write_companions
from ffnkit.checkpoint.decilm.modeling_decilm import DeciLMForCausalLM
from ffnkit.checkpoint.dtypes import write_dtypes
from ffnkit.checkpoint.exported import ExportReport as ExportReport
from ffnkit.checkpoint.save import short_card
from ffnkit.checkpoint.speed import measured
from ffnkit.checkpoint.standard import (
    padded_widths,
    standard_config,
    standard_generation_config,
    standard_state,
    written_once,
)
from ffnkit.checkpoint.verify import verify
from ffnkit.errors import FfnkitError
from ffnkit.io.architectures import is_own
from ffnkit.io.backends import check_writes
from ffnkit.io.conversions import into_files
from ffnkit.io.files import SHARD, are_in_files
from ffnkit.io.folders import as_named, staging
from ffnkit.io.loading import check_weights, no_bars
from ffnkit.io.progress import phase
from ffnkit.model.attention import attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.linear import check_untouched
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.nn.quantized import is_quantized_linear
from ffnkit.surgery.description import Keys, width_keys

logger = logging.getLogger(__name__)
Target = Literal["standard", "nemotron-nas"]
TARGETS: tuple[Target, ...] = ("standard", "nemotron-nas")
_SERVED = ("ForCausalLM", "LMHeadModel")  # classes that inference engines have, by the end of their names


@dataclass(frozen=True)
class _Form:
    """What is to be written: the class that opens it, its config, its tensors, and the width of each FFN in it."""

    kind: Any
    config: Any
    state: dict[str, Tensor]
    targets: dict[str, int]


def written_widths(model: PreTrainedModel, target: Target = "standard", multiple: int = 1) -> dict[str, int]:
    """The width that each FFN has in the file of a form, by the places where it stands; 0: it is left out there."""
    found = ffns(model)
    targets, left_out = _targets(model, found, width_keys(model, found), target, multiple)
    return {owner: 0 if owner in left_out else targets[ffn.name] for ffn in found for owner in ffn.owners}


def _targets(
    model: PreTrainedModel, found: list[FFN], keys: Keys, target: Target, multiple: int
) -> tuple[dict[str, int], set[str]]:
    """The width of each FFN in the file, by its name, and the places whose FFN is left out."""
    if target == "standard":
        return padded_widths(model, found, keys, multiple), set()
    left_out = nemotron.silent(found) if multiple % nemotron.UNIT else set()
    return {ffn.name: -(-ffn.width // multiple) * multiple for ffn in found}, left_out


def export(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    card: str | None = None,
    *,
    target: Target = "standard",
    multiple: int = 1,
    measure: int = 0,
    before: Mapping[str, int] | None = None,
    **save_pretrained_kwargs: Any,
) -> ExportReport:
    """Write a form that opens without ffnkit; the model is left untouched.

    "standard" opens with plain ``from_pretrained``. Where the class is ffnkit's (a classifier that transformers lacks),
    ffnkit has to be imported all the same. Factors kept apart are folded, shared FFNs written out, and widths that
    differ under one config key are padded with zero neurons to the widest, which changes no output.

    "nemotron-nas" keeps the width of each layer: models of LLaMA's shape as NVIDIA's ``DeciLMForCausalLM``, for engines
    that read ``block_configs`` (``checkpoint.nemotron``); FFNs that give nothing are left out. Plain transformers opens
    it with ``trust_remote_code=True``.

    Tensors keep their dtypes; the config says that of most. The result is opened as a user would and compared, weights
    and outputs, before it is put in place. Memory beyond the model: a second model while it is compared.

    Args:
        target: the form. multiple: widths are padded to multiples of it.
        measure: tokens of a sequence over which speeds are measured, of the exported model, of one of the widths
            ``before`` (by FFN name) and of one of equal widths and the same size; 0: not. Up to three more models are
            in memory then.

    Raises:
        FfnkitError: where it cannot be written, or does not reload equal.
    """
    if target not in TARGETS:
        raise FfnkitError(f"target {target!r}", "there is no such form", f"Take {' or '.join(TARGETS)}")
    if multiple < 1:
        raise FfnkitError(f"multiple {multiple}", "widths cannot be multiples of it", "Take 1 or more")
    if are_in_files():
        save_pretrained_kwargs = {"max_shard_size": SHARD, **save_pretrained_kwargs}
    check_untouched(model, f"exporting {type(model).__name__}")
    check_writes(model, f"exporting {type(model).__name__}")
    check_weights(model, type(model).__name__)
    found = ffns(model)
    keys = width_keys(model, found)
    _check_quantized(model, found, keys, target, multiple)
    form = (_nemotron if target == "nemotron-nas" else _standard)(model, found, keys, multiple)
    own = {id(t): t for t in [*model.parameters(), *_persistent_buffers(model)]}
    numbers = sum(p.numel() for p in model.parameters())
    _say_growth(model, found, form, numbers)
    with phase(f"exporting {as_named(directory)}"), staging(directory) as temporary:
        with torch.device("meta"):
            skeleton = form.kind(form.config)
        if (generation := standard_generation_config(model)) is not None:
            skeleton.generation_config = generation
        tied = skeleton.all_tied_weights_keys if hasattr(skeleton, "all_tied_weights_keys") else {}
        into_files(skeleton)
        with no_bars():
            skeleton.save_pretrained(temporary, state_dict=written_once(form.state, tied), **save_pretrained_kwargs)
        write_dtypes(model, temporary)
        if target == "nemotron-nas":
            nemotron.add_code(temporary)
        with phase("opening and comparing"), no_bars():
            fresh, checked = verify(model, temporary, form.state, form.kind)
        plain = standard_config(model, found, keys, form.targets)
        with phase("measuring speed"):
            speed = measured(model, fresh, plain, found, keys, form.targets, before or {}, measure) if measure else None
        del fresh
        write_companions(model, temporary, tokenizer)
        (temporary / "README.md").write_text(card or short_card(model, form=target), encoding="utf-8")
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    padded = [ffn for ffn in found if form.targets[ffn.name] > ffn.width]
    zeros = {ffn.name: (form.targets[ffn.name] - ffn.width) * _per_neuron(ffn) * len(ffn.owners) for ffn in padded}
    engines = nemotron.engines(form.config, tokenizer) if target == "nemotron-nas" else _engines(model)
    return ExportReport(
        str(directory),
        size,
        sum(t.numel() * t.element_size() for t in own.values()),
        tuple(zeros),
        padded_heads=tuple(attention.name for attention in attentions(model) if attention.kept),
        target=target,
        parameters=_numbers(form.state),
        compact_parameters=numbers,
        padding=sum(zeros.values()),
        padding_bytes=sum(zeros[ffn.name] * ffn.parameters()[0].element_size() for ffn in padded),
        engines=tuple(engines),
        speed=speed,
        **checked,
    )


def _check_quantized(model: PreTrainedModel, found: list[FFN], keys: Keys, target: Target, multiple: int) -> None:
    """Raises FfnkitError where the form asks for other weights than a quantized model holds."""
    if not any(is_quantized_linear(module) for module in model.modules()):
        return
    targets, _ = _targets(model, found, keys, target, multiple)
    odd = [ffn.name for ffn in found if ffn.special or ffn.tied or targets[ffn.name] != ffn.width]
    odd += [attention.name for attention in attentions(model) if attention.kept]
    if odd or target != "standard":
        asked = f"exporting {type(model).__name__}" + (f" for {target}" if target != "standard" else "")
        what = f"it would fold, pad or write out {odd[0]}" if odd else "that form's config says nothing of it"
        do = "Export the model from before it was quantized, and open that with quantization_config"
        raise FfnkitError(asked, f"the model is quantized, and {what}", do)


def _standard(model: PreTrainedModel, found: list[FFN], keys: Keys, multiple: int) -> _Form:
    targets, _ = _targets(model, found, keys, "standard", multiple)
    config = standard_config(model, found, keys, targets)
    return _Form(type(model), config, standard_state(model, found, targets), targets)


def _nemotron(model: PreTrainedModel, found: list[FFN], keys: Keys, multiple: int) -> _Form:
    nemotron.check_shape(model)
    targets, left_out = _targets(model, found, keys, "nemotron-nas", multiple)
    state = nemotron.nemotron_state(standard_state(model, found, targets), left_out)
    return _Form(DeciLMForCausalLM, nemotron.nemotron_config(model, found, targets, left_out), state, targets)


def _engines(model: PreTrainedModel) -> list[str]:
    """What opens the standard form, in words."""
    name = type(model).__name__
    if is_own(model):
        return [f"transformers with ffnkit imported, which {name} is of: reopened here"]
    others = "vLLM, SGLang, llama.cpp and others" if name.endswith(_SERVED) else "exporters and others"
    return ["transformers, plain from_pretrained: reopened here", f"whatever reads {name} ({others}), as any other"]


def _per_neuron(ffn: FFN) -> int:
    """Numbers of one neuron, of each expert where there are some."""
    tensors = ffn.raw().tensors()
    return sum(value.numel() // ffn.width for name, value in tensors.items() if name != "down_bias")


def _numbers(state: dict[str, Tensor]) -> int:
    """How many numbers lie in these tensors, what lies twice counted once."""
    return sum(value.numel() for value in {v.data_ptr(): v for v in state.values()}.values())


def _say_growth(model: PreTrainedModel, found: list[FFN], form: _Form, now: int) -> None:
    """Say, before anything is written, what of the model's savings the written form does not hold."""
    thin = sum(row["kind"] == LowRank.kind for ffn in found for row in ffn.special.values())
    masks = sum(isinstance(module, Masked) for module in model.modules())
    shared, padded = sum(len(f.tied) for f in found), sum(form.targets[f.name] > f.width for f in found)
    counts = {"thin pairs are multiplied out": thin, "shared FFNs are written out": shared, "FFNs are padded": padded}
    counts["masks become zeros that training would fill"] = masks
    told = [f"{count} {what}" for what, count in counts.items() if count]
    if is_own(model):
        logger.warning("exporting %s: a class of ffnkit, which has to be imported to open it", type(model).__name__)
    if told:
        growth = f" ({now:,} parameters become {then:,})" if (then := _numbers(form.state)) > now else ""
        logger.warning("exporting %s: %s%s", type(model).__name__, ", ".join(told), growth)


def _persistent_buffers(model: PreTrainedModel) -> list[Tensor]:
    names = set(model.state_dict())
    return [buffer for name, buffer in model.named_buffers() if name in names]
