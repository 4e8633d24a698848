"""Where the energy of gradients lies: how few entries hold how much of it, in which basis, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ffnkit.analysis.energy_advice import Advice, advise
from ffnkit.analysis.energy_measure import KINDS, Measured, Settings, measure
from ffnkit.analysis.energy_states import training_states
from ffnkit.calibration.batches import Batch
from ffnkit.errors import FfnkitError
from ffnkit.methods.update.sparsegrad import SparseGrad
from ffnkit.plans import Progress
from ffnkit.settings import WhichLayers

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)
TITLES = {
    "raw": "the weight's own basis",
    "shared": "one basis for all layers of a type",
    "layer": "a basis for each weight",
    "random": "a random basis",
    "fixed raw": "chosen before, the weight's own basis",
    "fixed shared": "chosen before, shared basis",
    "fixed core": "chosen before, leading core of the shared basis",
    "fixed layer": "chosen before, a basis for each weight",
}


@dataclass(frozen=True)
class Energy:
    """Shares of the energy (sum of squares) of fresh gradients that their few largest entries hold.

    Attributes:
        shares: of a weight's entries, in rising order. steps: of training, after which was measured.
        layers: what was measured, by linear.
        advice: which layers to train and how many entries, with the rules.
        conditions: settings and data. seconds: by part of the work.
    """

    model: str
    shares: tuple[float, ...]
    steps: tuple[int, ...]
    layers: tuple[Measured, ...]
    advice: Advice
    conditions: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON data."""
        return {
            "model": self.model,
            "shares": list(self.shares),
            "steps": list(self.steps),
            "kinds": {kind: TITLES[kind] for kind in self.kinds},
            "layers": [each.to_dict() for each in self.layers],
            "advice": asdict(self.advice),
            "conditions": self.conditions,
            "seconds": self.seconds,
        }

    @property
    def kinds(self) -> list[str]:
        """What was measured, in the order of the tables."""
        return [kind for kind in KINDS if kind in self.layers[0].energy[0]]

    @property
    def reference(self) -> int:
        """The place of the share that is nearest to 1%."""
        return min(range(len(self.shares)), key=lambda i: abs(self.shares[i] - 0.01))

    def __str__(self) -> str:
        at, kinds = self.reference, self.kinds
        wide = max(len(each.name) for each in self.layers)
        lines = [
            f"{self.model}: share of a fresh gradient's energy in {self.shares[at]:.1%} of its entries",
            f"{'':{wide}}  " + "  ".join(f"{kind:>12}" for kind in kinds) + "     of all  for half",
        ]
        parts = self.advice.energy
        for step, number in enumerate(self.steps):
            if len(self.steps) > 1:
                lines.append(f"after {number:,} steps")
            for each in self.layers:
                values = "  ".join(f"{each.energy[step][kind][at]:12.3f}" for kind in kinds)
                half = each.half[step].get(self.advice.choice)
                end = f"  {parts[each.name][step]:9.1%}  {'none' if half is None else f'{half:,}':>8}"
                lines.append(f"{each.name:{wide}}  {values}{end}")
        return "\n".join([*lines, *self.advice.lines()])

    def plot(self, path: str | Path) -> None:
        """The picture: by layer, by share and by step, a column a type of linear."""
        from ffnkit.analysis.energy_plot import draw

        draw(self, path)

    def plot_gradients(self, path: str | Path) -> None:
        """Pictures of one gradient of each type of linear, before and after the bases."""
        from ffnkit.analysis.gradient_pictures import draw

        draw(self, path)


def gradient_energy(
    model: nn.Module,
    batches: Iterable[Batch],
    fresh: Iterable[Batch],
    *,
    targets: str = "ffn",
    layers: WhichLayers = "all",
    shares: Sequence[float] = SHARES,
    reach: float = 1.0,
    core: float = 0.97,
    layer_bases: bool = True,
    steps: Sequence[int] = (0,),
    training: Iterable[Batch] | None = None,
    learning_rate: float = 5e-5,
    memory: int = 512 << 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Energy:
    """Measure which share of a fresh gradient's energy its few largest entries hold, in several bases.

    Bases, and the entries that are chosen before, come from ``batches``; what they hold is measured on ``fresh``, each
    batch a gradient. With several ``steps`` the model trains on ``training`` (AdamW, all that trains in it) and the
    bases and choices of the start are measured again; afterwards every tensor is as it was.

    Memory: sums for each type of linear (squares of its sides), and sums for so many linears at a time as ``memory``
    holds, at least one. Fewer at a time take more passes over the data. Training also holds AdamW's moments.

    Args:
        batches, fresh, training: with labels, so that the model gives its loss; training is ``batches`` by default.
        targets, layers: which linears, as in :class:`ffnkit.SparseGrad`.
        shares: of each weight's entries.
        reach: so many leading rows of a basis are used as hold this share of the energy they were made from, which
            is faster. Entries beyond them count as nothing, and "beyond" says how much energy they hold.
        core: the leading rectangle, for the choice within it, as in SparseGrad, but one for each weight.
        layer_bases: measure a basis for each weight too, which costs most.
        memory: bytes. seed: of the random basis and of training.

    Raises:
        FfnkitError: settings out of range, no batches, no loss, linears that SparseGrad does not take.
    """
    shares, steps = tuple(sorted(set(shares))), tuple(sorted(set(steps)))
    _check(shares, steps, reach, core, memory)
    batches, fresh = list(batches), list(fresh)
    if not batches or not fresh:
        found = "there are no batches" if not batches else "there are no fresh batches"
        raise FfnkitError("the energy of gradients", found, "Give batches with labels for both")
    linears = SparseGrad(targets=targets, layers=layers, core=core).chosen(model)
    settings = Settings(shares, reach, core, layer_bases, memory, seed)
    start = time.perf_counter()
    if steps == (0,):
        states: Any = nullcontext([lambda: None])
    else:
        states = training_states(
            model, batches if training is None else list(training), steps, learning_rate, seed, progress
        )
    with states as restored:
        trained = time.perf_counter()
        measured = measure(model, linears, batches, fresh, settings, restored, progress)
    seconds = {"training": trained - start, "measuring": time.perf_counter() - trained}
    at = min(range(len(shares)), key=lambda i: abs(shares[i] - 0.01))
    conditions = {
        "batches": len(batches),
        "fresh": len(fresh),
        "rows": _rows([*batches, *fresh]),
        "targets": targets,
        "layers": layers,
        "reach": reach,
        "core": core,
        "seed": seed,
    }
    if steps != (0,):
        conditions["learning_rate"] = learning_rate
    advice = advise(model, measured, targets, shares, at)
    return Energy(type(model).__name__, shares, steps, tuple(measured), advice, conditions, seconds)


def _check(shares: Sequence[float], steps: Sequence[int], reach: float, core: float, memory: int) -> None:
    for name, values in (("shares", shares), ("reach", [reach]), ("core", [core])):
        wrong = [value for value in values if not 0 < value <= 1]
        if wrong or not values:
            found = f"{wrong[0]} is not above 0 and up to 1" if wrong else "there are none"
            raise FfnkitError(f"{name} of the gradient's energy", found, "Give shares such as 0.01")
    if not steps or steps[0] < 0:
        raise FfnkitError(f"steps {list(steps)}", "not numbers from 0 on", "Give steps such as 0,50,100")
    if memory < 1:
        raise FfnkitError(f"memory {memory}", "not a number of bytes", "Give at least 1")


def _rows(batches: Iterable[Batch]) -> int:
    """Rows in all, by the first tensor of each batch."""
    return sum(len(next(iter(batch.values()))) for batch in batches)
