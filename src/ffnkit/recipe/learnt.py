"""Whether an arm's tuning leaves what its pruning reads: updates, or coefficients of heads and neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.model.targets import targets
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.coefficients import carries_update

if TYPE_CHECKING:
    from torch import nn

    from ffnkit.recipe.parts import Pruning


def check_learnt(tuner: Any, spec: Pruning, method: Any, model: nn.Module) -> None:
    """Refuse pruning by what the tuner does not leave where it would be read.

    Args:
        tuner: of the arm. spec: what the recipe says of the pruning; what it does not say asks for nothing.
        method: the method of ``spec``. model: as it is before tuning, weights or not.

    Raises:
        FfnkitError: neither the tuner nor the model has an update, or coefficients, at the place that is scored.
    """
    needs = [need for need in getattr(method, "learnt", lambda _: ())(model) if need.setting in spec.settings]
    updated = _updated(tuner, model) if needs else set()
    for need in needs:
        if need.kind == "update":
            met = any(id(linear) in updated or carries_update(linear) for linear in need.linears)
            do = "Tune with dsee or sparsegrad on these linears (targets), or take another score"
        else:
            own = (each for each in need.linears if isinstance(each, AdapterLayer))
            left = bool(getattr(tuner, "coefficients", 0)) and bool(need.linears)
            met = left or any(each.coefficients is not None for each in own)
            do = "Give a tuner of updates coefficients: 0.1 or so, or take another score"
        if not met:
            what = f"tuner {tuner.name} leaves no {need.kind} on {need.where}"
            raise FfnkitError(f"{need.setting} {spec.settings[need.setting]}", what, do)


def _updated(tuner: Any, model: nn.Module) -> set[int]:
    """The ids of the linears that the tuner puts updates beside, and leaves apart from their weights."""
    if tuner.method is None:
        return set()
    methods = getattr(tuner.method, "methods", (tuner.method,))
    names = [name for each in methods for name in targets(model, each.targets, getattr(each, "layers", "all"))[0]]
    return {id(model.get_submodule(name)) for name in names}
