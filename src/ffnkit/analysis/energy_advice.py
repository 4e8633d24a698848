"""Which layers to train and how many entries, from where the energy of gradients lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ffnkit.analysis.energy_measure import Measured
from ffnkit.blocks import ffns

HELD = 0.8  # of the energy of all layers
BETTER = 0.05  # of a gradient's energy: so much more a basis for each weight has to hold to be worth its size


@dataclass(frozen=True)
class Advice:
    """What to train.

    Attributes:
        basis: "layer" where its fixed choice holds over 5 points more of the energy than that of a shared basis, "none"
            where the weight's own basis holds no less than the shared one, else "shared".
        layers: the fewest FFNs whose gradients hold 80% of the energy of all, as ``layers`` of SparseGrad takes them;
            empty where other linears than those of FFNs were measured.
        linears: their linears. share: the entries that hold half of a gradient's energy there, of all of theirs.
        count: by linear, the fewest entries chosen before that hold half of a fresh gradient's energy, in that basis.
        energy: by linear, its part of the energy of all gradients.
        differences: by basis, energy held by the fixed choice, in the mean over the linears.
    """

    basis: str
    layers: str
    linears: tuple[str, ...]
    share: float
    count: dict[str, int | None]
    energy: dict[str, float]
    differences: dict[str, float]
    at: float

    def lines(self) -> list[str]:
        """What is printed below the table."""
        held = ", ".join(f"{key.removeprefix('fixed ')} {value:.3f}" for key, value in self.differences.items())
        where = f'layers="{self.layers}", ' if self.layers else ""
        total = sum(self.energy[name] for name in self.linears)
        return [
            f"fixed choices of {self.at:.1%} hold in the mean: {held}",
            f"basis: {self.basis} (layer if it holds over {BETTER:.2f} more than shared, none if the weight's own "
            "holds no less)",
            f"layers: {self.layers or ', '.join(self.linears)} (the fewest with {HELD:.0%} of all energy; they hold "
            f"{total:.0%})",
            f"entries: {self.share:.2%} of theirs (the fewest that hold half of a fresh gradient's energy, weight by "
            "weight)",
            f'fk.SparseGrad({where}share={self.share:g}, basis="{self.basis}")',
        ]


def advise(model: nn.Module, measured: list[Measured], sites: str, share: float, at: int) -> Advice:
    """The rules of :class:`Advice`, on what was measured at the start.

    Args:
        share, at: at which share bases are compared, and its place.
    """
    kinds = [
        kind for kind in ("fixed raw", "fixed shared", "fixed core", "fixed layer") if kind in measured[0].energy[0]
    ]
    held: dict[str, float] = {kind: sum(row.energy[0][kind][at] for row in measured) / len(measured) for kind in kinds}
    basis = "shared"
    if held["fixed raw"] >= held["fixed shared"]:
        basis = "none"
    if held.get("fixed layer", 0.0) > max(held["fixed shared"], held["fixed raw"]) + BETTER:
        basis = "layer"
    kind = "fixed raw" if basis == "none" else f"fixed {basis}"
    total = sum(row.norm[0] for row in measured)
    energy = {row.name: row.norm[0] / total if total else 0.0 for row in measured}
    groups, layers = _ffns(model, measured) if sites == "ffn" else ({row.name: [row.name] for row in measured}, {})
    chosen = _fewest({key: sum(energy[name] for name in names) for key, names in groups.items()}, HELD)
    names = tuple(name for key, own in groups.items() if key in chosen for name in own)
    count = {row.name: row.half.get(kind) for row in measured}
    sizes = {row.name: row.shape[0] * row.shape[1] for row in measured}
    wanted = sum(count[name] or sizes[name] for name in names)
    part = wanted / sum(sizes[name] for name in names)
    places = [layers[key] for key in groups if key in chosen] if layers else []
    return Advice(
        basis=basis,
        layers=_expression(places, len(chosen) == len(groups)) if layers else "",
        linears=names,
        share=_rounded(part),
        count=count,
        energy=energy,
        differences=held,
        at=share,
    )


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
    """Layers as :func:`ffnkit.blocks.select` reads them."""
    if every:
        return "all"
    stacks: dict[str, list[int]] = {}
    for stack, number in sorted(set(places)):
        stacks.setdefault(stack, []).append(number)
    return ",".join(f"{stack}:{_list(own)}" if stack else _list(own) for stack, own in stacks.items())


def _list(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _rounded(share: float) -> float:
    """Up to two digits, never below."""
    if share <= 0:
        return share
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(1.0, round(math.ceil(share / unit - 1e-9) * unit, 12))
