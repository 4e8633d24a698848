"""The passes over the data behind the energy of gradients: bases, choices, and what they hold of fresh gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.analysis.gradient_pictures import pooled
from ffnkit.calibration.batches import Batch
from ffnkit.calibration.gradients import weight_gradients
from ffnkit.errors import FfnkitError
from ffnkit.methods.update.sparsegrad import kind_of
from ffnkit.model.linear import features
from ffnkit.ops.bases import Grams, core_of, turned
from ffnkit.plans import Progress

KINDS = ("raw", "shared", "layer", "random", "fixed raw", "fixed shared", "fixed core", "fixed layer")
SAMPLE = 512  # rows and columns of a random basis: so many are like all of them
TINY = 1e-300

Pair = tuple[Tensor | None, Tensor | None]  # V (m, out) and U (l, in)


@dataclass(frozen=True)
class Settings:
    """What :func:`ffnkit.analysis.energy.gradient_energy` was asked for."""

    shares: tuple[float, ...]
    reach: float
    core: float
    layer_bases: bool
    memory: int
    seed: int


@dataclass
class Measured:
    """The figures of one linear; of each list the first is of the first step.

    Attributes:
        type: linears of one type share a basis. shape: (out, in).
        norm: mean sum of squares of a fresh gradient, a step.
        energy: a step: by kind the shares that so many entries hold, in the mean over fresh gradients. "raw", "shared",
            "layer" and "random": the largest of the fresh gradient itself, in that basis ("random" of a sample of it
            where a side exceeds 512). "fixed ...": those largest by summed squares in the gradients before,
            "fixed core" no more than the core has.
        beyond: by basis, the energy of fresh gradients outside of the basis's leading rows, a step: so much too low
            the shares in it can be at most.
        half: a step: by choice, the fewest entries chosen before that hold half of a fresh gradient's energy, in the
            mean; absent where none do. core: rows and columns of the core. basis: rows of V and U that were used.
        pictures: a step: the first fresh gradient by basis, pooled (``gradient_pictures``); no figure.
    """

    name: str
    type: str
    shape: tuple[int, int]
    norm: list[float] = field(default_factory=list)
    energy: list[dict[str, list[float]]] = field(default_factory=list)
    beyond: list[dict[str, float]] = field(default_factory=list)
    half: list[dict[str, int]] = field(default_factory=list)
    core: tuple[int, int] = (0, 0)
    basis: dict[str, tuple[int, int]] = field(default_factory=dict)
    pictures: list[dict[str, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON data."""
        return {name: value for name, value in asdict(replace(self, pictures=[])).items() if name != "pictures"}


@dataclass
class _Frame:
    """One basis of one linear: squares seen before, and the order of entries that they make."""

    pair: Pair
    judges: int | None = None  # gradients from this one on judge the core that the ones before choose
    seen: Tensor | None = None
    late: Tensor | None = None  # of those that judge
    count: int = 0
    order: Tensor | None = None
    within: Tensor | None = None  # entries of the core, in order

    def add(self, gradient: Tensor) -> None:
        square = turned(gradient, *self.pair).square()  # without a basis it is the gradient itself
        if self.judges is not None and self.count >= self.judges:
            self.late = square if self.late is None else self.late.add_(square)
        else:
            self.seen = square if self.seen is None else self.seen.add_(square)
        self.count += 1


def measure(
    model: nn.Module,
    linears: dict[str, nn.Module],
    batches: Sequence[Batch],
    fresh: Sequence[Batch],
    settings: Settings,
    states: Sequence[Callable[[], None]],
    progress: Progress | None = None,
) -> list[Measured]:
    """All figures; ``states`` put the model into the state after each step, the first one before anything else."""
    types = {name: f"{kind_of(name)} {features(linear)}" for name, linear in linears.items()}
    parts = _parts(linears, settings)
    rounds = len(batches) * (1 + len(parts) * (2 if settings.layer_bases else 1))
    total, done = rounds + len(fresh) * len(parts) * len(states), 0

    def told(given: Iterable[Batch], what: str) -> Iterable[Batch]:
        nonlocal done
        for batch in given:
            yield batch
            done += 1
            if progress is not None:
                progress(done, total, what)

    states[0]()
    shared = shared_bases(model, linears, types, told(batches, "bases"), settings.reach)
    draws = {shape: random_pair(*shape, settings.seed) for shape in {features(linear) for linear in linears.values()}}
    result: list[Measured] = []
    for part in parts:
        states[0]()
        frames = _frames(model, part, {name: shared[types[name]] for name in part}, batches, settings, told)
        rows = {name: Measured(name, types[name], features(linear)) for name, linear in part.items()}
        for name, row in rows.items():
            _choose(row, frames[name], settings)
        for number, state in enumerate(states):
            if number:
                state()
            _read(model, part, rows, frames, draws, told(fresh, "fresh gradients"), settings)
        result += rows.values()
    return result


