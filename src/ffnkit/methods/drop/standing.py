"""A factor for what stays where layers or FFNs went: least squares on data, folded into weights that are there.

Behind a gap arrives x where z arrived before. In a residual stream whose every reader is a norm only ratios count: x
times a stands there if all that is written behind the gap is divided by a. So no weight before the gap, and no tied
embedding, changes. Where a norm itself gives x (layers that end in their norm, and the last norm of a stream) its own
weight holds a factor for each dimension, its bias a shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, first_tensor, forward, prepared
from ffnkit.calibration.padding import TokenMasks
from ffnkit.calibration.reading import is_norm, output_metric
from ffnkit.edits import Edit, Rescale
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.gaps import Gap
from ffnkit.methods.drop.writers import halved_stream_is_the_same, norm_offset, written_behind
from ffnkit.model.finding import ffns
from ffnkit.model.running import few_rows
from ffnkit.plans import Progress
from ffnkit.surgery.temporary import TemporaryPlan, temporarily
from ffnkit.surgery.trial import try_out

LEAST = 0.05  # a smaller factor stands for nothing: what arrives has little to do with what is wanted
_DO = "Leave refit out"


@dataclass
class _Sums:
    """Sums over tokens, each by one over the square of its wanted size: (d,) float64.

    Attributes:
        dimensions: (d,) how much each counts.
    """

    dimensions: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, x: Tensor, z: Tensor) -> None:
        """What arrives and what is wanted, (n, d)."""
        root = self.dimensions.to(x.device).sqrt()
        x, z = x.double() * root, z.double() * root
        rows = 1 / z.square().sum(1, keepdim=True).clamp_min(1e-30)
        found = {"x": x * rows, "z": z * rows, "xx": x * x * rows, "xz": x * z * rows, "zz": z * z * rows}
        for name, value in found.items():
            total = value.sum(0).cpu()
            self.parts[name] = self.parts[name] + total if name in self.parts else total
        self.weight += float(rows.sum())

    def fit(self, *, each: bool, shift: bool) -> tuple[Tensor, Tensor | None, float]:
        """Factor, (1,) or with ``each`` (d,), shift (d,) or None, and the relative error that is left."""
        x, z, xx, xz, zz = (self.parts[name] for name in ("x", "z", "xx", "xz", "zz"))
        square, product = (xx - x * x / self.weight, xz - x * z / self.weight) if shift else (xx, xz)
        if not each:
            square, product = square.sum()[None], product.sum()[None]
        still = square <= 1e-9 * square.mean()  # dimensions that never move say nothing
        factor = torch.where(still, 1.0, product / torch.where(still, 1.0, square))
        moved = (z - factor * x) / self.weight if shift else torch.zeros_like(z)
        rest = zz - 2 * factor * xz - 2 * moved * z + factor.square() * xx + 2 * factor * moved * x
        rest = rest + moved.square() * self.weight
        error = (max(float(rest.sum()), 0.0) / max(float(zz.sum()), 1e-300)) ** 0.5
        root = self.dimensions.sqrt().clamp_min(1e-12)
        return factor, moved / root if shift else None, error


def stand_ins(
    model: nn.Module,
    batches: list[Batch],
    gaps: list[Gap],
    progress: Progress | None = None,
    *,
    beside: Sequence[Edit] = (),
    measure: Callable[[], float] | None = None,
) -> tuple[list[Edit], dict[str, dict[str, float]]]:
    """The edits that let what stays stand for what goes, and what was measured, by the gap's name.

    Args:
        gaps: in the order of the stream. beside: what else becomes of the model. measure: how far the model, as it is,
            has moved from what it was; a factor that does not lower it is left out.

    For each gap in turn, with those before it closed: ``sum over tokens of ||z - a x - b||^2 / ||z||^2`` is least, z
    what left the gap in the model as it is and x what arrives there now, dimensions weighed as the next norm reads
    them (``calibration.reading``). a is a number in a residual stream and one of each dimension where a norm gives x; b
    is there where a bias can hold it.

    Raises:
        FfnkitError: nothing in the model can hold the factor; it does not run without what goes.

    Source: a number: Prune&Comp (arXiv 2507.18212); one of each dimension: LinearPatch (arXiv 2505.24680), the diagonal
        part. Differs: least squares over tokens that count alike, where Prune&Comp takes the mean ratio of sizes; the
        number divides what is written later, where theirs multiplies embeddings and all that is written before.
    """
    closed: list[Edit] = []
    fixed: list[Edit] = []
    factors: dict[str, tuple[float, int]] = {}  # of what is written behind, by path: a gap's own and those before it
    told: dict[str, dict[str, float]] = {}
    few = few_rows(batches[0])
    try_out(model, [edit for gap in gaps for edit in gap.edits], few)  # else running without them may be what fails
    every = {ffn.name: ffn for ffn in ffns(model)}
    metrics = output_metric(model, [every[gap.last] for gap in gaps], batches)
    for number, gap in enumerate(gaps, 1):
        place = _place(model, few, gap)
        seen = _Seen(model, gap, place)
        dropped = [*closed, *gap.edits] if gap.stays or place.last else closed
        found = metrics[gap.last].dimensions.double()
        sums = _Sums(torch.ones_like(found) if place.norm else found)
        now = TemporaryPlan(model, [*dropped, *beside, *fixed, *_written(factors)])
        for batch in batches:
            sums.add(*seen.both(prepared(model, batch), now))
        closed += gap.edits
        more, own, told[gap.name] = _held(model, few, gap, place, sums)
        tried, changed = [*fixed, *more], factors | own
        if measure is not None:
            before, after = (
                _moved(model, [*closed, *beside, *held, *_written(by)], measure)
                for held, by in ((fixed, factors), (tried, changed))
            )
            told[gap.name] |= {"moved without it": before, "moved with it": after}
            if not after < before:
                tried, changed = fixed, factors
        fixed, factors = tried, changed
        if progress is not None:
            progress(number, len(gaps), gap.name)
    gone = tuple(f"{layer}." for gap in gaps if not gap.stays for layer in gap.layers)
    return [*fixed, *(edit for edit in _written(factors) if not edit.target.startswith(gone))], told


def _held(
    model: nn.Module, few: Batch, gap: Gap, place: _Place, sums: _Sums
) -> tuple[list[Edit], dict[str, tuple[float, int]], dict[str, float]]:
    """What holds a gap's factor: edits, factors of what is written behind, and what is told."""
    if place.norm:
        edit, told = _into_norm(model, place, sums, gap.name)
        return [edit], {}, told
    offsets = _stream(model, few, gap)
    factor, shift, error = sums.fit(each=False, shift=bool(gap.bias))
    told = {"factor": float(factor), "output error on the data": error}
    if float(factor) < LEAST:
        return [], {}, told
    moved: list[Edit] = [] if shift is None else [Rescale.of(gap.bias, torch.ones(1), shift / factor)]
    return moved, {path: (1 / float(factor), offset) for path, offset in offsets.items()}, told


