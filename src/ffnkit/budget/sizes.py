"""What widths each FFN may get, and how many parameters they leave."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.targets import select
from ffnkit.plans import Shape
from ffnkit.settings import WhichLayers

WIDE = 1024  # FFNs from this width on get multiples of 64, others of 8


@dataclass(frozen=True)
class Room:
    """The FFNs of the chosen layers and the parameters that they may keep.

    Attributes:
        found: the FFNs, each once, shared ones too. shapes: theirs, in the same order.
        widths: for each FFN the widths that it may get, ascending.
        budget: parameters of neurons that may be left in all of them; output biases, which no width changes, are left
            out.
        share: budget relative to the neurons' parameters before.
    """

    found: list[FFN]
    shapes: list[Shape]
    widths: list[list[int]]
    budget: int
    share: float

    def sizes(self) -> list[list[int]]:
        """Parameters of the neurons at each width of each FFN, over all of its experts."""
        pairs = zip(self.shapes, self.widths, strict=True)
        return [[shape.neuron_parameters * width for width in widths] for shape, widths in pairs]

    def uniform(self) -> list[int]:
        """The largest equal widths within the budget.

        FFNs that were of one width get one width; FFNs of another width get about the same share of theirs.
        """
        marks = sorted({width / options[-1] for options in self.widths for width in options})
        picked = [options[0] for options in self.widths]
        for mark in marks:
            pairs = [max((w for w in ws if w <= mark * ws[-1]), default=ws[0]) for ws in self.widths]
            if self.left(pairs) > self.budget:
                break
            picked = pairs
        return picked

    def left(self, widths: list[int]) -> int:
        """Parameters of the neurons that are left with these widths."""
        return sum(shape.neuron_parameters * width for shape, width in zip(self.shapes, widths, strict=True))


def room(model: nn.Module, budget: float | int, layers: WhichLayers = "all", multiple: int | None = None) -> Room:
    """The FFNs of ``layers``, their possible widths and the parameters that they may keep. Reads no weights.

    Args:
        budget: a share of the parameters of the neurons in these layers (float, 0 to 1), or how many parameters the
            FFNs of these layers may have, output biases included (int).
        multiple: widths are multiples of it, the whole width aside; 64 for FFNs of at least 1024 neurons and 8 for
            others unless given.

    Raises:
        FfnkitError: layers that are not there, a budget or multiple out of range, or a budget below the smallest
            widths.
    """
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        raise FfnkitError(f"multiple {multiple!r}", "not a whole number of at least 1", "Give multiple=64 or so")
    found = select(ffns(model), layers)
    shapes = [Shape.of(ffn) for ffn in found]
    whole = sum(shape.neuron_parameters * shape.width for shape in shapes)
    fixed = sum(shape.parameters for shape in shapes) - whole
    kept = _parameters(budget, whole, fixed)
    steps = [multiple or (64 if shape.width >= WIDE else 8) for shape in shapes]
    widths = [[*range(step, shape.width, step), shape.width] for shape, step in zip(shapes, steps, strict=True)]
    result = Room(found, shapes, widths, kept, kept / whole)
    least = result.left([options[0] for options in widths])
    if least > kept:
        what = f"one multiple of {steps[0]} neurons in each FFN takes {least:,} parameters, {least / whole:.3g} of all"
        raise FfnkitError(f"budget {budget}", what, "Give a larger budget or a smaller multiple")
    return result


def _parameters(budget: float | int, whole: int, fixed: int) -> int:
    """The neurons' parameters that a budget leaves. Raises FfnkitError where it is out of range."""
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise FfnkitError(f"budget {budget!r}", "it is no number", "Give a share such as 0.5, or a number")
    if isinstance(budget, float):
        if not 0 < budget < 1:
            do = "Give a share between 0 and 1, or a whole number of parameters"
            raise FfnkitError(f"budget {budget}", "a share must be above 0 and below 1", do)
        return int(budget * whole * (1 + 1e-12))  # 0.29 * 100 is 28.999...
    if not 0 < budget < whole + fixed:
        do = "Give fewer, or a share such as 0.5"
        raise FfnkitError(f"budget {budget:,}", f"the FFNs of these layers have {whole + fixed:,} parameters", do)
    return budget - fixed
