"""Pictures of gradients before and after the bases, as the SparseGrad paper shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ffnkit.io.files import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ffnkit.analysis.energy import Energy
    from ffnkit.analysis.energy_measure import Measured

SIDE = 192  # most rows and columns of a picture: what lies beyond is pooled
DECADES = 3  # of entries below the largest that have a colour of their own
HEADS = {"raw": "the gradient, in the weight's own basis", "shared": "in the shared bases", "layer": "in its own bases"}


def pooled(gradient: Tensor) -> Tensor:
    """Sizes of a matrix's entries, root mean squares of blocks where a side is longer than a picture's; float32."""
    squares = gradient.detach().float().square()[None, None]
    rows, columns = (min(size, SIDE) for size in gradient.shape)
    return functional.adaptive_avg_pool2d(squares, (rows, columns))[0, 0].sqrt().cpu()


def draw(found: Energy, path: str | Path) -> None:
    """Write a row for each type of linear, and each step: one gradient in the weight's own basis, then in the others.

    It is the first fresh batch's, of the type's middle layer. Colours are logarithmic, relative to the largest entry.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = [(row, step) for row in middle(found) for step in range(len(found.steps))]
    kinds = [kind for kind in HEADS if kind in rows[0][0].pictures[0]]
    figure: Figure = Figure(figsize=(3.6 * len(kinds) + 0.9, 3.2 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(kinds), squeeze=False)
    norm = LogNorm(10.0**-DECADES, 1.0, clip=True)
    image = None
    for axes, (row, step) in zip(grid, rows, strict=True):
        for place, kind in zip(axes, kinds, strict=True):
            picture = row.pictures[step][kind]
            shares = picture / picture.max().clamp_min(torch.finfo(torch.float32).tiny)
            height, width = row.basis.get(kind, row.shape)
            image = place.imshow(
                shares.numpy(), norm=norm, cmap="magma", aspect="auto", interpolation="nearest", origin="upper",
                extent=(0, width, height, 0),
            )  # fmt: skip
            held = row.energy[step][kind][found.reference]
            place.set_title(
                f"{HEADS[kind]}\n{held:.0%} of the energy in {found.shares[found.reference]:.1%}", fontsize=8
            )
            _ticks(place)
        after = f", after {found.steps[step]:,} steps" if len(found.steps) > 1 else ""
        axes[0].set_ylabel(f"{row.name}{after}", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid, label="size, relative to the largest", shrink=0.8, aspect=30)
    with disk_errors(path):
        figure.savefig(path, dpi=150)


def middle(found: Energy) -> list[Measured]:
    """One linear of each type, in the middle of the model."""
    types = dict.fromkeys(row.type for row in found.layers)
    groups = [[row for row in found.layers if row.type == kind] for kind in types]
    return [group[len(group) // 2] for group in groups]


def _ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
