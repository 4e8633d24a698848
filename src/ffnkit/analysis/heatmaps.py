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

    stacks = list(found.layers)
    most = max(len(found.matrices[stack]) for stack in stacks)
    figure = Figure(figsize=(3.4 * most + 0.8, 3.5 * len(stacks)), layout="constrained")
    axes = figure.subplots(len(stacks), most, squeeze=False)
    image = None
    for row, stack in zip(axes, stacks, strict=True):
        for place in row[len(found.matrices[stack]) :]:
            place.axis("off")
        for place, (key, matrix) in zip(row, found.matrices[stack].items(), strict=False):
            image = place.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
            place.set_title(f"{stack + ': ' if stack else ''}{TITLES[key]}", fontsize=9)
            place.set_xlabel("layer")
            place.set_ylabel("layer")
            ticks = range(0, len(matrix), max(1, len(matrix) // 8))
            place.set_xticks(list(ticks))
            place.set_yticks(list(ticks))
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    with disk_errors(path):
        figure.savefig(path, dpi=150)
