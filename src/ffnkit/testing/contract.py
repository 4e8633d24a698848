"""What the checks share: a model to check on, what it is bit by bit, and how its outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.nn.reparametrized import ReparametrizedLinear

EXACT, RELOADED = 1e-12, 1e-5  # relative: folding in float64, and reading back in float32
_WRITTEN = ("architectures", "dtype", "transformers_version")  # by save_pretrained itself
Outputs = dict[str, Tensor]
Snapshot = dict[str, Any]


class ContractError(AssertionError):
    """A check that failed.

    Attributes:
        check: its name. found: what was found.
    """

    def __init__(self, check: str, found: str) -> None:
        self.check, self.found = check, found
        super().__init__(f"{check}: {found}")


@dataclass(frozen=True)
class Case:
    """A model to check on.

    Attributes:
        model: makes it, with the same weights every time; small, float32, its FFNs of weight for the outputs.
        inputs: keyword arguments for ``model(**inputs)``, in the model's dtype; deterministic.
        outputs: the output tensors to compare, from model and inputs; None takes every float tensor of the output.
        data: batches for methods that measure, from the model; None gives none.
        name: what failures say.
    """

    model: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    outputs: Callable[[Any, dict[str, Any]], Outputs] | None = None
    data: Callable[[Any], Iterable[Mapping[str, Any]]] | None = None
    name: str = ""

    def run(self, model: Any, *, grad: bool = False) -> Outputs:
        """The outputs of a model on the case's inputs."""
        with torch.set_grad_enabled(grad):
            if self.outputs is not None:
                return self.outputs(model, self.inputs(model))
            found = model(**self.inputs(model))
            return {k: v for k, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def batches(self, model: Any) -> Any:
        """Data for a method."""
        return None if self.data is None else list(self.data(model))


@contextmanager
def checking(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is a failure of this check."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(name, f"{type(error).__name__}: {error}") from error


def require(condition: bool, check: str, found: str) -> None:
    """Raises ContractError unless the condition holds."""
    if not condition:
        raise ContractError(check, found)


# --- bit by bit


def snapshot(model: Any) -> Snapshot:
    """Every tensor with its bits and whether it trains, what each module is, and what the config says."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": {n: (t, t.detach().clone(), t.requires_grad) for n, t in tensors},
        "modules": {n: (type(m), m.training, m.extra_repr()) for n, m in model.named_modules(remove_duplicate=False)},
        "config": {k: v for k, v in model.config.to_dict().items() if k not in _WRITTEN},
    }


def difference(first: Snapshot, second: Snapshot, *, identity: bool = True) -> str:
    """The first thing in which two differ, "" where they are equal.

    Args:
        identity: whether tensors have to be the same objects too.
    """
    if first["modules"] != second["modules"]:
        odd = [n for n in first["modules"] | second["modules"] if first["modules"].get(n) != second["modules"].get(n)]
        return f"module {odd[0] or 'of the model itself'}"
    if first["config"] != second["config"]:
        odd = [k for k in first["config"] | second["config"] if first["config"].get(k) != second["config"].get(k)]
        return f"{odd[0]} of the config"
    if list(first["tensors"]) != list(second["tensors"]):
        return f"tensors: {sorted(set(first['tensors']) ^ set(second['tensors']))[:1]}"
    for name, (tensor, bits, trains) in first["tensors"].items():
        other, now, still = second["tensors"][name]
        if identity and tensor is not other:
            return f"{name} is another object"
        if trains is not still:
            return f"whether {name} trains"
        if bits.dtype != now.dtype or not torch.equal(bits, now):
            return f"the numbers of {name}"
    return ""


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def special_layers(model: nn.Module) -> list[str]:
    """Names of what stands in the place of plain linears, experts that serve a factor included."""
    found = [
        n for n, m in model.named_modules() if isinstance(m, ReparametrizedLinear) or hasattr(type(m), "ffnkit_served")
    ]
    return found


# --- outputs


def distance(actual: Outputs, expected: Outputs) -> float:
    """The largest relative difference of two sets of outputs; infinity where they do not have the same ones."""
    if actual.keys() != expected.keys():
        return float("inf")
    return max((relative(actual[key], value) for key, value in expected.items()), default=0.0)


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    if actual.shape != expected.shape:
        return float("inf")
    gap = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)
    return float(gap) if torch.isfinite(gap) else float("inf")


def loss(outputs: Outputs) -> Tensor:
    """A number that every output has a part in."""
    return torch.stack([value.float().square().mean() for value in outputs.values() if value.requires_grad]).sum()


def eager(model: Any) -> Any:
    """In eval mode, experts by their own loop: the grouped product knows no float64, and other orders of sums."""
    if hasattr(model, "set_experts_implementation") and any(p.ndim == 3 for p in model.parameters()):
        model.set_experts_implementation("eager")
    return model.eval()