def shared_bases(
    model: nn.Module, linears: dict[str, nn.Module], types: dict[str, str], batches: Iterable[Batch], reach: float
) -> dict[str, Pair]:
    """V and U of each type, from the gradients of all its linears."""
    grams: dict[str, Grams] = {}

    def receive(name: str, gradient: Tensor) -> None:
        if types[name] not in grams:
            grams[types[name]] = Grams(
                gradient.shape[0], gradient.shape[1], zeros=partial(torch.zeros, device=gradient.device)
            )
        grams[types[name]].add(gradient)

    weight_gradients(model, batches, linears, receive)
    _need(types.values(), grams)
    found: dict[str, Pair] = {}
    for kind in list(grams):
        left, right = grams.pop(kind).bases(reach)
        found[kind] = left.rows, right.rows
    return found


def random_pair(out: int, inner: int, seed: int) -> Pair:
    """Some rows of random orthonormal bases, 512 at most."""
    draw = torch.Generator().manual_seed(seed)
    rows = [
        torch.linalg.qr(torch.randn(size, min(size, SAMPLE), generator=draw, dtype=torch.float64)).Q.T
        for size in (out, inner)
    ]
    return rows[0].float(), rows[1].float()


def _need(names: Iterable[str], got: Container[str]) -> None:
    """Raises FfnkitError where one got no gradient (an expert that no token chose, say)."""
    for name in names:
        if name not in got:
            raise FfnkitError("the energy of gradients", f"{name} got no gradient on the data", "Give more batches")


def top_shares(energies: Tensor, counts: Sequence[int], total: float | None = None) -> list[float]:
    """What the ``counts`` (rising) largest entries hold, as shares of ``total``, by default of the sum of all."""
    flat = energies.flatten()
    top = torch.topk(flat, min(counts[-1], flat.numel())).values
    return _at(top, counts, float(flat.sum(dtype=torch.float64)) if total is None else total)


def _at(ordered: Tensor, counts: Sequence[int], total: float) -> list[float]:
    sums = ordered.cumsum(0, dtype=torch.float64)
    return [float(sums[min(count, len(sums)) - 1]) / max(total, TINY) for count in counts]


def _parts(linears: dict[str, nn.Module], settings: Settings) -> list[dict[str, nn.Module]]:
    """The linears in groups whose sums fit into the memory."""
    parts: list[dict[str, nn.Module]] = [{}]
    held = 0
    for name, linear in linears.items():
        out, inner = features(linear)
        # moments of a basis of its own in float64; sums of squares and the order of entries for two or three bases
        size = (
            8 * (out * out + inner * inner) * settings.layer_bases + (44 if settings.layer_bases else 32) * out * inner
        )
        if parts[-1] and held + size > settings.memory:
            parts.append({})
            held = 0
        parts[-1][name] = linear
        held += size
    return parts


def _frames(
    model: nn.Module,
    part: dict[str, nn.Module],
    shared: dict[str, Pair],
    batches: Sequence[Batch],
    settings: Settings,
    told: Callable[[Iterable[Batch], str], Iterable[Batch]],
) -> dict[str, dict[str, _Frame]]:
    """The bases of each linear with the squares that were seen in them."""
    judges = len(batches) - len(batches) // 4 if settings.core < 1 else None
    frames = {name: {"raw": _Frame((None, None)), "shared": _Frame(shared[name], judges)} for name in part}
    grams: dict[str, Grams] = {}

    def first(name: str, gradient: Tensor) -> None:
        exact = gradient.float()
        for frame in frames[name].values():
            frame.add(exact)
        if settings.layer_bases:
            if name not in grams:
                grams[name] = Grams(exact.shape[0], exact.shape[1], zeros=partial(torch.zeros, device=exact.device))
            grams[name].add(exact)

    weight_gradients(model, told(batches, "choices"), part, first)
    _need(part, {name for name, own in frames.items() if own["raw"].seen is not None})
    if settings.layer_bases:
        for name in list(grams):
            left, right = grams.pop(name).bases(settings.reach)
            frames[name]["layer"] = _Frame((left.rows, right.rows))
        weight_gradients(
            model, told(batches, "choices"), part, lambda name, gradient: frames[name]["layer"].add(gradient.float())
        )
    return frames


