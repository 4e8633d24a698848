"""What stands behind a linear: how its weight lies, where it is stored, what it is, and whether it may be edited.

A linear is an ``nn.Linear`` (subclasses of families too), a ``Conv1D``, a reparametrized linear of ``ffnkit.nn`` or a
quantized one. Others may have made more of it: torch's parametrizations and hooks, adapters of peft, wrappers of
torch.compile and of FSDP. Finding sees all of them (:func:`is_linear`), so that none is passed over in silence;
:func:`obstacle` says of which a weight cannot be edited, and :func:`check_untouched` refuses models that hold one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.bottleneck import Bottleneck
from ffnkit.nn.masked import Masked
from ffnkit.nn.quantized import float_weight, is_quantized_linear, quantized_features
from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented

PLAIN = (nn.Linear, Conv1D)
Linear = nn.Linear | Conv1D | ReparametrizedLinear

# Where a wrapper keeps the module that it stands for: torch.compile, peft, FSDP.
_INSIDE = ("_orig_mod", "base_layer", "_fsdp_wrapped_module")
# Wrappers of whole models in several processes, told by name: importing them is slow.
_PARALLEL = ("FullyShardedDataParallel", "DistributedDataParallel", "DataParallel")
# Under these names reparametrizations by hooks keep what they compute the weight of.
_STORED = ("weight", "weight_orig", "weight_v")


# --- what is a linear


def unwrapped(module: Any) -> Any:
    """The module inside of wrappers, or the module itself."""
    while isinstance(module, nn.Module):
        inner = next((module._modules[name] for name in _INSIDE if name in module._modules), None)
        if inner is None:
            break
        module = inner
    return module


def is_linear(module: object) -> bool:
    """Whether a module is a linear of any kind, or wraps one."""
    return isinstance(unwrapped(module), (*PLAIN, ReparametrizedLinear))


def is_maskable(module: nn.Module) -> bool:
    """Whether a mask can be put on the module."""
    return isinstance(module, (*PLAIN, Masked, AdapterLayer))


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model and all below it, in the order of ``named_modules``; one that stands in several places
    is named in each. Many times as fast as torch's own, which goes through one generator a level."""
    todo = [("", model)]
    while todo:
        name, module = todo.pop()
        yield name, module
        if module._modules:
            start = f"{name}." if name else ""
            todo += [(start + key, child) for key, child in reversed(module._modules.items()) if child is not None]


