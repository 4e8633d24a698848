"""Attention heads go: by their weights, by what an update changed of them, or at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import kept
from ffnkit.edits import Edit, SelectHeads
from ffnkit.edits.heads import check_separable
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, Layers, generator, largest, need_data
from ffnkit.methods.drop.head_outputs import refitted_outputs, watch_outputs
from ffnkit.methods.drop.learnt import Learnt, of_heads
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import bare_weight, features
from ffnkit.model.targets import select
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc, check, renamed, told

Amount = int | float | Mapping[str, int | float]
By = Literal["weight", "update", "both", "activation", "coefficients", "random"]


@renamed(share="remove")
@dataclass(frozen=True)
class RemoveHeads:
    """Remove the attention heads with the lowest scores, physically.

    Where several heads share a key and a value, whole groups go; with one key and value for all heads, queries go.

    Source: DSEE (arXiv 2111.00160), structured pruning: by "update", remove 0.25; of ``refit``, GRAIL (arXiv
        2602.23795).
    """

    remove: Annotated[
        Amount,
        Doc(
            "what goes of each attention: a float is a share of its heads, an int counts heads (or "
            "groups); or one by the attention's name, and those that it leaves out stay whole."
        ),
    ] = 0.25
    by: Annotated[
        By,
        Doc(
            'what scores a head: "weight" sums |W| over its rows of query and value; "update" sums '
            '|update| of the same rows, where they carry one; "both" sums |W + update|; "activation" '
            "is the rms of what the head gives on data times the norm of its columns of the output "
            'linear; "coefficients" |c|, where such were learnt; "random".'
        ),
    ] = "weight"
    layers: Layers = "all"
    seed: Annotated[int, Doc("of random scores.", at_least=0)] = 0
    refit: Annotated[
        bool, Doc("refit the output linears to what the attentions gave on data, by ridge regression (GRAIL).")
    ] = False
    ridge: Annotated[
        float | None,
        Doc(
            "of refit, towards the columns as they were, relative to the heads' mean square. None: several, mixed by "
            "what tokens say that were not fitted; 1 where those are too few.",
            at_least=0,
        ),
    ] = None

    name: ClassVar[str] = "heads"
    summary: ClassVar[str] = "remove attention heads (structured pruning)"
    paper: ClassVar[str] = "arXiv 2111.00160"

    @property
    def needs_data(self) -> bool:
        """Whether activations are measured."""
        return self.by == "activation" or self.refit

    @property
    def reads_weights(self) -> bool:
        """Whether scores come from the model."""
        return self.by != "random"

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return told(self)

    def chosen(self, model: nn.Module) -> list[tuple[Attention, int]]:
        """The attentions and how many units each keeps. Raises FfnkitError where the settings do not fit the model."""
        check(self)
        found = attentions(model)
        if not found:
            do = "Name a model with attention of a known layout, or add the layout (docs/adding.md)"
            raise FfnkitError(f"the heads of {type(model).__name__}", "none of its modules is a known attention", do)
        return self._left(select(found, self.layers))

    def learnt(self, model: nn.Module) -> list[Learnt]:
        """What the scores are read from that only a tuning leaves."""
        return of_heads("by", self.by, [attention for attention, _ in self.chosen(model)])

    def _left(self, chosen: list[Attention]) -> list[tuple[Attention, int]]:
        if isinstance(self.remove, Mapping):
            known = {attention.name for attention in chosen}
            unknown = [name for name in self.remove if name not in known]
            if unknown:
                do = f"There are {', '.join(known)}"
                raise FfnkitError(f"heads of {unknown[0]}", "no attention of that name is chosen", do)
            chosen = [attention for attention in chosen if attention.name in self.remove]
        left = []
        for attention in chosen:
            check_separable(attention)
            if self.refit and isinstance(attention.linear("o"), ReparametrizedLinear):
                what = f"its output linear is edited already ({attention.linear('o').kind})"
                raise FfnkitError(f"refitting {attention.name}", what, "Fold the model first, or leave refit out")
            share = self.remove[attention.name] if isinstance(self.remove, Mapping) else self.remove
            left.append((attention, units_left(share, attention)))
        if not any(keep < attention.units for attention, keep in left):
            most = max((attention.units for attention, _ in left), default=0)
            what = f"the attentions have at most {most} heads or groups, so none would go"
            raise FfnkitError(f"remove={self.remove}", what, "Ask for more, or a number of heads")
        return left

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        targets = self.chosen(model)
        found = [attention for attention, keep in targets if keep < attention.units]
        batches = kept(need_data(data, self.name, beyond="attention")) if self.needs_data else []
        rms = head_activity(model, batches, found, progress=progress) if self.by == "activation" else None
        stay: dict[str, Tensor] = {}
        for number, (attention, keep) in enumerate(targets):
            if keep < attention.units:
                scores = head_scores(attention, self.by, generator(self.seed, number), rms)
                index = largest(scores, keep)
                total = scores.sum().item()
                lost = 1 - scores[index.long()].sum().item() / total if total > 0 else 0.0
                quantities[attention.name] = {"score lost": lost}
                edits.append(removal(attention, index))
                stay[attention.name] = index
            if progress is not None:
                progress(number + 1, len(targets), attention.name)
        if self.refit:
            for edit, error in refitted_outputs(model, batches, found, stay, self.ridge, progress):
                edits.append(edit)
                quantities[edit.target] = {"output error on the data": error}
        return Draft(tuple(edits), quantities)


def removal(attention: Attention, index: Tensor, *, silent: bool = False) -> SelectHeads:
    """The edit that keeps these units of an attention; ``silent``: and lets them give zeros."""
    units = attention.units
    gone = (units - len(index)) * attention.unit_parameters
    index = index.to(torch.int32)
    return SelectHeads(attention.name, index=index, heads=attention.heads, units=units, parameters=gone, silent=silent)


def left_out(attention: Attention) -> SelectHeads:
    """The edit that leaves an attention out: the fewest heads that its family bears stand in, and give zeros."""
    return removal(attention, torch.arange(attention.multiple), silent=True)


def units_left(remove: int | float, attention: Attention) -> int:
    """How many units stay when this share or number of them goes; at least one, and a number that the family bears."""
    units, asked = attention.units, f"remove {remove!r} of the heads of {attention.name}"
    if isinstance(remove, bool) or not isinstance(remove, int | float):
        raise FfnkitError(asked, "it is no number", "Give a number of heads, such as 2, or a share, such as 0.25")
    if isinstance(remove, float) and not 0 <= remove < 1:
        raise FfnkitError(asked, "a share that goes lies from 0 to below 1", "Give a share such as 0.25")
    if isinstance(remove, int) and not 0 <= remove < units:
        raise FfnkitError(asked, f"it has {units} heads or groups", f"Give 0 to {units - 1}: one has to stay")
    left = max(1, units - (round(remove * units) if isinstance(remove, float) else remove))
    return -(-left // attention.multiple) * attention.multiple


# --- scores -------------------------------------------------------------------------------------------------------


def head_scores(attention: Attention, by: str, draw: torch.Generator, rms: dict[str, Tensor] | None = None) -> Tensor:
    """(units,) float64, the higher the better. Raises FfnkitError where they are not finite, or cannot be had.

    Args:
        rms: by the attention's name (units,), for "activation": from :func:`head_activity`.
    """
    if by == "activation":
        assert rms is not None
        linear = attention.linear("o")
        weight = bare_weight(linear).mT  # (in, out)
        size = weight.detach().double().reshape(attention.units, -1).norm(dim=1).cpu()
        scores = rms[attention.name] * size
    else:
        scores = SCORES[by](attention, draw).double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise FfnkitError(f"scores of {attention.name}", "not finite", "Repair the model's weights first")
    return scores


def head_activity(
    model: nn.Module,
    data: Iterable[Batch],
    found: list[Attention],
    beside: list[FFN] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """By name (units,) float64: the rms over tokens of what each unit hands to the output linear; one pass.

    Args:
        beside: FFNs whose hidden neurons' rms (:func:`~ffnkit.methods.common.activity`) the same pass measures.
    """
    sums = {attention.name: torch.zeros(attention.units, dtype=torch.float64) for attention in found}
    counts = {attention.name: 0.0 for attention in found}

    def note(attention: Attention, x: Tensor, _: Tensor, weights: Tensor) -> None:
        squares = x.reshape(len(x), attention.units, -1).float().square().sum(-1)
        sums[attention.name] += (weights @ squares).double().cpu()
        counts[attention.name] += float(weights.sum())

    neurons = watch_outputs(model, data, found, note, beside, progress)
    return neurons | {name: (total / counts[name]).sqrt() for name, total in sums.items()}


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
    if not any(isinstance(linear, AdapterLayer) for linear in linears):
        do = "Tune with dsee on query and value first, or take weight"
        raise FfnkitError(f"by update in {attention.name}", "neither query nor value carries an update", do)
    return by_unit(attention, lambda linear: linear.update() if isinstance(linear, AdapterLayer) else _nothing(linear))


def _nothing(linear: Any) -> Tensor:
    return torch.zeros(features(linear))


def _both(attention: Attention, _: torch.Generator) -> Tensor:
    return by_unit(attention, bare_weight)


def _random(attention: Attention, draw: torch.Generator) -> Tensor:
    return torch.rand(attention.units, generator=draw)


def _coefficients(attention: Attention, _: torch.Generator) -> Tensor:
    linear = attention.linear("o")
    values = linear.by_input() if isinstance(linear, AdapterLayer) else None
    if values is None:
        do = "Tune with coefficients=0.1 or so, keep the updates apart (merge=False), or take another score"
        raise FfnkitError(f"by coefficients in {attention.name}", "no coefficients are on it", do)
    return values.double().abs().view(attention.units, -1).mean(1)


# A score gives (units,) numbers, the higher the better, for one attention.
SCORES: dict[str, Callable[[Attention, torch.Generator], Tensor]] = {
    "weight": _weight,
    "update": _update,
    "both": _both,
    "coefficients": _coefficients,
    "random": _random,
}
