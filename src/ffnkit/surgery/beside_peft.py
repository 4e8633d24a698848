"""Importing this module makes peft refuse what its adapters would get wrong: ffnkit's own linears, and tied linears.

peft keeps no list of kinds of linears. It takes what is an ``nn.Linear`` and passes over the rest where all are asked
for; of a linear that stands in several places it adapts the first, and a weight that two share it merges into twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.nn.expert_weights import parametrized_weights
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import ReparametrizedLinear, is_reparametrized
from ffnkit.surgery.description import description

_TIES_SEEN_TO: ContextVar[bool] = ContextVar("ties_seen_to", default=False)
FOLD = "Fold first: ffnkit.fold(model), or ffnkit.load(folder, fold=True)"


@contextmanager
def ties_seen_to() -> Iterator[None]:
    """Within it who calls peft puts the adapters of a tied linear in all its places."""
    token = _TIES_SEEN_TO.set(True)
    try:
        yield
    finally:
        _TIES_SEEN_TO.reset(token)


def imported(tuners: ModuleType) -> None:
    """Called with peft's module of tuners once it is there."""
    inject = tuners.BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if description(cast(PreTrainedModel, model)) is None and not any(
            is_reparametrized(module) for module in model.modules()
        ):
            return inject(self, model, adapter_name, *args, **kwargs)
        given = copy.copy(self.peft_config[adapter_name])
        config = self._prepare_adapter_config(given, self.get_model_config(model))
        if every := str(getattr(config, "target_modules", None)).lower() == "all-linear":
            config.target_modules = ".*"
        asked = f"adapters of peft on {type(model).__name__}"
        names = [name for name, _ in model.named_modules() if name and self._check_target_module_exists(config, name)]
        check_linears(model, names, every, getattr(config, "target_parameters", None) or (), asked)
        if not _TIES_SEEN_TO.get():
            check_ties(model, names, asked)
        return inject(self, model, adapter_name, *args, **kwargs)

    tuners.BaseTuner.inject_adapter = inject_adapter


def check_linears(model: nn.Module, names: Iterable[str], every: bool, parameters: Iterable[str], asked: str) -> None:
    """Raises FfnkitError where an adapter is asked for on what is no plain linear or parameter.

    Args:
        names: of modules that get one. every: whether all linears were asked for: those that a thin pair is made of
            are among them. parameters: endings of names of parameters that get one.
    """
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, ReparametrizedLinear) and not (every and module.thin):
            do = FOLD
            if module.thin:
                do += f"; or name {' and '.join(f'{name}.{part}' for part in module.thin)}"
            if isinstance(module, Masked):
                do += "; merging then fills the zeros, which ffnkit tune --tuner lora keeps"
            raise FfnkitError(asked, f"{name} is no plain linear but one of ffnkit's ({module.kind})", do)
    for name, module in model.named_modules():
        for parameter, _ in parametrized_weights(module):
            if f"{name}.{parameter}".endswith(tuple(parameters)):
                raise FfnkitError(asked, f"{name}.{parameter} is served with a factor or a mask", FOLD)


def check_ties(model: nn.Module, names: Iterable[str], asked: str) -> None:
    """Raises FfnkitError where a linear of these names is one with another; FFNs that are shared as a whole may be."""
    wanted, places = set(names), dict[int, str]()
    for owner, module in model.named_modules():
        for child, inner in module.named_children():
            name = f"{owner}.{child}" if owner else child
            weight = inner._parameters.get("weight")
            if not isinstance(inner, (nn.Linear, Conv1D)) or weight is None:
                continue
            first = places.setdefault(id(weight), name)
            if first != name and wanted & {first, name}:
                found = f"{first} and {name} are one linear: peft would adapt the first alone, or merge into it twice"
                do = "Use ffnkit tune --tuner lora, or the standard form (ffnkit export), where each has its own"
                raise FfnkitError(asked, found, do)
