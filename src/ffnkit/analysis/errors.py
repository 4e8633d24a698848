"""How far a compressed model's FFN outputs and hidden states are from the uncompressed one's, over many batches.

With t the tokens that count (padding left out), y the uncompressed model's values and y' the other's,

    relative error = sqrt( sum_t ||y'_t - y_t||^2 / sum_t ||y_t||^2 )

and, as what reads the FFN's output sees it (``calibration.reading``), with m_j a weight for each dimension, w_t one for
each token and c the mean of y,

    relative error, read = sqrt( sum_t w_t sum_j m_j (y'_tj - y_tj)^2 / sum_t w_t sum_j m_j (y_tj - c_j)^2 )

- *FFN output*: both FFNs get the same inputs, those that the uncompressed FFN sees in the uncompressed model. y is
  what down gives, its bias included, before the residual connection. Routed experts that share a 3-D parameter: each
  expert's tokens weigh by their squared routing weight.
- *Hidden state*: both whole models run; y is what a block (the layer that holds an FFN) gives, so errors of earlier
  layers are in it. A norm behind the last block is not.

One batch is held at a time: the inputs and outputs of its FFNs and blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.analysis.reference import Other
from ffnkit.calibration.batches import Batch, evaluating, forward, kept, prepared
from ffnkit.calibration.hooks import Activations, expert_forward, hooked
from ffnkit.calibration.padding import TokenMasks
from ffnkit.calibration.reading import Metric, output_metric
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN, activations
from ffnkit.model.finding import block_name, ffns
from ffnkit.ops.local import Activation, activation_of, active
from ffnkit.plans import Progress

PROBE = 64  # tokens and neurons that tell which activation an FFN has


@dataclass(frozen=True)
class Errors:
    """Relative errors.

    Attributes:
        output: by FFN; None where no token reached a routed FFN. read: the same, as what reads the output sees it.
        hidden: by block, in the order in which they run.
        stacks: the stack of each block, "" where there is one.
        tokens: that counted, by stack.
    """

    output: dict[str, float | None]
    read: dict[str, float | None]
    hidden: dict[str, float]
    stacks: dict[str, str]
    tokens: dict[str, int]

    @property
    def mean_output(self) -> float:
        """The mean over FFNs."""
        return _mean(self.output)

    @property
    def mean_read(self) -> float:
        """The mean over FFNs of what reads their outputs sees."""
        return _mean(self.read)

    @property
    def last_hidden(self) -> dict[str, float]:
        """The error of each stack's last block."""
        return {stack: self.hidden[name] for name, stack in self.stacks.items()}


def _mean(errors: dict[str, float | None]) -> float:
    known = [value for value in errors.values() if value is not None]
    return sum(known) / len(known) if known else math.nan


class _Read:
    """Sums of one FFN's error as what reads its output sees it."""

    def __init__(self, metric: Metric) -> None:
        self.dimensions = metric.dimensions.double()
        self.sums = torch.zeros(3, len(self.dimensions), dtype=torch.float64)  # of (y' - y)^2, y^2 and y
        self.weight = 0.0

    def add(self, actual: Tensor, expected: Tensor, weights: Tensor) -> None:
        actual, expected, weights = (each.double().cpu() for each in (actual, expected, weights))
        self.weight += float(weights.sum())
        self.sums += torch.stack(
            [weights @ each for each in ((actual - expected).square(), expected.square(), expected)]
        )

    def error(self) -> float:
        gap, squares, sums = self.sums
        spread = (squares - sums.square() / max(self.weight, 1e-300)).clamp_min(0)
        whole, lost = float(spread @ self.dimensions), float(gap @ self.dimensions)
        if whole <= 0:
            return 0.0 if lost == 0 else math.inf
        return math.sqrt(lost / whole)


@dataclass
class _Sum:
    """Squared norms of a difference and of what it is relative to."""

    gap: float = 0.0
    whole: float = 0.0

    def add(self, actual: Tensor, expected: Tensor, weights: Tensor | None) -> None:
        expected = expected.double()
        gap, whole = (actual.double() - expected).square().sum(-1), expected.square().sum(-1)
        if weights is not None:
            gap, whole = (torch.where(weights > 0, each * weights.double(), 0.0) for each in (gap, whole))
        self.gap += gap.sum().item()
        self.whole += whole.sum().item()

    def error(self) -> float:
        if self.whole == 0:
            return 0.0 if self.gap == 0 else math.inf
        return math.sqrt(self.gap / self.whole)


