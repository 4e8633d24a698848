"""The parts of a model that may train beside something else: task head, biases, norms, attention, embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attention_linears
from ffnkit.model.linear import PLAIN, unwrapped
from ffnkit.settings.updates import PARTS

_FLAGS = "_ffnkit_requires_grad"  # on a model: what trained before, by parameter; forgets those that are gone
_BEFORE = "_ffnkit_before"  # on a model with updates: the parts that train beside them, and their values from before


def parts_of(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of the named parts, each once.

    Args:
        names: "head" (:func:`head_parameters`), "biases" (of linears, norms and experts, wherever they are), "norms"
            (weights and biases of layer and RMS norms), "attention" (its linears), "embeddings", or "rest": every
            parameter.

    Raises:
        FfnkitError: an unknown part.
    """
    found: dict[int, nn.Parameter] = {}
    for name in names:
        if name not in PARTS:
            raise FfnkitError(f"training {name!r}", "there is no such part", f"Choose one of {', '.join(PARTS)}")
        for parameter in _part(model, name):
            found[id(parameter)] = parameter
    return list(found.values())


def _part(model: nn.Module, name: str) -> Iterable[nn.Parameter]:
    if name == "head":
        return head_parameters(model)
    if name == "rest":
        return model.parameters()
    if name == "biases":
        every = dict(model.named_parameters())
        return [p for path, p in every.items() if path.endswith("bias") and (p.ndim == 1 or _of_experts(every, path))]
    if name == "norms":
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
        return [p for m in norms for p in m.parameters(recurse=False)]
    if name == "embeddings":
        return [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
    linears = [unwrapped(model.get_submodule(path)) for path in attention_linears(model)]
    return [p for linear in linears if isinstance(linear, PLAIN) for p in linear.parameters(recurse=False)]


def _of_experts(every: dict[str, nn.Parameter], path: str) -> bool:
    """Whether a parameter holds a bias for each expert: (E, out) beside weights (E, ., .)."""
    weight = every.get(path.removesuffix("_bias"))
    return every[path].ndim == 2 and weight is not None and weight.ndim == 3


def remember(model: nn.Module) -> None:
    """Note what trains now, for :func:`train_as_before`; what is noted already stays."""
    flags, now = _flags(model), _Flags()
    for parameter in model.parameters():
        now[parameter] = flags.get(parameter, parameter.requires_grad)
    object.__setattr__(model, _FLAGS, now)


def train_only(model: nn.Module, chosen: Callable[[nn.Parameter], bool]) -> None:
    """Let the chosen parameters train, of those that do already, until :func:`train_as_before`."""
    remember(model)
    flags = _flags(model)
    for parameter in model.parameters():
        parameter.requires_grad_(flags[parameter] and chosen(parameter))


def train_as_before(model: nn.Module) -> nn.Module:
    """Every parameter's flag as it was before :func:`train_only`."""
    flags = _flags(model)
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(parameter, parameter.requires_grad))
    if hasattr(model, _FLAGS):
        object.__delattr__(model, _FLAGS)
    return model


def lend_flags(model: nn.Module) -> None:
    """Let the model note flags in a copy: whoever puts its attributes back has those from before."""
    if is_limited(model):
        object.__setattr__(model, _FLAGS, copy.copy(_flags(model)))


def hand_on(model: nn.Module, old: nn.Parameter, new: Tensor) -> None:
    """Let a parameter that takes another's place train again when that one would."""
    flags = _flags(model)
    if old in flags:
        flags[new] = flags[old]


def flags_by_name(model: nn.Module) -> dict[str, bool]:
    """What trained before :func:`train_only`, by parameter name; empty where it does not hold."""
    flags = _flags(model)
    return {name: flags[p] for name, p in model.named_parameters() if p in flags}


def renew(model: nn.Module, named: dict[str, bool]) -> None:
    """Let parameters that took others' places train again when those would.

    Args:
        named: :func:`flags_by_name` from before they did. One of a new name goes by others of its module.
    """
    if not is_limited(model):
        return
    flags = _flags(model)
    modules = {name.rpartition(".")[0]: flag for name, flag in named.items()}
    for name, parameter in model.named_parameters():
        if parameter not in flags:
            module = modules.get(name.rpartition(".")[0], parameter.requires_grad)
            flags[parameter] = named.get(name, module)


class _Flags(WeakTensorKeyDictionary):
    """Flags of parameters; a copy of a model has those of its own parameters, one from a file has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Flags:
        copied = _Flags()
        for parameter, flag in self.items():
            copied[copy.deepcopy(parameter, memo)] = flag
        return copied

    def __reduce__(self) -> Any:
        return _Flags, ()


def _flags(model: nn.Module) -> _Flags:
    return getattr(model, _FLAGS, None) or _Flags()


def is_limited(model: nn.Module) -> bool:
    """Whether :func:`train_only` holds."""
    return hasattr(model, _FLAGS)


def note(model: nn.Module, parts: list[str], before: dict[str, Tensor] | None) -> None:
    """Note the parts that train beside updates and their values from before, by name; None: they are not known."""
    model.__dict__[_BEFORE] = (parts, before)


def noted(model: nn.Module) -> tuple[list[str], dict[str, Tensor] | None]:
    """What :func:`note` noted; nothing at all is ([], {})."""
    found: tuple[list[str], dict[str, Tensor] | None] = model.__dict__.get(_BEFORE, ([], {}))
    return found


def forget(model: nn.Module) -> None:
    """Forget what :func:`note` noted."""
    model.__dict__.pop(_BEFORE, None)


def keep_noted(model: nn.Module, name: str, index: Tensor, axis: int) -> None:
    """The value that is noted of a parameter, if one is, keeps these places of an axis only, as the parameter does."""
    before = noted(model)[1]
    if before and name in before:
        before[name] = before[name].index_select(axis, index.long().to(before[name].device))


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the head by name: children beside ``model.base_model``, and modules called ``pooler``.

    Classifiers, scores, language-model heads and pooling layers count. A head that shares its weights with the
    embeddings does not, nor do norms at the end of a body. A model that is its own body (no task head around it) has
    its poolers and its output embeddings.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        own = [p for p in module.parameters() if id(p) not in embeddings]
        if own and (_beside_body(model, name, module) or name.rpartition(".")[2] == "pooler"):
            found[name] = module
    return found


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of :func:`head_modules`, and those that hang on the model itself; each once."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found = {id(p): p for module in head_modules(model).values() for p in module.parameters()}
    if body(model) is not model:
        found |= {id(p): p for p in model.parameters(recurse=False)}
    return [p for key, p in found.items() if key not in embeddings]


def body(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where it has none around it."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _beside_body(model: nn.Module, name: str, module: nn.Module) -> bool:
    base = body(model)
    if base is model:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return module is output
    return bool(name) and "." not in name and module is not base and not _holds(module, base)


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(inner is part for inner in module.modules())
