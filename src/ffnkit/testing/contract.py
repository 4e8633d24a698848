"""What the checks share: a model to check on, what it is bit by bit, and how its outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.model.finding import ffns
from ffnkit.nn.reparametrized import is_reparametrized

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
        other: makes a model of the class with other widths, which no plan for the case's own model fits.
    """

    model: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    outputs: Callable[[Any, dict[str, Any]], Outputs] | None = None
    data: Callable[[Any], Iterable[Mapping[str, Any]]] | None = None
    name: str = ""
    other: Callable[[], Any] | None = None

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
    """Every tensor with its bits and whether it trains, what each module is and what hangs on it, and the config."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": {n: (t, t.detach().clone(), t.requires_grad) for n, t in tensors},
        "modules": {n: (type(m), m.training, m.extra_repr(), _hooks(m)) for n, m in _modules(model)},
        "config": {k: v for k, v in model.config.to_dict().items() if k not in _WRITTEN},
    }


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _hooks(module: nn.Module) -> int:
    """Hooks of a module, and a ``forward`` of its own."""
    return sum(len(held) for name, held in vars(module).items() if name.endswith("_hooks")) + (
        "forward" in vars(module)
    )


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
        if not same_bits(bits, now):
            return f"the numbers of {name}"
    return ""


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN and signs of zeros too, in one dtype and shape."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, two = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (first, second))
    return torch.equal(one, two)


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def special_layers(model: nn.Module) -> list[str]:
    """Names of what stands in the place of plain linears, experts that serve a factor included."""
    return [name for name, module in model.named_modules() if is_reparametrized(module)]


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


def reached(model: nn.Module, outputs: Outputs) -> set[str]:
    """Names of the parameters to which a loss on all outputs sends more than rounding; gradients are cleared.

    The model is in float64: attention to a single token, say, has no gradient but rounding.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for value in outputs.values():
        total = total + (value * torch.randn(value.shape, generator=generator).to(value)).sum()
    total.backward()
    largest = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    limit = 1e-12 * max(largest.values(), default=0.0)
    return {name for name, value in largest.items() if value > limit}


def routed(model: Any) -> set[str]:
    """Names of parameters of FFNs that not all tokens pass: which of them are reached is the router's choice."""
    own = {id(p) for ffn in ffns(model) if ffn.active < 1 for p in ffn.module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


def missed(model: nn.Module, original: nn.Module, got: set[str], expected: set[str]) -> list[str]:
    """Names of parameters that train and that no gradient reaches, though it reaches their own in the original, or for
    new ones something of their module; routed FFNs are left out.

    Args:
        got, expected: what gradients reach in the model and in the original.
    """
    known = {name for name, _ in original.named_parameters()}
    chance = routed(original) | routed(model)
    asleep = {each.rpartition(".")[0] for each in known} - {each.rpartition(".")[0] for each in expected}
    idle = {each.rpartition(".")[0] for each in (known - expected) if each.endswith("weight")} | asleep
    idle |= {each.rpartition(".")[0] for each in chance}
    found = []
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if not parameter.requires_grad or name in got or plain in chance or plain in known - expected:
            continue
        if plain in known or not any(plain.startswith(f"{module}.") for module in idle if module):
            found.append(name)
    return found


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move what trains a little, each parameter by its name: what starts at zero hides gradients behind it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.02 * noise).to(parameter))


def loss(outputs: Outputs) -> Tensor:
    """A number that every output has a part in."""
    return torch.stack([value.float().square().mean() for value in outputs.values() if value.requires_grad]).sum()


def eager(model: Any) -> Any:
    """In eval mode, experts by their own loop: the grouped product knows no float64, and other orders of sums."""
    if hasattr(model, "set_experts_implementation") and any(p.ndim == 3 for p in model.parameters()):
        model.set_experts_implementation("eager")
    return model.eval()
