"""Where layers or FFNs go: gaps in the stream of hidden states, in the order in which it passes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch
from ffnkit.calibration.hooks import Activations, watch
from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name, ffns


@dataclass
class Gap:
    """What goes in one place: adjacent layers, or the FFN of one.

    Attributes:
        name: of its first FFN, for what is told. last: of its last one. layers: paths, in order.
        edits: what leaves it out.
        stays: whether the layer stays, without its FFN. behind: paths of all layers after it, in order.
        bias: path of the linear before it whose bias adds to the stream, "" where there is none.
    """

    name: str
    last: str
    stack: str
    layers: list[str]
    edits: list[Edit]
    stays: bool
    behind: list[str]
    bias: str = ""


def whole_layers(model: nn.Module, groups: Iterable[list[FFN]], edits: Callable[[list[FFN]], list[Edit]]) -> list[Gap]:
    """A gap for each run of adjacent layers that go. ``edits``: what drops the layers of these FFNs."""
    going: dict[str, list[FFN]] = {}
    for ffn in (ffn for group in groups for ffn in group):
        going.setdefault(block_name(ffn.name), []).append(ffn)
    gaps: list[Gap] = []
    every = ffns(model)
    for stack, layers in _stacks(every).items():
        open_gap: Gap | None = None
        for number, layer in enumerate(layers):
            if layer not in going:
                open_gap = None
                continue
            if open_gap is None:
                bias = _bias_of(every, layers[number - 1]) if number else ""
                open_gap = Gap(going[layer][0].name, "", stack, [], [], False, [], bias)
                gaps.append(open_gap)
            open_gap.layers.append(layer)
            open_gap.last = going[layer][-1].name
            open_gap.edits += edits(going[layer])
            open_gap.behind = layers[number + 1 :]
    return gaps


def ffns_alone(model: nn.Module, groups: Iterable[list[FFN]], edits: Callable[[FFN], list[Edit]]) -> list[Gap]:
    """A gap for each FFN that goes. ``edits``: what leaves it out."""
    gaps = []
    every = ffns(model)
    going = {ffn.name for group in groups for ffn in group}
    alone = next((name for name in going if not block_name(name)), None)
    if alone is not None:
        raise FfnkitError(f"refitting what stays without {alone}", "it lies in no layer", "Leave refit out")
    for stack, layers in _stacks(every).items():
        for number, layer in enumerate(layers):
            for ffn in every:
                if ffn.name in going and block_name(ffn.name) == layer:
                    bias = _bias_of([ffn], layer)
                    gaps.append(Gap(ffn.name, ffn.name, stack, [layer], edits(ffn), True, layers[number + 1 :], bias))
    return gaps


def _stacks(every: list[FFN]) -> dict[str, list[str]]:
    """The paths of layers by stack, in order; those that share another's FFN too."""
    stacks: dict[str, list[str]] = {}
    numbered = [(ffn.stack, block_name(owner)) for ffn in every for owner in ffn.owners]
    for stack, layer in sorted(numbered, key=lambda each: _number(each[1])):
        if layer not in stacks.setdefault(stack, []):
            stacks[stack].append(layer)
    return stacks


def _number(layer: str) -> int:
    last = layer.rpartition(".")[2]
    return int(last) if last.isdigit() else 0


def _bias_of(found: list[FFN], layer: str) -> str:
    """The path of the output layer of a layer's one FFN, if it has a bias of its own; else ""."""
    own = [ffn for ffn in found if any(block_name(owner) == layer for owner in ffn.owners)]
    if len(own) != 1 or own[0].tied or own[0].layout.experts or own[0].active < 1 or own[0].raw().down_bias is None:
        return ""
    return f"{own[0].name}.{own[0].path('down')}".strip(".")


def mean_outputs(model: nn.Module, batches: list[Batch], found: list[FFN]) -> dict[str, Tensor]:
    """The mean output (d,) of each FFN with an output bias over the tokens that count, by its name; one pass.

    Of experts in 3-D parameters (E, d), where tokens count by their squared routing weight: the best bias of each. What
    no token reached gives zeros.
    """
    biased = [ffn for ffn in found if ffn.raw().down_bias is not None]
    sums = {ffn.name: torch.zeros(max(ffn.experts, 1), ffn.d, dtype=torch.float64) for ffn in biased}
    counts = {ffn.name: torch.zeros(max(ffn.experts, 1), 1, dtype=torch.float64) for ffn in biased}

    def add(ffn: FFN, acts: Activations) -> None:
        rows, number = acts.counted(), acts.expert or 0
        weighed = rows.output if rows.weights is None else rows.output * rows.weights[:, None]
        sums[ffn.name][number] += weighed.sum(0, dtype=torch.float64).cpu()
        counts[ffn.name][number] += len(weighed) if rows.weights is None else float(rows.weights.double().sum())

    if biased:
        watch(model, batches, biased, add)
    means = {name: total / counts[name].clamp_min(1e-300) for name, total in sums.items()}
    return {ffn.name: means[ffn.name] if ffn.layout.experts else means[ffn.name][0] for ffn in biased}
