"""An output layer refitted behind whatever chose or made the narrow FFN's neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from torch import Tensor, nn

from ffnkit.calibration.batches import kept
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.hooks import Activations
from ffnkit.calibration.reading import Metric, output_metric
from ffnkit.calibration.stored import StatisticsFile, first_batches
from ffnkit.edits import Edit, ReplaceNeurons, Stage
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import COMPRESSED, Batch, Narrowing, lifted, need_data, singles
from ffnkit.methods.narrow.by_block import Fitted, block_by_block
from ffnkit.methods.narrow.judging import Judged, problem_of, warn_unknown
from ffnkit.methods.narrow.observed import Part, observing
from ffnkit.model.ffn import FFN, activations
from ffnkit.model.finding import ffns
from ffnkit.ops import local
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.ops.refit import Pairs, ridges_of
from ffnkit.ops.subset import outputs
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc, check
from ffnkit.surgery.temporary import TemporaryPlan

PROBE = 64  # tokens that tell which activation an FFN has


@dataclass(frozen=True)
class Refitting(Narrowing):
    """Narrowing whose output layers can be refitted to data, whatever chose or made the neurons.

    Source: of ``refit``, GRAIL (arXiv 2602.23795).
    """

    refit: Annotated[
        bool, Doc("refit the output layers to what the FFNs gave on data, by ridge regression (GRAIL).")
    ] = field(default=False, kw_only=True)
    ridge: Annotated[
        float | None,
        Doc(
            "of refit, towards the output layer as drafted, relative to the activations' mean square. None: several, "
            "mixed by what tokens say that were not fitted; 1 where those are too few.",
            at_least=0,
        ),
    ] = field(default=None, kw_only=True)
    sequential: Annotated[
        bool, Doc("refit each layer on what the compressed layers before it give, else on the model as it was.")
    ] = field(default=False, kw_only=True)

    name: ClassVar[str]
    measures: ClassVar[bool] = False  # whether drafting itself needs data
    whole: ClassVar[bool] = False  # whether neurons stay as they are or go: sums over the hidden ones then do for refit

    @property
    def needs_data(self) -> bool:
        """Whether activations are measured."""
        return self.measures or self.refit

    @property
    def beyond(self) -> str | None:
        if not self.refit:
            return None
        return COMPRESSED if self.sequential else None if self.whole else "what the new neurons give (refit=true)"

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        check(self)
        if not self.refit:
            return self.drafted(model, data, progress)
        batches = need_data(data, self.name, beyond=self.beyond)
        first, second = _halves(progress)
        if isinstance(batches, StatisticsFile):
            batches.check(model)
            return refitted_from(model, batches, self.drafted(model, data, first), self.ridge, second)
        batches = kept(batches)
        return refitted(
            model, batches, self.drafted(model, batches, first), self.ridge, second, sequential=self.sequential
        )

    def drafted(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        """The draft as the method makes it, without a refit."""
        raise NotImplementedError


def refitted(
    model: nn.Module,
    batches: Iterable[Batch],
    draft: Draft,
    ridge: float | None,
    progress: Progress | None = None,
    *,
    sequential: bool = False,
) -> Draft:
    """A draft of narrower FFNs with their output layers, and output biases, refitted to what the FFNs gave.

    Minimises ||H D^T + b - Y||_F^2 + lambda ||D - D_0||_F^2 over the tokens of the data: H what the drafted neurons
    give on the FFN's inputs, Y what the FFN gave, D_0 the drafted output layer, lambda = ridge x the mean square of H.
    b only where the FFN has an output bias. Without a ridge fits under several are mixed, by tokens held out and in the
    metric of the next norm (:class:`~ffnkit.ops.refit.Pairs`). A factor that the draft keeps apart stays apart. Experts
    that no token reached, and FFNs that keep their width, stay as drafted.

    Raises:
        FfnkitError: the draft makes new neurons, and the activation function is none that is known.

    Source: GRAIL (arXiv 2602.23795), least squares behind any selection or folding. Differs: its ridge pulls towards
        zero.
    """
    by_place: dict[str, list[Edit]] = {}
    for edit in draft.edits:
        by_place.setdefault(edit.target, []).append(edit)
    own = {edit.target: edit for edit in draft.edits if edit.stage is Stage.NEURONS}
    found = [ffn for ffn in ffns(model) if ffn.name in own and own[ffn.name].new_width != ffn.width]
    fits: dict[str, _Refit] = {}
    metrics = output_metric(model, found, first_batches(batches))
    quantities = {name: dict(values) for name, values in draft.quantities.items()}

    def show(blocks: Blockwise, group: list[FFN], last: bool) -> None:
        with TemporaryPlan(model, [edit for ffn in group for edit in by_place[ffn.name]]) as plan:
            for ffn in group:
                fits[ffn.name] = _Refit(ffn, plan.found[ffn.name], own[ffn.name].neurons_kept)
        blocks.watch(group, lambda ffn, acts: fits[ffn.name].add(acts), last=last)

    def fit(ffn: FFN) -> Fitted:
        neurons, error = fits[ffn.name].solve(ridge, metrics[ffn.name].dimensions)
        scale = fits.pop(ffn.name).scale
        stored = neurons if scale is None else neurons.scaled(1 / scale.to(neurons.down))
        dtype = ffn.raw().up.dtype
        edit = ReplaceNeurons.of(ffn.name, stored.to(dtype))
        return Fitted([edit], {"output error on the data": error}, neurons.to(dtype))

    made = block_by_block(model, batches, found, show, fit, progress, sequential=sequential)
    edits = [
        made[edit.target].edits[0] if edit.stage is Stage.NEURONS and edit.target in made else edit
        for edit in draft.edits
    ]
    for name, each in made.items():
        quantities.setdefault(name, {}).update(each.quantities)
    return Draft(tuple(edits), quantities, draft.report)


def refitted_from(
    model: nn.Module, stored: StatisticsFile, draft: Draft, ridge: float | None, progress: Progress | None = None
) -> Draft:
    """As :func:`refitted`, of a draft of which neurons stay or go, from statistics: the same to rounding."""
    known = {ffn.name: ffn for ffn in ffns(model)}
    edits, quantities = [], {name: dict(values) for name, values in draft.quantities.items()}
    narrower = [known[edit.target] for edit in draft.edits if edit.neurons_kept is not None and edit.target in known]
    metrics = output_metric(model, narrower, stored)
    for number, edit in enumerate(draft.edits, 1):
        ffn, chosen = known.get(edit.target), edit.neurons_kept
        if ffn is not None and chosen is not None and edit.new_width != ffn.width:
            old, seen = lifted(ffn.raw()), observing([ffn], 0)
            stored.fill([ffn], seen)
            each_one = singles(old)
            numbers = chosen.long().to(old.up.device).reshape(len(each_one), -1)
            fits = [
                _closed(ffn, *each, seen.parts.pop((ffn.name, e), None), ridge, metrics[ffn.name])
                for e, each in enumerate(zip(each_one, numbers, strict=True))
            ]
            neurons = concatenate([each for each, *_ in fits]) if old.experts else fits[0][0]
            errors = [error for _, error, _ in fits if error is not None]
            if not all(judged for *_, judged in fits):
                warn_unknown(ffn)
            edit = ReplaceNeurons.of(ffn.name, neurons.to(ffn.raw().up.dtype))
            quantities.setdefault(ffn.name, {})["output error on the data"] = sum(errors) / max(len(errors), 1)
        edits.append(edit)
        if progress is not None:
            progress(number, len(draft.edits), edit.target)
    return Draft(tuple(edits), quantities, draft.report)


def _closed(
    ffn: FFN, old: Neurons, chosen: Tensor, seen: Part | None, ridge: float | None, metric: Metric
) -> tuple[Neurons, float | None, bool]:
    """One FFN or expert of the neurons ``chosen``, its relative error, and whether other tokens than the fitted ones
    tell it; as they were where no token came.
    """
    if seen is None:
        return old.take(chosen), None, True
    moments = seen.moments
    gram = moments.second(last=True) if old.down_bias is None else moments.centred(last=True)
    problem = problem_of(old, seen, gram, chosen)
    judged = Judged(old, seen, activations(ffn), ffn.raw().up.dtype)
    made, down = judged.refitted(old.take(chosen), problem, ridges_of(ridge), metric.dimensions)
    error = judged.error(made, dataclasses.replace(metric, apart=None))
    if error is None:
        norm = outputs(gram, old.down)
        error = max(norm - problem.explained(down), 0.0) / max(norm, 1e-300)
    return made, error**0.5, judged.activation is not None


class _Refit:
    """One FFN's drafted neurons and what they and the FFN gave on the same tokens, expert by expert.

    Attributes:
        scale: the factor that the draft keeps apart in front of the output layer, (ff,) or (E, ff), or None.
    """

    def __init__(self, ffn: FFN, drafted: FFN, kept: Tensor | None) -> None:
        """``drafted`` is the same FFN with the draft's edits in the model."""
        self.ffn, self.kept = ffn, kept
        self.neurons = lifted(drafted.read())
        scale = drafted.scale
        self.scale = None if scale is None else scale.detach().clone()
        self.pairs: dict[int, Pairs] = {}
        self._activation: local.Activation | None = None

    def add(self, acts: Activations) -> None:
        rows = acts.counted()
        if not len(rows.input):
            return
        number = rows.expert or 0
        if number not in self.pairs:
            self.pairs[number] = Pairs(self.neurons.ff, self.neurons.d, rows.hidden.device)
        self.pairs[number].add(self._hidden(rows, number), rows.output, rows.weights)

    def _hidden(self, rows: Activations, number: int) -> Tensor:
        """What the drafted neurons give, (n, width)."""
        experts = bool(self.ffn.experts)
        if self.kept is not None:
            kept = self.kept[number] if experts else self.kept
            return rows.hidden.index_select(1, kept.long().to(rows.hidden.device))
        if self._activation is None:
            old = lifted(self.ffn.raw())
            x, hidden = (value[:PROBE].to(old.up.dtype) for value in (rows.input, rows.hidden))
            old = old.expert(number) if experts else old
            self._activation = local.activation_of(old, x, hidden, activations(self.ffn))
        if self._activation is None:
            do = "Leave refit out, or choose whole neurons (magnitude, importance)"
            raise FfnkitError(f"refitting {self.ffn.name}", "its activation is none that is known", do)
        neurons = self.neurons.expert(number) if experts else self.neurons
        return local.hidden(neurons, rows.input, self._activation)

    def solve(self, ridge: float | None, dimensions: Tensor) -> tuple[Neurons, float]:
        """The neurons, the factor in the output layer, and the relative error of the outputs, mean over experts."""
        parts, errors = [], []
        for number in range(max(self.ffn.experts, 1)):
            single = self.neurons.expert(number) if self.ffn.experts else self.neurons
            pairs = self.pairs.pop(number, None)
            if pairs is not None:
                down, bias, error = pairs.fit(single.down, single.down_bias, ridge, dimensions)
                single = dataclasses.replace(single, down=down.to(single.down.dtype), down_bias=bias)
                errors.append(error)
            parts.append(single)
        neurons = concatenate(parts) if self.ffn.experts else parts[0]
        return neurons, sum(errors) / max(len(errors), 1)


def _halves(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """Progress of drafting and of refitting, as one."""
    if progress is None:
        return None, None
    return (
        lambda done, total, name: progress(done, 2 * total, name),
        lambda done, total, name: progress(total + done, 2 * total, name),
    )
