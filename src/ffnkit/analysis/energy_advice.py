"""Which layers to train and how many entries, from where the energy of gradients lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ffnkit.analysis.energy_measure import Measured
from ffnkit.model.finding import ffns
from ffnkit.model.targets import expression

HELD = 0.8  # of the energy of all layers
BETTER = 0.05  # of a gradient's energy: so much more a basis for each weight has to hold to be worth its size


@dataclass(frozen=True)
class Advice:
    """What to train.

    Attributes:
        basis: "layer" where its fixed choice holds over 5 points more of the energy than that of a shared basis, "none"
            where the weight's own basis holds no less than the shared one, else "shared". choice: its kind.
        layers: the fewest FFNs whose gradients hold 80% of the energy of all, as ``layers`` of SparseGrad takes them;
            empty where other linears than those of FFNs were measured.
        linears: their linears. density: what they need, of all of their entries; not below the smallest share measured.
        count: by linear, the fewest entries chosen before that hold half of a fresh gradient's energy in that basis
            after every step that was measured; None where not even all of them do.
        energy: by linear, its part of the energy of all gradients, a step.
        held: by kind, energy held by the fixed choice at share ``at``, in the mean over linears and steps.
    """

    basis: str
    choice: str
    layers: str
    linears: tuple[str, ...]
    density: float
    count: dict[str, int | None]
    energy: dict[str, list[float]]
    held: dict[str, float]
    at: float

    def lines(self) -> list[str]:
        """What is printed below the table."""
        held = ", ".join(f"{key.removeprefix('fixed ')} {value:.3f}" for key, value in self.held.items())
        where = f'layers="{self.layers}", ' if self.layers else ""
        total = sum(_mean(self.energy[name]) for name in self.linears)
        return [
            f"fixed choices of {self.at:.1%} hold in the mean: {held}",
            f"basis: {self.basis} (layer if it holds over {BETTER:.2f} more than shared, none if the weight's own "
            "holds no less)",
            f"layers: {self.layers or ', '.join(self.linears)} (the fewest with {HELD:.0%} of all energy; they hold "
            f"{total:.0%})",
            f"entries: {self.density:.2%} of theirs (the fewest that hold half of a fresh gradient's energy after "
            "every step measured, weight by weight, and no less than the smallest share measured)",
            f'fk.SparseGrad({where}density={self.density:g}, basis="{self.basis}")',
        ]


def advise(model: nn.Module, measured: list[Measured], targets: str, shares: Sequence[float], at: int) -> Advice:
    """The rules of :class:`Advice`.

    Args:
        shares: that were measured, rising. at: the place of that at which bases are compared.
    """
    kinds = [kind for kind in measured[0].energy[0] if kind.startswith("fixed ")]
    held = {kind: _mean([_mean([each[kind][at] for each in row.energy]) for row in measured]) for kind in kinds}
    basis = "shared"
    if held["fixed raw"] >= held["fixed shared"]:
        basis = "none"
    if held.get("fixed layer", 0.0) > max(held["fixed shared"], held["fixed raw"]) + BETTER:
        basis = "layer"
    choice = "fixed raw" if basis == "none" else f"fixed {basis}"
    totals = [max(sum(norms), 1e-300) for norms in zip(*(row.norm for row in measured), strict=True)]
    energy = {row.name: [a / b for a, b in zip(row.norm, totals, strict=True)] for row in measured}
    groups, layers = _ffns(model, measured) if targets == "ffn" else ({row.name: [row.name] for row in measured}, {})
    chosen = _fewest({key: sum(_mean(energy[name]) for name in names) for key, names in groups.items()}, HELD)
    names = tuple(name for key, own in groups.items() if key in chosen for name in own)
    count = {row.name: _most([half.get(choice) for half in row.half]) for row in measured}
    sizes = {row.name: row.shape[0] * row.shape[1] for row in measured}
    part = sum(count[name] or sizes[name] for name in names) / sum(sizes[name] for name in names)
    places = [layers[key] for key in groups if key in chosen] if layers else []
    return Advice(
        basis=basis,
        choice=choice,
        layers=_expression(places, len(chosen) == len(groups)) if layers else "",
        linears=names,
        density=max(shares[0], _rounded(part)),
        count=count,
        energy=energy,
        held=held,
        at=shares[at],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _most(counts: Sequence[int | None]) -> int | None:
    """The largest, where all are known."""
    known = [count for count in counts if count is not None]
    return max(known) if known and len(known) == len(counts) else None


def _ffns(model: nn.Module, measured: list[Measured]) -> tuple[dict[str, list[str]], dict[str, tuple[str, int]]]:
    """Linears by layer, and each layer as (stack, number)."""
    owner: dict[int, tuple[str, int]] = {}
    for ffn in ffns(model):
        owner |= {id(parameter): (ffn.stack, ffn.layer) for parameter in ffn.parameters()}
    groups: dict[str, list[str]] = {}
    layers: dict[str, tuple[str, int]] = {}
    for row in measured:
        place = owner[id(model.get_submodule(row.name).weight)]
        key = f"{place[0]}:{place[1]}"
        groups.setdefault(key, []).append(row.name)
        layers[key] = place
    return groups, layers


def _fewest(parts: dict[str, float], share: float) -> set[str]:
    """The keys of the largest parts that make ``share`` of their sum together."""
    goal, held = share * sum(parts.values()), 0.0
    chosen: set[str] = set()
    for key in sorted(parts, key=lambda each: -parts[each]):
        if chosen and held >= goal:
            break
        chosen.add(key)
        held += parts[key]
    return chosen


def _expression(places: list[tuple[str, int]], every: bool) -> str:
    """Layers as :func:`ffnkit.model.targets.select` reads them."""
    if every:
        return "all"
    stacks: dict[str, list[int]] = {}
    for stack, number in sorted(set(places)):
        stacks.setdefault(stack, []).append(number)
    return ",".join(f"{stack}:{expression(own)}" if stack else expression(own) for stack, own in stacks.items())


def _rounded(share: float) -> float:
    """Up to two digits, never below."""
    if share <= 0:
        return share
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(1.0, round(math.ceil(share / unit - 1e-9) * unit, 12))
