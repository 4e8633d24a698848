"""Widths by layer under one budget of FFN parameters: what each costs, the cheapest choice, a table of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ffnkit.budget.costs import costs_of
from ffnkit.budget.sizes import Room, room
from ffnkit.calibration.batches import Batch
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import phase
from ffnkit.ops.knapsack import cheapest
from ffnkit.plans import Progress, Shape
from ffnkit.settings import WhichLayers


@dataclass(frozen=True)
class Row:
    """One FFN: neurons before and after, parameters after, and what the narrowing costs (None: not estimated)."""

    name: str
    before: int
    after: int
    parameters: int
    cost: float | None


class Allocation(dict[str, int]):
    """Widths by FFN name, as every method takes them: ``CalibratedFusion(width=allocation)``.

    Attributes:
        rows: one an FFN, in the model's order.
        measure: what the costs are, in words.
        parameters: FFN parameters of these layers before. left: after.
    """

    def __init__(
        self,
        widths: Iterable[tuple[str, int]] = (),
        *,
        rows: tuple[Row, ...] = (),
        measure: str = "",
        parameters: int = 0,
        left: int = 0,
    ) -> None:
        super().__init__(widths)
        self.rows, self.measure, self.parameters, self.left = rows, measure, parameters, left

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "widths": dict(self),
            "parameters": self.parameters,
            "left": self.left,
            "measure": self.measure,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        if not self.rows:
            return super().__str__()
        size = max(len(row.name) for row in self.rows)
        share = self.left / max(self.parameters, 1)
        title = f"widths by layer: {self.left:,} of {self.parameters:,} FFN parameters ({share:.1%})"
        lines = [title + (f"; cost: {self.measure}" if self.measure else "")]
        for row in self.rows:
            cost = "" if row.cost is None else f"  cost {row.cost:.3g}"
            kept = row.after / row.before
            lines.append(f"  {row.name:<{size}}  {row.before:>6} -> {row.after:>6}  {kept:>5.0%}{cost}")
        return "\n".join(lines)


def allocate(
    model: nn.Module,
    budget: float | int,
    *,
    layers: WhichLayers = "all",
    data: Iterable[Batch] | StatisticsFile | None = None,
    multiple: int | None = None,
    uniform: bool = False,
    costs: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Widths for the FFNs of ``layers`` such that they keep to ``budget`` and their narrowing costs least.

    The model is left as it is. The sum of the costs is minimised exactly (``ops.knapsack``). It is a first-order
    estimate: costs of different FFNs are taken to add up.

    Args:
        budget: a share of the parameters of the FFNs' neurons (float, 0 to 1), or the number of parameters that
            these FFNs may have, output biases included (int). Experts count each, FFNs that share weights once.
        layers: which layers, e.g. "all", "last:8"; the others neither change nor count.
        data: batches for ``model(**batch)``, or statistics of a pass over them: each cost is then how far the model's
            end moves on them. Without data it is the share of the FFN's weights, by neuron, that goes.
        multiple: widths are multiples of it, the whole width aside; 64 for FFNs of 1024 neurons or more, else 8.
        uniform: the same share for all, the largest within the budget: a standard checkpoint then needs no padding.
            Costs are not estimated.
        costs: what :func:`narrowing_costs` gave of this model, in the place of data: measured once, for many budgets.
        progress: called with (done, total, FFN name).

    Raises:
        FfnkitError: layers, budget or multiple do not fit the model, or data that some FFN does not see.
    """
    try:
        space = room(model, budget, layers, multiple)
        if uniform:
            return _allocation(space, space.uniform(), None, "")
        if costs is None:
            with phase("widths by layer") as step:
                found = costs_of(space, model, data, progress or step)
        else:
            found = [_known(costs, shape) for shape in space.shapes]
        prices = [[float(cost[width]) for width in widths] for cost, widths in zip(found, space.widths, strict=True)]
        picked = cheapest(space.sizes(), prices, space.budget)
    except FfnkitError as error:
        raise error.within(f"widths by layer of {type(model).__name__}") from error
    measured = data is not None or costs is not None
    measure = "how far the model's end moves" if measured else "share of the neurons' norms that goes"
    chosen = [widths[number] for widths, number in zip(space.widths, picked, strict=True)]
    return _allocation(space, chosen, [row[number] for row, number in zip(prices, picked, strict=True)], measure)


def narrowing_costs(
    model: nn.Module, data: Iterable[Batch] | StatisticsFile, *, share: float = 0.5, progress: Progress | None = None
) -> dict[str, Tensor]:
    """For each FFN, by name, (ff + 1,) how far the model's end moves where it keeps so many neurons.

    :func:`allocate` measures this at its own budget; here it is at ``share`` of the neurons. From there the measure
    follows the error of the FFN's output, so budgets far from the share are guessed less well.

    Raises:
        FfnkitError: as :func:`allocate`.
    """
    space = room(model, share)
    with phase("widths by layer") as step:
        costs = costs_of(space, model, data, progress or step)
    return {ffn.name: cost for ffn, cost in zip(space.found, costs, strict=True)}


def _known(costs: Mapping[str, Tensor], shape: Shape) -> Tensor:
    cost = costs.get(shape.name)
    if cost is None or len(cost) != shape.width + 1:
        what = "it is not among them" if cost is None else f"they are of {len(cost) - 1} neurons, it has {shape.width}"
        raise FfnkitError(f"costs of {shape.name}", what, "Measure them anew: narrowing_costs(model, data)")
    return cost


def _allocation(space: Room, widths: list[int], costs: list[float] | None, measure: str) -> Allocation:
    rows = tuple(
        Row(
            shape.name,
            shape.width,
            width,
            shape.parameters - shape.neuron_parameters * (shape.width - width),
            None if costs is None else costs[number],
        )
        for number, (shape, width) in enumerate(zip(space.shapes, widths, strict=True))
    )
    before = sum(shape.parameters for shape in space.shapes)
    left = sum(row.parameters for row in rows)
    return Allocation(((row.name, row.after) for row in rows), rows=rows, measure=measure, parameters=before, left=left)