_State = tuple[str, Tensor, Tensor | None]  # block, its output (n, d), mask (n,)


@dataclass
class _Seen:
    """What one batch was in the uncompressed model: calls of FFNs, with how much each token counts to their readers."""

    calls: list[tuple[FFN, Activations, Tensor]] = field(default_factory=list)
    blocks: list[_State] = field(default_factory=list)


@torch.no_grad()
def measure(
    model: nn.Module, others: Sequence[Other], batches: Iterable[Batch], *, progress: Progress | None = None
) -> list[Errors]:
    """Relative errors of each one's FFN outputs and hidden states against ``model``'s; one pass of ``model`` for all.

    Args:
        model: the uncompressed model. others: plans' trials in it, or second models.
        batches: of the model's inputs; tensors are moved to its device.

    Raises:
        FfnkitError: no batches, an FFN that did not run, or one whose activation is not known.
    """
    known = ffns(model)
    found = [ffn for ffn in known if any(ffn.name in other.edited for other in others)]
    stacks = {block_name(ffn.name): ffn.stack for ffn in known if block_name(ffn.name)}
    held = kept(batches, "measuring errors")
    metrics = output_metric(model, found, held) if found else {}
    run, sums = _Runs(model, found, stacks, metrics), [_Sums(other, stacks, metrics) for other in others]
    for number, batch in enumerate(held):
        moved = prepared(model, batch)
        seen = run.watched(moved)
        for other, each in zip(others, sums, strict=True):
            with other:
                each.add(seen, run.states(other.model, moved), run.activation)
        if progress is not None:
            progress(number + 1, len(held), "errors")
    run.check()
    return [each.errors(run.ran) for each in sums]


class _Sums:
    """What is summed over batches for one of the others."""

    def __init__(self, other: Other, stacks: dict[str, str], metrics: Mapping[str, Metric]) -> None:
        self.other, self.stacks = other, stacks
        self.output = {name: _Sum() for name in other.edited}
        self.read = {name: _Read(metrics[name]) for name in other.edited if name in metrics}
        self.hidden: dict[str, _Sum] = {}
        self.tokens = dict.fromkeys(stacks.values(), 0)
        self.counted = {stack: next(n for n in stacks if stacks[n] == stack) for stack in self.tokens}

    def add(self, seen: _Seen, states: list[_State], activation: Callable[[FFN], Activation]) -> None:
        """Add a batch; the other is in place."""
        for ffn, acts, tokens in seen.calls:
            if ffn.name in self.output:
                actual = _output(self.other.found[ffn.name], acts, activation)
                self.output[ffn.name].add(actual, acts.output, acts.weights)
                self.read[ffn.name].add(actual, acts.output, tokens)
        if [name for name, *_ in states] != [name for name, *_ in seen.blocks]:
            raise FfnkitError("measuring hidden states", "the two models run other blocks", "Compare one architecture")
        for (name, expected, mask), (_, actual, _) in zip(seen.blocks, states, strict=True):
            self.hidden.setdefault(name, _Sum()).add(actual, expected, mask)
            if name == self.counted[self.stacks[name]]:
                self.tokens[self.stacks[name]] += len(expected) if mask is None else int(mask.sum())

    def errors(self, ran: set[str]) -> Errors:
        return Errors(
            output={name: each.error() if name in ran else None for name, each in self.output.items()},
            read={name: each.error() if name in ran else None for name, each in self.read.items()},
            hidden={name: each.error() for name, each in self.hidden.items()},
            stacks={name: self.stacks[name] for name in self.hidden},
            tokens=self.tokens,
        )


