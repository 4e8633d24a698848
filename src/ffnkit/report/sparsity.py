"""How many weights are zero, linear by linear, before and after updates are merged, and what each merge costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ffnkit.calibration.batches import evaluating, forward, prepared
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.methods.drop.weights import Prunable, prunable
from ffnkit.model.inspect import inspect
from ffnkit.model.linear import stored_weight
from ffnkit.nn.adapter_layer import AdapterLayer, adapter_layers
from ffnkit.nn.reparametrized import oriented


@dataclass(frozen=True)
class Zeros:
    """The zeros of one weight.

    Attributes:
        name: of the linear. weights: how many there are. zeros: of the weight as it is, below an update of the frozen
            one. merged: once the update is merged whole. masked: once it is merged by ``fold(masked=True)``.
    """

    name: str
    weights: int
    zeros: int
    merged: int
    masked: int


@dataclass(frozen=True)
class Sparsity:
    """The zeros of a model's linears, task head and embeddings left out."""

    rows: tuple[Zeros, ...]

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    def share(self, kind: str = "zeros") -> float:
        """The share of zeros in all of them: "zeros", "merged" or "masked"."""
        return sum(getattr(row, kind) for row in self.rows) / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        totals = {kind: self.share(kind) for kind in ("zeros", "merged", "masked")}
        return {"weights": self.weights, **totals, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"  {'':<{width}}  {'weights':>12}  {'zero':>7}  {'merged':>7}  {'masked':>7}"]
        for row in self.rows:
            shares = "  ".join(f"{getattr(row, k) / row.weights:>7.1%}" for k in ("zeros", "merged", "masked"))
            lines.append(f"  {row.name:<{width}}  {row.weights:>12,}  {shares}")
        shares = "  ".join(f"{self.share(kind):>7.1%}" for kind in ("zeros", "merged", "masked"))
        return "\n".join([*lines, f"  {'all':<{width}}  {self.weights:>12,}  {shares}"])


@torch.no_grad()
def sparsity(model: PreTrainedModel, targets: str = "all") -> Sparsity:
    """The zeros of a model's linears, each counted as they are and as both ways of merging would leave them.

    Memory beyond the model: one weight with its update.

    Args:
        targets: which linears: "ffn", "attention", "qv", "all", or a regular expression over module names.

    Raises:
        FfnkitError: no linear matches.
    """
    return Sparsity(tuple(_zeros(each) for each in prunable(model, targets)))


def _zeros(each: Prunable) -> Zeros:
    each.check()
    count = int(each.gone(each.stored).sum())
    if not isinstance(each.module, AdapterLayer):
        return Zeros(each.label, each.numel, count, count, count)
    zero = each.module.merged(masked=False) == 0
    both = zero | (stored_weight(each.module) == 0)
    return Zeros(each.label, each.numel, count, int(zero.sum()), int(both.sum()))


def units_removed(model: PreTrainedModel, before: nn.Module) -> dict[str, float]:
    """The shares of attention heads and of FFN neurons that went, "heads_removed" and "neurons_removed".

    Those of layers that went count, experts by themselves; FFNs that share their weights each as one of its own.

    Args:
        before: the model as it was, with or without numbers.
    """
    now, then = _units(model), _units(before)
    return {f"{name}_removed": 1 - now[name] / count for name, count in then.items() if count}


def _units(model: nn.Module) -> dict[str, int]:
    seen = inspect(model)
    neurons = sum(row.width * max(row.experts, 1) * (1 + len(row.shared_with)) for row in seen.rows)
    return {"heads": sum(row.heads for row in seen.attention), "neurons": neurons}


@dataclass(frozen=True)
class MergeCosts:
    """The loss on the same batches with updates apart, merged whole, and merged with zeros kept.

    Attributes:
        zeros: the sparsity of each way, by its name.
    """

    apart: float
    merged: float
    masked: float
    zeros: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(self).items()}

    def __str__(self) -> str:
        return "\n".join(
            f"  {name:<7} loss {getattr(self, name):.4f}, {self.zeros[name]:.1%} of the weights zero"
            for name in ("apart", "merged", "masked")
        )


@torch.no_grad()
def merge_costs(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> MergeCosts:
    """The loss of each way to keep or merge the updates that are on a model, which stays as it is.

    Memory beyond the model: the merged weights of all linears that carry updates.

    Args:
        batches: with labels, so that the model gives its loss. Batches count by their labels (those of -100 left out).

    Raises:
        FfnkitError: no update is on the model, there are no batches, or they have no labels.
    """
    if not adapter_layers(model):
        raise FfnkitError(f"merging the updates of {type(model).__name__}", "no update is on it", "Tune it first")
    given = list(batches)
    zeros = sparsity(model)
    apart = _loss(model, given)
    with _merged(model, masked=False):
        whole = _loss(model, given)
    with _merged(model, masked=True):
        masked = _loss(model, given)
    kinds = {"apart": "zeros", "merged": "merged", "masked": "masked"}
    return MergeCosts(apart, whole, masked, {name: zeros.share(kind) for name, kind in kinds.items()})


@contextmanager
def _merged(model: nn.Module, *, masked: bool) -> Iterator[None]:
    """Linears with updates compute with one merged weight while the block runs."""
    layers = list(adapter_layers(model).values())
    try:
        for layer in layers:
            weight = oriented(layer.merged(masked=masked), layer.transposed)
            layer.forward = partial(_linear, layer, weight)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _linear(layer: AdapterLayer, weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight, layer.bias)


def _loss(model: nn.Module, batches: list[Mapping[str, Any]]) -> float:
    total = weight = 0.0
    with evaluating(model):
        for batch in counted(batches, "costs of merging"):
            output = forward(model, prepared(model, batch), labels=True)
            loss, labels = getattr(output, "loss", None), batch.get("labels")
            if loss is None or labels is None:
                found = "its outputs have no loss"
                raise FfnkitError(f"the loss of {type(model).__name__}", found, "Give batches with labels")
            count = int((labels != -100).sum())
            total, weight = total + float(loss) * count, weight + count
    if not weight:
        raise FfnkitError("the loss", "there are no batches with labels", "Give some")
    return total / weight


def shares_of(model: PreTrainedModel) -> dict[str, float]:
    """The share of zeros in the model's linears: as they are, and merged in either way."""
    found = sparsity(model).to_dict()
    return {name: found[name] for name in ("zeros", "merged", "masked")}
