"""LoRA through peft: which modules get adapters, and a plain model again afterwards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.io.processes import is_first
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.targets import GROUPS, targets
from ffnkit.model.trainable import head_modules, parts_of
from ffnkit.surgery.beside_peft import ties_seen_to
from ffnkit.surgery.untie import UntiedFfn, own_weights, plain_layer, retie, settle, untie
from ffnkit.tune import masks, quantizing, sparing, zeros
from ffnkit.tune.ties import check_untied, own_modules, share_modules

if TYPE_CHECKING:
    from ffnkit.tune.kinds import Lora
    from ffnkit.tune.lifecycle import Preparation

_TASK_TYPES = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("MTModel", "SEQ_2_SEQ_LM"),
)
PREFIX = "base_model.model."  # of names in adapter files
_TIES = "_ffnkit_ties"  # on a peft model: names under which one target stands in several places
_FROZEN = "_ffnkit_frozen"  # on a peft model: parameters that did not train before it came
_PARTED = "_ffnkit_parted"  # on a peft model: shared FFNs whose layers have adapters of their own


def put_on(model: nn.Module, tuner: Lora, preparation: Preparation) -> nn.Module:
    """A peft model around ``model``, its factors and masks set aside first (``masks``); thin pairs stay.

    Raises:
        FfnkitError: targets that match nothing, or that have no linear to adapt; adapters for each layer asked of a
            model without shared FFNs.
    """
    from peft import LoraConfig

    from ffnkit.io.folders import check_target

    if tuner.adapter_dir is not None:
        check_target(tuner.adapter_dir, "lora")
    before = ffns(model) if has_ffns(model) else []
    apart = any(ffn.tied and ffn.differing for ffn in before)  # folded, each gets weights of its own
    masked = masks.set_aside(model, preparation)
    share_modules(model)
    found = list(tuner.routers_of(model))
    heads = own_modules(model, head_modules(model)) if tuner.head else []
    still = has_ffns(model) and any(ffn.tied for ffn in ffns(model))
    parted = untie(cast(PreTrainedModel, model)) if tuner.tied == "each" and (still or not apart) else []
    noted = zeros.note(model) if tuner.keep_zeros or masked else {}
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    modules, parameters = targets(model, tuner.targets)
    separate = [f"{owner}.{site}" for each in parted for owner in each.owners for site in each.sites]
    check_untied(model, modules, f"lora on {type(model).__name__}", separate)
    if tuner.routers == "trained":
        heads += found
    elif tuner.targets in GROUPS:
        modules = _without(modules, found)
    if tuner.quantize != "none":
        quantizing.quantize(model, tuner.quantize, keep=[*heads, *head_modules(model), *found])
    preparation.from_here()  # to undo the rest from the start would take the weights in both forms
    preparation.afterwards(partial(settled, parted=parted, flags=flags if tuner.quantize != "none" else None))
    quantizing.in_float(model, heads)
    modules = _without(modules, heads)
    ties = tied_places(model, modules)
    kinds = {type(model.get_submodule(name)) for name in modules}
    config = LoraConfig(
        task_type=_task_type(model),
        r=tuner.rank,
        lora_alpha=tuner.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0 if parameters else tuner.dropout,  # adapters of bare tensors know no dropout
        bias=tuner.bias,
        # every place of a shared target is named, so that the adapter fits a model that holds each place apart too
        target_modules=_exactly([*modules, *(name for names in ties for name in names[1:])]) if modules else [],
        target_parameters=parameters or None,
        modules_to_save=heads or None,
        fan_in_fan_out=kinds == {Conv1D},
    )
    tuned = adapted(model, lambda base: _with_adapters(base, config), ties, parted)
    if further := [part for part in tuner.modules_to_train if part != "head"]:  # that is a module of its own to peft
        _let_train(tuned, tuner, further)
    sparing.spare(tuned, noted if tuner.keep_zeros else sparing.of(noted, masked))
    if tuner.keep_zeros:
        zeros.hold(tuned, noted)
    return tuned


def _let_train(tuned: Any, tuner: Lora, further: Sequence[str]) -> None:
    """Further parts of the model train as a whole; weights below adapters do not."""
    if tuner.adapter_dir is not None:
        what = f"{', '.join(further)} would train too, and peft's form does not hold them"
        raise FfnkitError("lora with adapter_dir", what, "Leave one of the two out")
    below = {id(p) for name, p in tuned.named_parameters() if name.endswith("base_layer.weight")}
    for parameter in parts_of(tuned.get_base_model(), further):
        if id(parameter) not in below and parameter.is_floating_point():
            parameter.requires_grad_(True)


def adapted(
    model: nn.Module, wrap: Callable[[Any], Any], ties: list[list[str]], parted: Iterable[UntiedFfn] = ()
) -> nn.Module:
    """The peft model that ``wrap`` makes, its adapters in every place of a shared target.

    Args:
        ties: from :func:`tied_places`. parted: from ``parting.part``, where layers have adapters of their own.
    """
    named = model.named_parameters(remove_duplicate=False)
    frozen = [name for name, p in named if not p.requires_grad and p.is_floating_point()]
    with warnings.catch_warnings(), ties_seen_to():
        warnings.simplefilter("ignore")
        tuned = wrap(model)
    _share(tuned.get_base_model(), ties)
    object.__setattr__(tuned, _FROZEN, frozen)
    object.__setattr__(tuned, _TIES, ties)
    object.__setattr__(tuned, _PARTED, list(parted))
    return cast(nn.Module, tuned)


def _with_adapters(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config)


def settled(model: nn.Module, parted: Iterable[UntiedFfn], flags: dict[str, bool] | None) -> None:
    """Shared FFNs shared again and, with the flags that parameters had, what was quantized in float."""
    for each in parted:
        retie(cast(PreTrainedModel, model), each)
    if flags is not None and quantizing.is_quantized(model):
        quantizing.unquantized(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def take_off(model: nn.Module, tuner: Lora) -> nn.Module:
    """The plain model with the adapters merged; saves the adapter first where the tuner names a folder.

    Layers that had adapters of their own over a shared FFN differ from then on: each holds its weights, and the config
    says so. A quantized base comes back in float, as what its numbers stand for: merged into few bits, an adapter
    would be rounded away in part.

    Where this fails, weights are as before up to the rounding of their dtype: peft adds adapters to them in place.
    """
    if tuner.adapter_dir is not None and is_first():
        save_adapter(model, tuner.adapter_dir)
    ties: list[list[str]] = getattr(model, _TIES, [])
    parted: list[UntiedFfn] = getattr(model, _PARTED, [])
    base = model.get_base_model()  # type: ignore[operator]
    noted = zeros.held(model)
    differ = [each for each in parted if _is_adapted(base, each)]
    for each in parted:
        if each in differ:
            own_weights(base, each)
        else:
            retie(base, each)
    if quantizing.is_quantized(base):
        plain: Any = quantizing.merged(model)
    else:  # into copies: peft's other way adds in place, which no reference could undo
        plain = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    _share(plain, ties)
    if parted:
        settle(plain, parted, untied=differ)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    zeros.restore(plain, noted)
    frozen = getattr(model, _FROZEN, [])
    plain.requires_grad_(True)
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)
    return masks.put_back(plain)


def _is_adapted(base: nn.Module, parted: UntiedFfn) -> bool:
    """Whether a linear of the FFN has an adapter in some layer."""
    linears = (base.get_submodule(f"{name}.{site}") for name in parted.owners for site in parted.sites)
    return any(plain_layer(linear) is not linear for linear in linears)


def save_adapter(model: nn.Module, folder: object) -> None:
    """Save the adapter of a peft model in peft's form, whole or not at all.

    An adapter that several layers share is written out for each of them: it then fits the model whose layers are
    written out too, by peft alone.
    """
    from safetensors.torch import load_file, save_file

    from ffnkit.io.folders import staging

    ties: list[list[str]] = getattr(model, _TIES, [])
    with staging(str(folder), "lora") as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        path = temporary / "adapter_model.safetensors"
        if ties and path.is_file():
            state = load_file(path)
            for first, *others in ties:
                own = [key for key in state if key.startswith(f"{PREFIX}{first}.")]
                for name, key in ((name, key) for name in others for key in own):
                    state[f"{PREFIX}{name}{key.removeprefix(PREFIX + first)}"] = state[key].clone()
            save_file(state, path, metadata={"format": "pt"})


def _without(modules: list[str], outer: list[str]) -> list[str]:
    """The names that do not lie in one of the outer modules."""
    return [name for name in modules if not any(name == o or name.startswith(f"{o}.") for o in outer)]


def _exactly(names: Iterable[str]) -> str:
    """A regular expression for these names and no others: peft's lists match by ending."""
    return "|".join(re.escape(name) for name in names)


def _task_type(model: nn.Module) -> str | None:
    return next((kind for ending, kind in _TASK_TYPES if type(model).__name__.endswith(ending)), None)


def tied_places(model: nn.Module, modules: list[str]) -> list[list[str]]:
    """Groups of names of one and the same target: peft adapts it under the first name only."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    owners = {id(model.get_submodule(name)) for name in modules}
    return [names for key, names in places.items() if key in owners and len(names) > 1]


def _share(model: nn.Module, ties: list[list[str]]) -> None:
    for first, *others in ties:
        module = model.get_submodule(first)
        for name in others:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