class _Runs:
    """Passes of the two models over single batches."""

    def __init__(
        self, model: nn.Module, found: list[FFN], stacks: dict[str, str], metrics: Mapping[str, Metric]
    ) -> None:
        self.model, self.found, self.stacks, self.metrics = model, found, stacks, metrics
        self.passed = dict.fromkeys(metrics, 0)  # tokens so far
        places = {ffn.name: (ffn.stack, list(ffn.owners)) for ffn in found}
        self.masks = TokenMasks(model, places | {block: (stack, [block]) for block, stack in stacks.items()})
        self.ran: set[str] = set()
        self._activations: dict[str, Activation | None] = {}

    def watched(self, batch: Batch) -> _Seen:
        """The uncompressed model's FFN inputs and outputs, and its blocks' outputs."""
        seen = _Seen()

        def note(ffn: FFN, acts: Activations) -> None:
            self.ran.add(ffn.name)
            kept = acts.kept()
            if not len(kept.input):  # an expert that padding alone was routed to
                return
            if ffn.name not in self._activations and not ffn.layout.experts:
                self._activations[ffn.name] = _activation(ffn, kept)
            weights = kept.weights if kept.expert is not None else None  # else a mask: what is left counts alike
            # clones: the model may go on in place; without the hidden activations, the largest part
            few = Activations(kept.input.clone(), kept.input[:, :0], kept.output.clone(), weights, kept.expert)
            seen.calls.append((ffn, few, self._tokens(ffn, few)))

        self.masks.start(batch)
        with self.masks.watching(), hooked(self.found, note, self.masks):
            seen.blocks = self.states(self.model, batch, self.masks)
        return seen

    def _tokens(self, ffn: FFN, acts: Activations) -> Tensor:
        """How much each token of the next call counts, (n,)."""
        if acts.weights is not None:
            return acts.weights
        start = self.passed[ffn.name]
        self.passed[ffn.name] = stop = start + len(acts.output)
        return self.metrics[ffn.name].tokens[start:stop]

    def states(self, model: nn.Module, batch: Batch, masks: TokenMasks | None = None) -> list[_State]:
        """The blocks' outputs in the order in which they run."""
        found: list[_State] = []
        with evaluating(model), _caught(model, self.stacks, found, masks):
            forward(model, batch, logits=False)
        return found

    def activation(self, ffn: FFN) -> Activation:
        """The FFN's activation, found when the uncompressed one ran."""
        found = self._activations.get(ffn.name)
        if found is None:
            found_text = "its activation is none that is known, so its output cannot be computed apart"
            raise FfnkitError(f"the output error of {ffn.name}", found_text, "Leave the errors out (--no-errors)")
        return found

    def check(self) -> None:
        """Raises FfnkitError where an FFN never ran though every token passes through it."""
        silent = next((ffn for ffn in self.found if ffn.name not in self.ran and ffn.active == 1), None)
        if silent is not None:
            do = "Give inputs of every stack (text, images, decoder inputs)"
            raise FfnkitError("measuring errors", f"{silent.name} did not run on the data given", do)


def _activation(ffn: FFN, acts: Activations) -> Activation | None:
    few = ffn.read().take(torch.arange(min(PROBE, ffn.width), device=acts.input.device))
    lifted = few.map(lambda value: value.detach().float())
    x, hidden = acts.input[:PROBE].float(), acts.hidden[:PROBE, : few.ff]
    return activation_of(lifted, x, hidden, activations(ffn))


def _output(ffn: FFN, acts: Activations, activation: Callable[[FFN], Activation]) -> Tensor:
    """What the FFN that is in place gives for these inputs (n, d)."""
    x = acts.input
    if acts.expert is not None:
        return expert_forward(ffn, ffn.module, acts.expert, x)[2]
    up, gate = ffn.linear("up")(x), None
    if ffn.layout.fused:
        gate, up = ffn.halves(up, -1)
    elif ffn.gated:
        gate = ffn.linear("gate")(x)
    found: Tensor = ffn.linear("down")(active(activation(ffn), up, gate))
    return found


@contextmanager
def _caught(
    model: nn.Module,
    stacks: Mapping[str, str],
    found: list[_State],
    masks: TokenMasks | None,
) -> Iterator[None]:
    """Hooks that append each block's output to ``found`` while the ``with`` block runs."""

    def hook(name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            value = _first(output)
            if value is not None:
                mask = masks.of(name, value) if masks is not None else None
                found.append((name, value.reshape(-1, value.shape[-1]).clone(), mask))

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in stacks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor | None:
    """The hidden states among what a block gives."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