def _moved(model: nn.Module, edits: list[Edit], measure: Callable[[], float]) -> float:
    with temporarily(model, edits):
        return measure()


def _written(factors: Mapping[str, tuple[float, int]]) -> list[Edit]:
    changed = {path: each for path, each in factors.items() if each[0] != 1}
    return [Rescale.of(path, torch.tensor([factor]), None, offset) for path, (factor, offset) in changed.items()]


# --- where the factor goes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where what arrives behind a gap is read, and the path of the norm that gives it, "" in a residual stream.

    Attributes:
        last: whether that norm comes behind the gap, as the last of a stream.
    """

    norm: str = ""
    last: bool = False


def _place(model: nn.Module, few: Batch, gap: Gap) -> _Place:
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in norms}
    handles = [
        norm.register_forward_hook(lambda _, args, output, name=name: calls[name].append((args, output)))
        for name, norm in norms.items()
    ]
    first, last = model.get_submodule(gap.layers[0]), model.get_submodule(gap.layers[-1])
    found: dict[str, Tensor] = {}
    handles += [
        first.register_forward_pre_hook(lambda _, args, kw: found.update(entering=_first(args, kw)), with_kwargs=True),
        last.register_forward_hook(lambda _, __, output: found.update(leaving=first_tensor(output))),
    ]
    try:
        with torch.no_grad(), evaluating(model):
            forward(model, prepared(model, few), logits=False)
    finally:
        for handle in handles:
            handle.remove()
    wanted = found["leaving" if gap.stays else "entering"]
    once = {name: seen[0] for name, seen in calls.items() if len(seen) == 1}
    given = [name for name, (_, output) in once.items() if _same(output, wanted)]
    if given:
        return _Place(given[-1])
    if not gap.behind:
        read = [name for name, (args, _) in once.items() if args and _same(args[0], found["leaving"])]
        if read:
            return _Place(read[-1], last=True)
    return _Place()


def _into_norm(model: nn.Module, place: _Place, sums: _Sums, name: str) -> tuple[Edit, dict[str, float]]:
    norm: Any = model.get_submodule(place.norm)
    factor, shift, error = sums.fit(each=True, shift=getattr(norm, "bias", None) is not None)
    offset = norm_offset(norm)
    if offset is None:
        what = f"{place.norm} gives what stays, and its weight is no factor of each dimension"
        raise FfnkitError(f"refitting what stays without {name}", what, _DO)
    told = {"mean factor": float(factor.mean()), "output error on the data": error}
    return Rescale.of(place.norm, factor, shift, offset), told


def _stream(model: nn.Module, few: Batch, gap: Gap) -> dict[str, int]:
    """What is written behind the gap, by path, and what its norms add to their weights; {} behind the last layer."""
    asked = f"refitting what stays without {gap.name}"
    for offsets in written_behind(model, few, gap.behind, asked):
        halved = [Rescale.of(path, torch.tensor([0.5]), None, offset) for path, offset in offsets.items()]
        if halved_stream_is_the_same(model, few, gap.layers[-1], halved):
            return offsets
    what = f"no weight of {type(model).__name__} can hold a factor of its stream there: not every reader is a norm"
    raise FfnkitError(asked, what, _DO)


# --- what arrives, and what is wanted -----------------------------------------------------------------------------


class _Seen:
    """What arrives behind a gap now, and what did in the model as it is, of the tokens that count."""

    def __init__(self, model: nn.Module, gap: Gap, place: _Place) -> None:
        self.model, self.gap = model, gap
        last = model.get_submodule(gap.layers[-1])
        norm = model.get_submodule(place.norm) if place.last else None
        self.wanted = norm or last
        self.arrives = norm or (last if gap.stays else model.get_submodule(gap.layers[0]))
        self.entering = norm is None and not gap.stays
        self.masks = TokenMasks(model, {gap.layers[-1]: (gap.stack, [f"{gap.layers[-1]}.ffn"])})

    @torch.no_grad()
    def both(self, batch: dict[str, Any], now: TemporaryPlan) -> tuple[Tensor, Tensor]:
        """(x, z), (n, d) each."""
        self.masks.start(batch)
        with self.masks.watching():
            z = self._run(batch, self.wanted, entering=False)
            mask = self.masks.of(self.gap.layers[-1], z, quiet=True)
        with now:
            x = self._run(batch, self.arrives, entering=self.entering)
        x, z = (value.reshape(-1, value.shape[-1]) for value in (x, z))
        return (x, z) if mask is None else (x[mask > 0], z[mask > 0])

    def _run(self, batch: dict[str, Any], module: nn.Module, *, entering: bool) -> Tensor:
        found: list[Tensor] = []
        if entering:
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs: found.append(_first(args, kwargs)), with_kwargs=True
            )
        else:
            handle = module.register_forward_hook(lambda _, __, output: found.append(first_tensor(output)))
        try:
            with evaluating(self.model):
                forward(self.model, batch, logits=False)
        finally:
            handle.remove()
        if len(found) != 1:
            what = f"it runs {len(found)} times in a pass"
            raise FfnkitError(f"refitting what stays without {self.gap.name}", what, _DO)
        return found[0]


def _first(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = next(each for each in (*args, kwargs.get("hidden_states")) if isinstance(each, Tensor))
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool(torch.equal(one, other)))
