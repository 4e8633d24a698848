"""Frozen linears in 4 bits or int8 while adapters train over them (QLoRA), and back to float with the adapters in."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.nn.quantized import dequantized as in_float_form
from ffnkit.nn.quantized import is_quantized_linear
from ffnkit.surgery.description import description, tell
from ffnkit.tune.sharding import SharedLinear

_FLAGS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


@torch.no_grad()
def quantize(model: nn.Module, kind: str, keep: Iterable[str]) -> list[str]:
    """Exchange the linears of a model for quantized ones, in place; their names come back, each layer once.

    A linear that stands in several places stays one object, and linears over one weight share its quantized form.
    Embeddings and what is tied to them, norms, experts in 3-D parameters and modules that the family keeps in float
    stay as they are.

    Args:
        kind: "nf4" (4 bits, blocks of 64 with a scale, the scales in 8 bits) or "int8" (a scale for each neuron).
        keep: modules that stay in float with all that lies in them.

    Raises:
        FfnkitError: bitsandbytes is not installed; the model is quantized already.

    Source: Dettmers et al., QLoRA (arXiv 2305.14314); LLM.int8() (arXiv 2208.07339).
    """
    _check(model, kind)
    # it says at each product that float32 is cast to float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    kept = [*keep, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    lookups = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    made: dict[int, nn.Module] = {}
    over: dict[int, Any] = {}
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        # other subclasses of Linear may have a forward of their own, or be read by their owner
        plain = isinstance(module, Conv1D) or type(module) in (nn.Linear, SharedLinear)
        if not plain or id(module.weight) in lookups or _is_kept(name, kept):
            continue
        if id(module) not in made:
            made[id(module)] = _quantized(module, kind, over)
            names.append(name)
        model.set_submodule(name, made[id(module)])
    return names


def is_quantized(model: nn.Module) -> bool:
    """Whether some linear holds its weight in another form than float: bitsandbytes' or torchao's."""
    return any(is_quantized_linear(module) for module in model.modules())


@torch.no_grad()
def in_float(model: nn.Module, names: Iterable[str]) -> None:
    """Bring quantized linears at and below these modules back to float, in place: they are to be trained."""
    kept = list(names)
    dtype = getattr(model, "dtype", torch.float32)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_quantized_linear(module) and any(name == k or name.startswith(f"{k}.") for k in kept):
            model.set_submodule(name, in_float_form(module, dtype))


@torch.no_grad()
def merged(tuned: nn.Module) -> nn.Module:
    """The model below a peft model in float, its adapters merged: each weight is what it stood for, plus B A."""
    from peft.tuners.lora import LoraLayer

    base: Any = tuned.get_base_model()  # type: ignore[operator]
    layers: list[Any] = [module for module in base.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        linear = layer.base_layer
        if not is_quantized_linear(linear):
            layer.merge()
            continue
        plain = in_float_form(linear, base.dtype)
        for name in layer.active_adapters:
            delta = layer.get_delta_weight(name)
            plain.weight += (delta.T if isinstance(plain, Conv1D) else delta).to(plain.weight)
        layer.base_layer = plain
    return unquantized(tuned.unload())  # type: ignore[operator]


@torch.no_grad()
def unquantized(model: nn.Module) -> nn.Module:
    """The model with its quantized linears in float, in place: each weight is what it stood for."""
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_quantized_linear(module):
            if id(module) not in made:
                made[id(module)] = in_float_form(module, cast(Any, model).dtype)
            model.set_submodule(name, made[id(module)])
    _forget(model)
    return model


def _check(model: nn.Module, kind: str) -> None:
    from importlib.util import find_spec

    asked = f"quantize {kind}"
    if is_quantized(model):
        raise FfnkitError(asked, "the model is quantized already", "Leave the setting out")
    if find_spec("bitsandbytes") is None:
        raise FfnkitError(asked, "bitsandbytes is not installed", "pip install 'ffnkit[quantized]'")


def _is_kept(name: str, kept: list[str]) -> bool:
    parts = name.split(".")
    return any(name == k or name.startswith(f"{k}.") or k in parts for k in kept)


def _quantized(linear: Any, kind: str, over: dict[int, Any]) -> nn.Module:
    """A quantized layer; ``over`` holds the first one over each weight, by the weight's id."""
    import bitsandbytes as bnb

    transposed = isinstance(linear, Conv1D)
    weight = (linear.weight.T if transposed else linear.weight).detach()
    (out, inner), device = weight.shape, weight.device
    with torch.device("meta"):
        layer: Any = (
            bnb.nn.Linear4bit(inner, out, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
            if kind == "nf4"
            else bnb.nn.Linear8bitLt(inner, out, bias=False, has_fp16_weights=False, threshold=6.0)
        )
    if kind == "nf4":
        layer.support_avx512bf16_for_cpu = False  # which repacks the weight in the first forward without gradients
    first = over.setdefault(id(linear.weight), layer)
    if first is layer:
        own = weight.clone().contiguous()
        fresh: Any = (
            bnb.nn.Params4bit(own, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
            if kind == "nf4"
            else bnb.nn.Int8Params(own, requires_grad=False, has_fp16_weights=False)
        )
        layer.weight = fresh.to(device)
        layer.quant_state = getattr(layer.weight, "quant_state", None)
    else:  # what stands beside the weight moves from the one to the other while it is used
        layer.weight = first.weight
        for name in ("quant_state", "state"):
            setattr(layer, name, getattr(first, name, None))
    layer.bias = linear.bias
    layer.source_cls = type(linear)  # as transformers notes it
    return cast(nn.Module, layer.train(linear.training))


def _forget(model: Any) -> None:
    """Take from a model that is float again what says otherwise, its config included."""
    for flag in _FLAGS:
        if flag in vars(model):
            delattr(model, flag)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False
    described = description(model)
    if described is not None:
        tell(model.config, {k: v for k, v in described.items() if k not in ("base", "base_done")})
    elif getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
