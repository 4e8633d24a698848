"""Healing after compression: distillation from the uncompressed model on text, without labels.

Source: Hinton et al. (arXiv 1503.02531) for the answers; block by block as in knowledge distillation of pruned language
models (Minitron, arXiv 2407.14679).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, kept
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted, phase
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.ops.masks import unpacked
from ffnkit.ops.products import in_float32, is_widened
from ffnkit.tasks.images.batches import tokens_each
from ffnkit.tune import zeros
from ffnkit.tune.answers import Kind, kind_of
from ffnkit.tune.distil_trains import in_eval
from ffnkit.tune.healing.loss import Blocks, whole_loss
from ffnkit.tune.healing.masters import Masters
from ffnkit.tune.healing.settings import HealSettings, no_adapters
from ffnkit.tune.kinds import Ffn, Full, Lora
from ffnkit.tune.lifecycle import undone
from ffnkit.tune.tuners import Tuner

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
WARMUP, FIRST = 0.05, 10  # share of the tokens until the rate is whole, and how many steps it takes at least
LEAST = 0.05  # of the rate, at the end
NOISE = 1e-7  # losses below are rounding of equal answers: there is nothing to gain or lose
WORSE = 1.25  # times the loss before healing: a state that has lost its way, and is not on it under a large rate


@dataclass
class Healed:
    """What a healing did.

    Attributes:
        tokens, steps, seconds: spent. block_steps: steps in which each layer learned for itself.
        learning_rate: the peak. trained: numbers that trained.
        before, after: loss by held-out text, of the compressed model and of the one that is kept.
        kept_at: tokens after which the model was as it is kept; 0: nothing gained, and the model is as it was.
        folded: adapters folded what stood apart (the factor of fusion), whether anything gained or not.
        checks: (tokens, loss by held-out text) of each measurement.
        block_loss: mean loss of the layers at the first and the last step block by block; () where there was none.
    """

    tokens: int = 0
    steps: int = 0
    block_steps: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    trained: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    kept_at: int = 0
    folded: bool = False
    checks: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    block_loss: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return dict(vars(self))

    def __str__(self) -> str:
        if not self.kept_at:
            left = "the model is as it was" + ", what stood apart folded" * self.folded
            return f"healing gained nothing on held-out text in {self.tokens:,} tokens: {left}"
        losses = ", ".join(f"{name} {self.before[name]:.4g} -> {value:.4g}" for name, value in self.after.items())
        return f"healed on {self.kept_at:,} tokens in {self.seconds:.0f} s; loss on held-out text: {losses}"


def heal(
    model: nn.Module,
    original: nn.Module,
    data: Iterable[Batch] | Sequence[tuple[Iterable[Batch], float]],
    settings: HealSettings | None = None,
    *,
    held: Mapping[str, Iterable[Batch]] | None = None,
    tokens: int | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Healed:
    """Let a compressed model, in place, learn what its original says. No labels are needed.

    First each layer learns its own outputs from what it gets in the original (``settings.blocks``), then all of them
    what the original answers: KL of words and classes, squared error of numbers, and without a head the hidden states.
    What is kept is the state with the least loss on held-out text, among those that are worse on none of it; the model
    as it was where there is none. The rate falls to almost nothing, and most of the gain comes with its fall: a state
    on the way may be worse than the first. One that is lost (``WORSE``) is left: back to the best, at half the rate.
    Zeros of masks stay zeros, shared weights stay shared. A model in bf16 or fp16 learns with float32 masters.

    Where it stops on the way, for whatever reason, the model has the best state so far, and what trained before it does
    again.

    Memory beside the model: the original, and for each number that trains 12 bytes (8 in float32), its gradient and a
    copy of the best state; the activations of a batch. On a CPU that is slow in the model's type both are in float32
    meanwhile.

    Args:
        model: compressed by a plan, with the same outputs as its original.
        original: the model before compression; unchanged. On the same device.
        data: batches for ``model(**batch)``, or several lists of them with the share of each in the tokens.
        held: batches by name that nothing is fitted to, to decide on; None: every tenth batch of the data.
        tokens: in place of ``settings.tokens``; 200_000, "200k" or "1m".
        seed: order of the batches.
        progress: called with tokens done, tokens in all, and what is done.

    Raises:
        FfnkitError: no batches, too few of them to hold one out, models that cannot be compared, nothing that trains;
            adapters (``trains="lora"``) on layers that share an FFN and keep something of their own.
    """
    settings = settings or HealSettings.model_validate({})
    if tokens is not None:
        settings = HealSettings.model_validate({**settings.model_dump(), "tokens": tokens})
    parts, decide = _parts(data, held)
    first = decide[next(iter(decide))][0]
    with in_eval(model), in_eval(original), in_float32(model, original):
        kind = kind_of(original, first)
        model = undone(model)
        rate = settings.learning_rate or rate_of(model, original, settings.trains)
        noted = zeros.note(model)
        if settings.trains == "lora":
            _check_adapters(model, noted)
        folded = settings.trains == "lora" and any(_folds(ffn) for ffn in ffns(model))
        tuner = _tuner(settings)
        tuned = tuner.prepare(model)
        try:
            run = _Run(tuned, original, settings, kind, decide, noted, rate)
            each = tokens_each(original.config) if hasattr(original, "config") else 1
            run.result.folded = folded
            with phase("healing") as step:
                run.go(_Order(parts, seed, each), progress or step)
        finally:
            tuner.finish(tuned)
            zeros.restore(model, noted)
    return run.result


def _tuner(settings: HealSettings) -> Tuner:
    if settings.trains == "lora":
        return Lora.model_validate(
            {
                **{"rank": settings.rank, "alpha": 2.0 * settings.rank, "head": False, "keep_zeros": True},
                "modules_to_train": ("norms",),
            }
        )
    return Full() if settings.trains == "all" else Ffn.model_validate({"head": False, "modules_to_train": ("norms",)})


def _folds(ffn: FFN) -> bool:
    """Whether adapters fold something of it: masks come on again, and thin pairs stay."""
    return any(row["kind"] not in (Masked.kind, LowRank.kind) for row in ffn.special.values())


def _check_adapters(model: nn.Module, noted: Mapping[str, Any]) -> None:
    apart = [ffn for ffn in ffns(model) if ffn.tied and ffn.differing]
    if apart:
        raise no_adapters(
            f"{apart[0].name} is shared by {len(apart[0].owners)} layers that keep something of their own"
        )
    if experts := next((name for name, (_, shape) in noted.items() if len(shape) == 3), None):
        what = f"weights of {experts} are zero, and adapters of experts in one parameter would fill them"
        raise FfnkitError("healing with trains=lora", what, "Set trains to ffn")


def rate_of(model: nn.Module, original: nn.Module, trains: str) -> float:
    """The peak rate: what has lost more has a longer way to go, and wide models bear smaller steps.

    0.18 sqrt(share of the FFNs' parameters that is gone) / d, with d the width of the hidden states; three times that
    for adapters. Chosen on a model of d = 64 and one of 576; where it is far too high, healing halves it.
    """
    sizes = [sum({id(p): p.numel() for ffn in ffns(m) for p in ffn.parameters()}.values()) for m in (model, original)]
    gone = min(max(1 - sizes[0] / max(sizes[1], 1), 0.05), 0.9)
    return (3.0 if trains == "lora" else 1.0) * 0.18 * gone**0.5 / max(ffn.d for ffn in ffns(original))


def memory_of(model: nn.Module, original: nn.Module, settings: HealSettings) -> int:
    """Bytes that healing takes beside the compressed model, about, without the activations of a batch."""
    held = sum(p.numel() * p.element_size() for p in original.parameters())
    held += sum(2 * p.numel() for each in (model, original) for p in each.parameters() if is_widened(p))
    if settings.trains == "lora":
        return held
    chosen = model.parameters() if settings.trains == "all" else (p for ffn in ffns(model) for p in ffn.parameters())
    each = ((p.numel(), 4 if is_widened(p) else p.element_size()) for p in {id(p): p for p in chosen}.values())
    return held + sum(count * (8 + 2 * size + (4 if size < 4 else 0)) for count, size in each)


class _Run:
    """One healing: the model, what trains in it, the best state so far."""

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        settings: HealSettings,
        kind: Kind,
        decide: dict[str, list[Batch]],
        noted: dict[str, tuple[Tensor, torch.Size]],
        rate: float,
    ) -> None:
        self.model, self.original, self.settings, self.kind, self.decide = model, original, settings, kind, decide
        self.parameters = list({id(p): p for p in model.parameters() if p.requires_grad}.values())
        if not self.parameters:
            raise FfnkitError(f"healing {type(model).__name__}", "nothing of it trains", "Set trains to all")
        places = {id(p): name for name, p in model.named_parameters()}
        kept_zero = {
            id(p): unpacked(*noted[places[id(p)]]).to(p.device) for p in self.parameters if places[id(p)] in noted
        }
        self.masters = Masters(self.parameters, kept_zero)
        self.result = Healed(learning_rate=rate, trained=sum(p.numel() for p in self.parameters))
        self.best = [p.detach().clone() for p in self.parameters]
        self.share = 1.0  # of the rate: halved where a state was lost
        self.least = 1.0  # of the mean over held-out texts of loss over loss before

    def go(self, order: _Order, progress: Progress) -> None:
        start, wanted = time.perf_counter(), self.settings.tokens
        result = self.result
        result.before = result.after = self._held()
        result.checks.append((0, result.before))
        tuned: Any = self.model
        inner = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
        blocks = Blocks(inner, self.original) if self.settings.blocks else None
        local = self.settings.blocks * wanted if blocks else 0.0
        due, waited, told = wanted / self.settings.checks, 0, []
        try:
            while result.tokens < wanted and waited < self.settings.patience:
                batch, size = order.next()
                here = result.tokens < local
                if here and blocks is not None:
                    told.append(blocks.learn(batch))
                    result.block_steps += 1
                else:
                    loss = whole_loss(self.model, self.original, batch, self.kind, self.settings.states)
                    loss.backward()
                self.masters.step(result.learning_rate * self._schedule(result.tokens / wanted))
                result.tokens += size
                result.steps += 1
                what = "layer by layer" if here else "as a whole"
                progress(min(result.tokens, wanted), wanted, what)
                if result.tokens >= due or result.tokens >= wanted:
                    due += wanted / self.settings.checks
                    if self._check():
                        waited = 0
                    else:
                        waited, self.share = waited + 1, self.share / 2
                        self.masters.back_to(self.best)
        finally:
            with torch.no_grad():
                for parameter, best in zip(self.parameters, self.best, strict=True):
                    parameter.copy_(best)
            result.seconds = time.perf_counter() - start
            result.block_loss = (told[0], told[-1]) if told else ()

    def _schedule(self, done: float) -> float:
        """The share of the rate: up to it along a line, and down along a cosine."""
        up = min(1.0, (done + 0.01) / WARMUP, (self.result.steps + 1) / FIRST)
        return self.share * up * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)

    def _check(self) -> bool:
        """Measure this state, and keep it where it is the best so far; False where it is lost."""
        found = self._held()
        self.result.checks.append((self.result.tokens, found))
        shares = [max(found[name], NOISE) / max(before, NOISE) for name, before in self.result.before.items()]
        score = sum(shares) / len(shares)
        if all(share <= 1.0 for share in shares) and score < self.least:  # what is NaN is no gain
            self.least, self.result.after, self.result.kept_at = score, found, self.result.tokens
            for best, parameter in zip(self.best, self.parameters, strict=True):
                best.copy_(parameter.detach())
        return all(share <= WORSE for share in shares)

    @torch.no_grad()
    def _held(self) -> dict[str, float]:
        """The mean loss of each held-out text."""
        return {
            name: sum(
                whole_loss(self.model, self.original, batch, self.kind).item() for batch in counted(batches, "checking")
            )
            / len(batches)
            for name, batches in self.decide.items()
        }


class _Order:
    """Batches of several texts in the order in which they are learned: each text by its share, a new draw a round."""

    def __init__(self, parts: list[tuple[list[Batch], float]], seed: int, each: int = 1) -> None:
        self.each = each  # tokens of an image
        self.parts = [(batches, share) for batches, share in parts if batches and share > 0]
        self.spent = [0.0] * len(self.parts)
        self.rounds = [self._forever(batches, seed + number) for number, (batches, _) in enumerate(self.parts)]

    def next(self) -> tuple[Batch, int]:
        """A batch, and its tokens."""
        part = min(range(len(self.parts)), key=lambda n: self.spent[n] / self.parts[n][1])
        batch = next(self.rounds[part])
        size = size_of(batch, self.each)
        self.spent[part] += size
        return batch, size

    @staticmethod
    def _forever(batches: list[Batch], seed: int) -> Iterator[Batch]:
        draw = torch.Generator().manual_seed(seed)
        while True:
            for number in torch.randperm(len(batches), generator=draw).tolist():
                yield batches[number]


def size_of(batch: Batch, each: int = 1) -> int:
    """The tokens of a batch, padding left out; ``each`` is an image's."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor):
        return int(mask.ne(0).sum())
    if isinstance(ids, Tensor):
        return ids.numel()
    return each * max(len(value) for value in batch.values() if isinstance(value, Tensor))


def _parts(
    data: Any, held: Mapping[str, Iterable[Batch]] | None
) -> tuple[list[tuple[list[Batch], float]], dict[str, list[Batch]]]:
    """Batches to learn from with their shares, and those to decide on."""
    asked = "healing data"
    data = list(data) if isinstance(data, Iterator) else data
    shared = (
        isinstance(data, Sequence) and bool(data) and all(isinstance(each, tuple) and len(each) == 2 for each in data)
    )
    parts = [(kept(batches, asked), float(share)) for batches, share in data] if shared else [(kept(data, asked), 1.0)]
    if held is not None:
        found = {name: kept(batches, asked) for name, batches in held.items()}
        if found:
            return parts, found
    if min(len(batches) for batches, _ in parts) < 2:
        raise FfnkitError(asked, "there are too few batches to keep one apart", "Give two or more, or held={...}")
    apart = {f"part {number}" if len(parts) > 1 else "held": b[::10] for number, (b, _) in enumerate(parts)}
    return [([x for n, x in enumerate(batches) if n % 10], share) for batches, share in parts], apart
