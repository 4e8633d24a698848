"""Whether a method finds what its scores are of: updates, or coefficients of heads and neurons, which tuning leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.model.targets import targets
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.coefficients import carries_update

if TYPE_CHECKING:
    from torch import nn


def check_learnt(settings: Mapping[str, Any], method: Any, model: nn.Module, tuner: Any = None) -> None:
    """Refuse a method whose scores are of what is not there when it plans.

    Args:
        settings: of the method, as the recipe gives them; what it does not say asks for nothing.
        method: built of them. model: as it is before tuning, weights or not.
        tuner: what tunes the model before; None where nothing does.

    Raises:
        FfnkitError: neither the tuner nor the model has an update, or coefficients, at the place that is scored.
    """
    for part, own in zip(getattr(method, "methods", ()), settings.get("methods", ()), strict=False):
        check_learnt(own if isinstance(own, Mapping) else {}, part, model, tuner)
    needs = [need for need in getattr(method, "learnt", lambda _: ())(model) if need.setting in settings]
    updated = _updated(tuner, model) if needs else set()
    for need in needs:
        if need.kind == "update":
            met = any(id(linear) in updated or carries_update(linear) for linear in need.linears)
            do = "Tune with dsee or sparsegrad on these linears (targets) first, or take another score"
        else:
            own_layers = (each for each in need.linears if isinstance(each, AdapterLayer))
            left = bool(getattr(tuner, "coefficients", 0)) and bool(need.linears)
            met = left or any(each.coefficients is not None for each in own_layers)
            do = "Tune with updates and coefficients: 0.1 or so first, or take another score"
        if not met:
            who = f"tuner {tuner.name} leaves" if tuner is not None else "the model has"
            asked = f"{need.setting} {settings[need.setting]}"
            raise FfnkitError(asked, f"{who} no {need.kind} on {need.where}", do)


def _updated(tuner: Any, model: nn.Module) -> set[int]:
    """The ids of the linears that the tuner puts updates beside, and leaves apart from their weights."""
    if tuner is None or tuner.method is None:
        return set()
    methods = getattr(tuner.method, "methods", (tuner.method,))
    names = [name for each in methods for name in targets(model, each.targets, getattr(each, "layers", "all"))[0]]
    return {id(model.get_submodule(name)) for name in names}