def _counts(row: Measured, settings: Settings) -> list[int]:
    size = row.shape[0] * row.shape[1]
    return [min(size, max(1, round(share * size))) for share in settings.shares]


def _choose(row: Measured, frames: dict[str, _Frame], settings: Settings) -> None:
    """The order of entries by what was seen, in each basis and in the core."""
    counts = _counts(row, settings)
    at = counts[min(range(len(counts)), key=lambda i: abs(settings.shares[i] - 0.01))]
    for name, frame in frames.items():
        assert frame.seen is not None
        seen = frame.seen
        whole = seen if frame.late is None else seen + frame.late
        rows, columns = seen.shape
        row.basis[name] = rows, columns
        frame.order = whole.flatten().argsort(descending=True, stable=True).to(torch.int32)
        if name == "shared":
            row.core = rows, columns
            if settings.core < 1:
                row.core = core_of(seen, min(at, seen.numel()), settings.core, *row.shape, fresh=frame.late)
            r, c = row.core
            inside = (frame.order // columns < r) & (frame.order % columns < c)
            frame.within = frame.order[inside]
        frame.seen = frame.late = None


def _read(
    model: nn.Module,
    part: dict[str, nn.Module],
    rows: dict[str, Measured],
    frames: dict[str, dict[str, _Frame]],
    draws: dict[tuple[int, int], Pair],
    fresh: Iterable[Batch],
    settings: Settings,
) -> None:
    """Add the figures of one step."""
    sums: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in rows}
    norms: dict[str, list[float]] = defaultdict(list)
    means: dict[tuple[str, str], Tensor] = {}  # by linear and basis: shares of energy, summed over gradients

    def receive(name: str, gradient: Tensor) -> None:
        row, exact = rows[name], gradient.float()
        counts = _counts(row, settings)
        total = float(exact.square().sum(dtype=torch.float64))
        if not norms[name]:
            row.pictures.append({})
        for kind, frame in frames[name].items():
            there = turned(exact, *frame.pair)
            if not norms[name]:
                row.pictures[-1][kind] = pooled(there)
            square = there.square()
            _add(sums[name], kind, top_shares(square, counts, total))
            square /= max(total, TINY)
            means[name, kind] = means[name, kind].add_(square) if (name, kind) in means else square
        norms[name].append(total)
        square = turned(exact, *draws[row.shape]).square()
        some = [max(1, round(share * square.numel())) for share in settings.shares]
        _add(sums[name], "random", top_shares(square, some))

    weight_gradients(model, fresh, part, receive)
    _need(rows, norms)
    for name, row in rows.items():
        number = len(norms[name])
        found = {kind: [value / number for value in values] for kind, values in sums[name].items()}
        beyond: dict[str, float] = {}
        half: dict[str, int] = {}
        for kind, frame in frames[name].items():
            mean = means[name, kind].flatten() / number
            beyond[kind] = max(0.0, 1 - float(mean.sum(dtype=torch.float64)))
            for label, order in ((f"fixed {kind}", frame.order), ("fixed core", frame.within)):
                if order is None:
                    continue
                ordered = mean[order.long()]
                found[label] = _at(ordered, _counts(row, settings), 1.0)
                if (count := _half(ordered)) is not None:
                    half[label] = count
        row.norm.append(sum(norms[name]) / number)
        row.energy.append({kind: found[kind] for kind in KINDS if kind in found})
        row.beyond.append(beyond)
        row.half.append(half)


def _half(ordered: Tensor) -> int | None:
    """The fewest leading entries that hold half of the energy, where they do."""
    short = int((ordered.cumsum(0, dtype=torch.float64) < 0.5).sum())
    return short + 1 if short < len(ordered) else None


def _add(sums: dict[str, list[float]], kind: str, values: list[float]) -> None:
    sums[kind] = [a + b for a, b in zip(sums[kind] or [0.0] * len(values), values, strict=True)]