def linears(model: nn.Module, *, repeats: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(name, linear) of every linear in the order of the modules; what a wrapped one is made of is left out.

    Args:
        repeats: whether a linear that stands in several places is named in each.
    """
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=not repeats):
        if inside is not None and name.startswith(inside):
            continue
        if is_linear(module):
            inside = f"{name}." if name else ""
            yield name, module


def descend(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below another, None where there is none."""
    current: nn.Module | None = module
    for part in path.split("."):
        current = current._modules.get(part) if current is not None else None
    return current


# --- how it lies


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight lies as (in, out)."""
    bare = unwrapped(linear)
    return isinstance(bare, Conv1D) or (isinstance(bare, ReparametrizedLinear) and bare.transposed)


def features(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear of any kind."""
    bare = unwrapped(linear)
    return bare.features if isinstance(bare, ReparametrizedLinear) else quantized_features(bare)


def output_width(linear: nn.Module) -> int:
    """Columns of what a linear gives."""
    return features(linear)[0]


def flops(linear: nn.Module) -> float:
    """Multiplications and additions of the weight for one token."""
    bare = unwrapped(linear)
    if isinstance(bare, ReparametrizedLinear):
        return sum(flops(bare.get_submodule(name)) for name in bare.thin) if bare.thin else bare.flops
    out, inner = features(bare)
    return 2.0 * (out * inner)


# --- its numbers


def stored_weight(linear: Any) -> nn.Parameter:
    """The parameter that a linear keeps its weight in, below an update and as it is stored.

    Of a product of several parameters (a thin pair, a direction and a norm) it is one of them: by it layers that share
    their weights are told.
    """
    bare = unwrapped(linear)
    if isinstance(bare, ReparametrizedLinear):
        return bare.stored
    own = next((bare._parameters[name] for name in _STORED if bare._parameters.get(name) is not None), None)
    found: nn.Parameter = own if own is not None else next(bare.parametrizations["weight"].parameters())
    return found


def parameters(linear: nn.Module) -> list[nn.Parameter]:
    """Every parameter of a linear, those of its parametrizations included, adapters left out."""
    bare = unwrapped(linear)
    if isinstance(bare, ReparametrizedLinear):
        return list(bare.parameters())
    computed = bare._modules.get("parametrizations")
    return [*bare.parameters(recurse=False), *(computed.parameters() if computed is not None else ())]


def own_weight(linear: Any) -> Tensor:
    """A linear's weight (out, in), without an update that trains beside it."""
    bare = unwrapped(linear)
    weight: Tensor = (bare.base if isinstance(bare, AdapterLayer) else bare.weight).detach()
    return oriented(weight, is_transposed(bare))


def bare_weight(linear: Any) -> Tensor:
    """A linear's weight (out, in), a factor or a mask that stands apart left out: a view where there is one."""
    bare = unwrapped(linear)
    weight: Tensor = bare.weight
    return oriented(weight, is_transposed(bare))


def true_weight(linear: Any) -> Tensor:
    """(out, in), float: what a linear multiplies its inputs by, with all that stands apart in it.

    A view of the parameter where it is plain; computed anew elsewhere.
    """
    outer = next((m for m in _wrappers(linear) if "base_layer" in m._modules), None)
    if outer is not None:
        return _merged(outer)
    bare = unwrapped(linear)
    if isinstance(bare, ReparametrizedLinear) and not isinstance(bare, AdapterLayer):
        return oriented(bare.folded(), bare.transposed)
    if not isinstance(bare, ReparametrizedLinear) and is_quantized_linear(bare):
        return float_weight(bare)
    hook = next((hook for hook in _hooks(bare) if _computed(hook) == "weight"), None)
    if hook is None:
        return bare_weight(bare)
    with torch.no_grad():  # the attribute is of the last forward
        computed: Any
        if isinstance(hook, prune.BasePruningMethod):
            computed = hook.apply_mask(bare)
        elif isinstance(hook, SpectralNorm):
            computed = hook.compute_weight(bare, do_power_iteration=False)
        else:
            computed = hook.compute_weight(bare)
    return oriented(computed, is_transposed(bare))


def _wrappers(linear: Any) -> Iterator[nn.Module]:
    """A module and those inside of it, down to the bare one."""
    while isinstance(linear, nn.Module):
        yield linear
        linear = next((linear._modules[name] for name in _INSIDE if name in linear._modules), None)


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """What a layer of peft stands for, by merging a copy."""
    if not layer.disable_adapters and not layer.merged:
        layer = copy.deepcopy(layer)
        layer.merge()
    return true_weight(layer.base_layer)


# --- what may be edited


def _hooks(module: nn.Module) -> list[Any]:
    """torch's hooks that compute a tensor of the module before each forward."""
    kinds = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def _computed(hook: Any) -> str:
    """The name of the tensor that a hook computes."""
    return str(hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name)


def added_to(model: Any, *, inside: bool = True) -> str:
    """What a tuner left on a model that no weight can hold: "bottleneck adapter", "prefix" (of peft), or "".

    Args:
        inside: whether modules below it count.
    """
    peft = hasattr(type(model), "active_peft_config")
    if peft and getattr(model.active_peft_config, "is_prompt_learning", False):
        return "prefix"
    every = model.modules() if inside else (model,)
    return "bottleneck adapter" if any(isinstance(module, Bottleneck) for module in every) else ""


def foreign(module: nn.Module) -> tuple[str, str] | None:
    """What others made of a module, and the way back: ("is compiled (torch.compile)", "Give ..."); None elsewhere.

    Convolutions that are reparametrized do not count: families build them so (wav2vec2).
    """
    kind = type(module)
    if "_orig_mod" in module._modules:
        return "is compiled (torch.compile)", "Give the module inside (model._orig_mod) and compile after"
    if added := added_to(module, inside=False):
        return f"carries a {added} that no weight can hold", "Edit before it comes, or take it off (tune.remove_added)"
    marked = vars(module).get("_hf_peft_config_loaded", False)  # transformers would save the adapter alone
    if "base_layer" in module._modules or kind.__module__.partition(".")[0] == "peft" or marked:
        return "carries an adapter of peft", "Merge the adapter first (merge_and_unload)"
    if kind.__name__ in _PARALLEL:
        return f"is wrapped by {kind.__name__}", "Give the module inside (model.module) and wrap after"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "is sharded by FSDP", "Edit and save the whole model, and shard after"
    hook = next(iter(_hooks(module)), None)
    if isinstance(hook, prune.BasePruningMethod):
        return "is under torch.nn.utils.prune", "Make the zeros permanent first (torch.nn.utils.prune.remove)"
    if isinstance(module, Convolution):
        return None
    if hook is not None:
        name = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
        return f"is under torch.nn.utils.{name}", f"Remove it first (torch.nn.utils.remove_{name})"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        do = "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
        return f"is parametrized ({names})", do
    return None


def obstacle(linear: Any) -> tuple[str, str] | None:
    """Why a linear's weight cannot be edited, and what to do; None where it can.

    Special linears and quantized ones can, by the edits that know them.
    """
    found = foreign(linear)
    if found is None and isinstance(linear, PLAIN) and not is_quantized_linear(linear):
        more = [name for name, p in linear._parameters.items() if p is not None and name not in ("weight", "bias")]
        if more:
            return f"holds {', '.join(more)} beside weight and bias", "Merge that into the weight first"
    return found


def check_editable(linear: nn.Module, name: str, asked: str) -> None:
    """Raises FfnkitError where a linear's weight cannot be edited (:func:`obstacle`)."""
    found = obstacle(linear)
    if found is not None:
        raise FfnkitError(asked, f"{name} {found[0]}", found[1])


def check_model(model: object) -> None:
    """Raises FfnkitError where something else, the name of one most likely, stands in the place of a model."""
    if not isinstance(model, nn.Module):
        asked = f"a model: {model!r:.80}" if isinstance(model, str | os.PathLike) else "a model"
        raise FfnkitError(asked, f"it is of type {type(model).__name__}", "Open it first: ffnkit.load(folder)")


def check_untouched(model: nn.Module, asked: str) -> None:
    """Raises FfnkitError where a module of the model is more than its family made it (:func:`foreign`).

    Plans for such models, edits of them and files of them would be wrong: names and tensors are not those of the
    family.
    """
    check_model(model)
    for name, module in model.named_modules():
        found = foreign(module)
        if found is not None:
            raise FfnkitError(asked, f"{name or 'the model'} {found[0]}", found[1])


def check_float(weight: Any, name: str) -> None:
    """Raises FfnkitError where the weights cannot be masked: quantized, or several numbers to a byte."""
    if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
        do = "Prune the model in float, save it, and load that with quantization_config"
        raise FfnkitError(f"pruning {name}", f"its weight is quantized ({type(weight).__name__} {weight.dtype})", do)
