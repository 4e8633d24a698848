"""The picture of a similarity analysis: one heat map a matrix, one row a stack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit.io.files import disk_errors

if TYPE_CHECKING:
    from ffnkit.analysis.similarity import Similarity


def draw(found: Similarity, path: str | Path) -> None:
    """Write the picture; every map has the same scale, from 0 to 1."""
    from matplotlib.figure import Figure

    from ffnkit.analysis.similarity import TITLES

    every = {**found.matrices, **found.across}
    stacks = list(every)
    most = max(map(len, every.values()))
    figure = Figure(figsize=(3.4 * most + 0.8, 3.5 * len(stacks)), layout="constrained")
    axes = figure.subplots(len(stacks), most, squeeze=False)
    image = None
    for row, stack in zip(axes, stacks, strict=True):
        for place in row[len(every[stack]) :]:
            place.axis("off")
        for place, (key, matrix) in zip(row, every[stack].items(), strict=False):
            image = place.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
            place.set_title(f"{stack + ': ' if stack else ''}{TITLES[key]}", fontsize=9)
            first, _, second = stack.partition(" to ")
            place.set_xlabel(f"layer of the {second}" if second else "layer")
            place.set_ylabel(f"layer of the {first}" if second else "layer")
            place.set_xticks(range(0, len(matrix[0]), max(1, len(matrix[0]) // 8)))
            place.set_yticks(range(0, len(matrix), max(1, len(matrix) // 8)))
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    with disk_errors(path):
        figure.savefig(path, dpi=150)
