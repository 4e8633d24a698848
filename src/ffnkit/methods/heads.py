"""Attention heads go: by their weights, by what an update changed of them, or at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit import blocks
from ffnkit.attention import Attention, attentions
from ffnkit.edits import Edit, Heads
from ffnkit.errors import FfnkitError
from ffnkit.heads import check_separable
from ffnkit.methods.common import Batch, check_counts, generator, largest
from ffnkit.nn.adapted import Adapted
from ffnkit.plans import Draft, Progress

Amount = int | float | Mapping[str, int | float]


@dataclass(frozen=True)
class RemoveHeads:
    """Remove the attention heads with the lowest scores, physically.

    Where several heads share a key and a value, whole groups go; with one key and value for all heads, queries go.

    Attributes:
        share: what goes of each attention: a float is a share of its heads, an int counts heads (or groups); or one by
            the attention's name, and those that it leaves out stay whole.
        by: what scores a head: "weight" sums |W| over its rows of query and value; "update" sums |update| of the same
            rows, where they carry one; "both" sums |W + update|; "random".
        layers: which layers, e.g. "all", "last:8", "4-11", "4,5,9", "encoder:last:4".
        seed: of random scores.

    Source: DSEE (arXiv 2111.00160), structured pruning: by "update", share 0.25.
    """

    share: Amount = 0.25
    by: str = "weight"
    layers: str = "all"
    seed: int = 0

    name: ClassVar[str] = "heads"
    summary: ClassVar[str] = "remove attention heads (structured pruning)"
    paper: ClassVar[str] = "arXiv 2111.00160"

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)

    def targets(self, model: nn.Module) -> list[tuple[Attention, int]]:
        """The attentions and how many units each keeps. Raises FfnkitError where the settings do not fit the model."""
        check_counts(self, seed=0)
        if self.by not in SCORES:
            raise FfnkitError(f"by {self.by!r}", "no such score", f"Choose of {', '.join(SCORES)}")
        found = attentions(model)
        if not found:
            do = "Name a model with attention of a known layout (ffnkit.attention.ATTENTION_LAYOUTS)"
            raise FfnkitError(f"the heads of {type(model).__name__}", "none of its modules is a known attention", do)
        return self._left(blocks.select(found, self.layers))

    def _left(self, chosen: list[Attention]) -> list[tuple[Attention, int]]:
        if isinstance(self.share, Mapping):
            known = {attention.name for attention in chosen}
            unknown = [name for name in self.share if name not in known]
            if unknown:
                do = f"There are {', '.join(known)}"
                raise FfnkitError(f"heads of {unknown[0]}", "no attention of that name is chosen", do)
            chosen = [attention for attention in chosen if attention.name in self.share]
        left = []
        for attention in chosen:
            check_separable(attention)
            share = self.share[attention.name] if isinstance(self.share, Mapping) else self.share
            left.append((attention, units_left(share, attention)))
        if not any(keep < attention.units for attention, keep in left):
            most = max((attention.units for attention, _ in left), default=0)
            what = f"the attentions have at most {most} heads or groups, so none would go"
            raise FfnkitError(f"share={self.share}", what, "Ask for a larger share, or a number of heads")
        return left

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        targets = self.targets(model)
        for number, (attention, keep) in enumerate(targets):
            if keep < attention.units:
                scores = SCORES[self.by](attention, generator(self.seed, number)).double().cpu()
                if not bool(torch.isfinite(scores).all()):
                    raise FfnkitError(f"scores of {attention.name}", "not finite", "Repair the model's weights first")
                index = largest(scores, keep)
                total = scores.sum().item()
                lost = 1 - scores[index.long()].sum().item() / total if total > 0 else 0.0
                quantities[attention.name] = {"score lost": lost}
                edits.append(removal(attention, index))
            if progress is not None:
                progress(number + 1, len(targets), attention.name)
        return Draft(tuple(edits), quantities)


def removal(attention: Attention, index: Tensor) -> Heads:
    """The edit that keeps these units of an attention."""
    units = attention.units
    gone = (units - len(index)) * attention.unit_parameters
    return Heads(attention.name, index=index.to(torch.int32), heads=attention.heads, units=units, parameters=gone)


def units_left(share: int | float, attention: Attention) -> int:
    """How many units stay when this share or number of them goes; at least one, and a number that the family bears."""
    units, asked = attention.units, f"share {share!r} of the heads of {attention.name}"
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise FfnkitError(asked, f"a {type(share).__name__}", "Give a number of heads (int) or a share (float)")
    if isinstance(share, float) and not 0 <= share < 1:
        raise FfnkitError(asked, "a share that goes lies from 0 to below 1", "Give a share such as 0.25")
    if isinstance(share, int) and not 0 <= share < units:
        raise FfnkitError(asked, f"it has {units} heads or groups", f"Give 0 to {units - 1}: one has to stay")
    left = max(1, units - (round(share * units) if isinstance(share, float) else share))
    return -(-left // attention.multiple) * attention.multiple


# --- scores -------------------------------------------------------------------------------------------------------


def by_unit(attention: Attention, read: Callable[[Any], Tensor] | None = None) -> Tensor:
    """(units,) float64: sums of absolute values over each unit's rows of query and of value.

    A value that all heads share tells none from another, and is left out.

    Args:
        read: what is read of a linear, (out, in); None reads its weight.
    """
    total = torch.zeros(attention.units, dtype=torch.float64)
    for role in ("q", "v"):
        rows = attention.matrix(role, read).float().abs().sum(dim=(1, 2), dtype=torch.float64).cpu()
        if len(rows) >= attention.units:
            total += rows.view(attention.units, -1).sum(1)
    return total


def _weight(attention: Attention, _: torch.Generator) -> Tensor:
    return by_unit(attention)


def _update(attention: Attention, _: torch.Generator) -> Tensor:
    linears = [attention.linear(role) for role in ("q", "v")]
    if not any(isinstance(linear, Adapted) for linear in linears):
        do = "Tune with dsee on query and value first, or take weight"
        raise FfnkitError(f"by update in {attention.name}", "neither query nor value carries an update", do)
    return by_unit(attention, lambda linear: linear.update() if isinstance(linear, Adapted) else _nothing(linear))


def _nothing(linear: Any) -> Tensor:
    return torch.zeros(blocks.features(linear))


def _both(attention: Attention, _: torch.Generator) -> Tensor:
    return by_unit(attention, lambda linear: linear.weight.mT if blocks.is_transposed(linear) else linear.weight)


def _random(attention: Attention, draw: torch.Generator) -> Tensor:
    return torch.rand(attention.units, generator=draw)


# A score gives (units,) numbers, the higher the better, for one attention.
SCORES: dict[str, Callable[[Attention, torch.Generator], Tensor]] = {
    "weight": _weight,
    "update": _update,
    "both": _both,
    "random": _random,
}
