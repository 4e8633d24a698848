"""What moves cost a model: foreseen one by one, and measured where they are made together."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.budget.moves import Choice, Graded, Joint, Space
from ffnkit.budget.nested import Nested
from ffnkit.budget.probe import Ending
from ffnkit.calibration.batches import Batch, kept
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.reading import output_metric
from ffnkit.calibration.statistics import Statistics
from ffnkit.calibration.stored import first_batches, tokens_of
from ffnkit.edits import Edit, ReplaceNeurons
from ffnkit.methods.common import largest
from ffnkit.methods.drop.heads import head_activity, head_scores, left_out, removal
from ffnkit.methods.narrow.observed import Part, observing
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name
from ffnkit.plans import Progress
from ffnkit.surgery.temporary import TemporaryPlan
from ffnkit.surgery.writer import ModelWriter

EXPECTED = 24  # choices that are measured, as progress tells it before it is known
HELD = 4  # of so many rows one at most is held out of the fit, to measure on
FEW, MANY = 256, 1024  # tokens on which single moves, and assembled models, are compared at least
CURVES = 4096  # tokens to which FFNs are fitted at every width
NARROWED = (0.25, 0.9)  # the share at which single FFNs are tried lies between


def held_out(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Rows to fit on, and others to measure on, spread over all: one row of ``HELD``, or as many as ``MANY`` tokens
    and a tenth of all are; a lone row is both."""
    every: list[Batch] = [row for batch in kept(batches) for row in _rows(batch)]
    rows = [row for row in every if _counts(row)] or every
    picked = range(HELD - 1, len(rows), HELD) or range(len(rows) - 1, len(rows))
    most = max(MANY, sum(map(tokens_of, rows)) // 10)
    held = set(_some(picked, sum(tokens_of(rows[number]) for number in picked), most))
    measured = [row for number, row in enumerate(rows) if number in held]
    fitted = [row for number, row in enumerate(rows) if number not in held] or rows
    return joined(fitted), measured


def _counts(row: Batch) -> bool:
    """Whether any token of a row counts: padding alone is nothing to fit or to measure on."""
    mask = row.get("attention_mask")
    return not isinstance(mask, Tensor) or bool(mask.ne(0).any())


def _rows(batch: Batch) -> Iterator[dict[str, Any]]:
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    count = len(tensors[0]) if tensors and all(len(value) == len(tensors[0]) for value in tensors) else 1
    if count == 1:
        yield dict(batch)
        return
    for number in range(count):
        pick = slice(number, number + 1)
        yield {k: v[pick] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}


def joined(rows: list[Batch], most: int = 16, tokens: int = 2048) -> list[Batch]:
    """Rows of one shape in batches again, in their order: so many of them at most, with about so many tokens."""
    batches: list[Batch] = []
    held: list[Batch] = []

    def close() -> None:
        if held:
            tensors = {k: isinstance(v, Tensor) and v.ndim > 0 for k, v in held[0].items()}
            batches.append({k: torch.cat([r[k] for r in held]) if tensors[k] else v for k, v in held[0].items()})
            held.clear()

    for row in rows:
        full = len(held) == most or (len(held) + 1) * tokens_of(row) > tokens
        if held and (full or _shape(row) != _shape(held[0])):
            close()
        held.append(row)
    close()
    return batches


def _shape(row: Batch) -> Any:
    return {k: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for k, v in row.items()}


def spread(rows: list[Batch], tokens: int) -> list[Batch]:
    """Some of the rows, from all parts of them, that hold about so many tokens. Batches count as rows."""
    rows = [row for batch in rows for row in _rows(batch)]
    return [rows[number] for number in _some(range(len(rows)), sum(map(tokens_of, rows)), tokens)]


def _some(numbers: Sequence[int], size: int, tokens: int) -> list[int]:
    """Some of the numbers, from all parts of them: such that of ``size`` tokens about ``tokens`` remain."""
    count = min(len(numbers), max(1, -(-tokens * len(numbers) // max(size, 1))))
    return [numbers[number * len(numbers) // count] for number in range(count)]


def _nearest(options: Sequence[int], wanted: float) -> int:
    return min(options, key=lambda number: abs(number - wanted))


@contextmanager
def shown(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """The model gives what it gives with the edits while the block runs; names stay as they are."""
    hooked = [edit for edit in edits if type(edit).silenced is not Edit.silenced]
    rest = [edit for edit in edits if type(edit).silenced is Edit.silenced]
    with ExitStack() as stack:
        writer = ModelWriter(model)
        for edit in hooked:
            for handle in edit.silenced(writer):
                stack.callback(handle.remove)
        if rest:
            stack.enter_context(TemporaryPlan(model, rest))
        yield


class Losses:
    """Losses of a model's moves on data; the model is left as it is.

    Args:
        space: what may go. fitted, measured: batches of :func:`held_out`.

    Attributes:
        nested: the FFNs at every width, by name. own: edits of FFNs at the width of one choice, in place of those.
    """

    def __init__(
        self, space: Space, fitted: list[Batch], measured: list[Batch], progress: Progress | None = None
    ) -> None:
        self.space, self.model = space, space.model
        self.fitted, self.progress = fitted, progress
        self.few, self.many = (joined(spread(measured, tokens)) for tokens in (FEW, MANY))
        self.nested: dict[str, Nested] = {}
        self.own: dict[str, Edit] = {}
        self._metrics = output_metric(self.model, space.found, first_batches(fitted)) if space.found else {}
        self._heads: dict[str, Tensor] = {}
        self._whole: dict[int, Ending] = {}
        self._narrow: dict[tuple[str, int], Edit] = {}
        self._steps = itertools.count(1)

    # --- one by one

    @torch.no_grad()
    def foresee(self) -> None:
        """Fill in the losses of graded moves and of joint ones alone, block by block.

        Of an FFN the curve is the squared error of its outputs, to scale by what one narrowing of its block moves at
        the model's end. Of heads it is the share of what they give that goes, to scale by what leaving the attention
        out moves. Layers, FFNs and attentions are left out, one at a time.
        """
        space, graded = self.space, {each.name: each for each in self.space.graded}
        scored = [each for each in space.attentions if each.name in graded]
        rms = head_activity(self.model, self.few, scored) if scored else {}
        for each in scored:
            self._heads[each.name] = head_scores(each, "activation", torch.Generator(), rms)
        share = self._share()
        with (
            Blockwise(self.model, joined(spread(self.fitted, CURVES)), space.found) as runs,
            Blockwise(self.model, self.few, space.found) as probe,
        ):
            ending = Ending(probe, FEW)
            own = {block_name(group[0].name) for group in runs.groups}
            every = dict.fromkeys(block_name(each.name) for each in space.attentions)
            for block in every:  # those in layers without an FFN of their own, while every layer still runs
                if block not in own:
                    self._leavings(block, graded, ending)
            for group in runs.groups:
                seen = observing(group, 0)
                runs.watch(group, seen.update, last=True)
                self.nested |= {ffn.name: self._nested(ffn, seen) for ffn in group}
                block = block_name(group[0].name)
                self._narrowings([graded[ffn.name] for ffn in group if ffn.name in graded], ending, share)
                self._leavings(block, graded, ending)
                runs.advance(group)
                probe.advance(group)
                self.tell(f"losses of {block or group[0].name}")

    def _nested(self, ffn: FFN, seen: Statistics[Part]) -> Nested:
        return Nested(ffn, seen, self._metrics[ffn.name].dimensions)

    def _share(self) -> float:
        """The share of the neurons at which FFNs are tried: what the target leaves them if nothing else goes."""
        size = sum(each.unit * each.whole for each in self.space.graded if each.kind == "neurons")
        left = 1 - (self.space.whole - self.space.limit) / size if size else 0.5
        return min(max(left, NARROWED[0]), NARROWED[1])

    def _narrowings(self, group: list[Graded], ending: Ending, share: float) -> None:
        curves = {each.name: self.nested[each.name].lost for each in group}
        known = [curve for curve in curves.values() if curve is not None]
        if not known:
            for each in group:  # no token reached them: they cost nothing that is known
                each.costs = [float(each.whole - number) * 1e-12 for number in each.options]
            return
        starts = {each.name: _nearest(each.options[:-1], share * each.whole) for each in group}
        moved = ending.moved([(self.space.ffn(name), self.nested[name].neurons(n)) for name, n in starts.items()])
        errors = sum(float(curve[starts[name]]) for name, curve in curves.items() if curve is not None)
        for each in group:
            curve = curves[each.name]
            if curve is None or len(curve) != each.whole + 1:
                curve = next(
                    (other for other in known if len(other) == each.whole + 1), known[0].new_zeros(each.whole + 1)
                )
            each.costs = [float(curve[number]) * moved / max(errors, 1e-300) for number in each.options]
            each.costs[-1] = 0.0

    def _leavings(self, block: str, graded: dict[str, Graded], ending: Ending) -> None:
        """The losses of what goes as a whole, and of heads, in one block."""
        for joint in self.space.joints:
            if joint.block == block:
                joint.alone = self._alone(joint, ending)
        self._headings(block, graded, ending)

    def _alone(self, joint: Joint, ending: Ending) -> float:
        with shown(self.model, self.edits(Choice((joint,)))):
            return ending()

    def _headings(self, block: str, graded: dict[str, Graded], ending: Ending) -> None:
        alone = {each.name: each.alone for each in self.space.joints if each.kind == "attention"}
        for attention in self.space.attentions:
            each = graded.get(attention.name)
            if each is None or block_name(attention.name) != block:
                continue
            if attention.name not in alone:
                with shown(self.model, [left_out(attention)]):
                    alone[attention.name] = ending()
            squares = self._heads[attention.name].square().sort().values
            gone = torch.cat((squares.new_zeros(1), squares.cumsum(0))) / squares.sum().clamp_min(1e-300)
            each.costs = [float(gone[each.whole - number]) * alone[attention.name] for number in each.options]

    # --- together

    def edits(self, choice: Choice) -> list[Edit]:
        """A choice as edits of the model, in normal form."""
        early = [edit for each in choice.joint if each.kind in ("layers", "attention") for edit in each.edits]
        graded: list[Edit] = []
        for each in self.space.graded:
            if (kept := choice.kept.get(each.name, each.whole)) == each.whole or each.name in self.own:
                continue
            if each.kind == "heads":
                graded.append(removal(self.space.attention(each.name), self.stay(each.name, kept)))
            else:
                graded.append(self._narrowed(each.name, kept))
        graded += self.own.values()
        return [*early, *graded, *self.standing(choice)]

    def standing(self, choice: Choice) -> list[Edit]:
        """What stands for FFNs that go, and is in the place of those that share."""
        silent = [self._narrowed(each.name, 0) for each in choice.joint if each.kind == "ffns"]
        return [*silent, *(edit for each in choice.joint if each.kind == "sharing" for edit in each.edits)]

    def _narrowed(self, name: str, width: int) -> Edit:
        """The edit that narrows an FFN; large numbers lie in temporary files."""
        if (name, width) not in self._narrow:
            self._narrow[name, width] = ReplaceNeurons.of(name, self.nested[name].neurons(width))
        return self._narrow[name, width]

    def without(self, found: list[FFN]) -> dict[str, float]:
        """The loss without each of these FFNs, by name, on few tokens."""
        known = {each.name: each.alone for each in self.space.joints if each.kind == "ffns"}
        for ffn in found:
            if ffn.name not in known:
                known[ffn.name] = self._measured([self._narrowed(ffn.name, 0)], self.few, FEW)
        return {ffn.name: known[ffn.name] for ffn in found}

    def together(self, joint: tuple[Joint, ...]) -> float:
        """The loss of joint moves without others, on few tokens."""
        return self._measured(self.edits(Choice(joint)), self.few, FEW)

    def assembled(self, choice: Choice) -> float:
        """The loss of a choice."""
        return self.measured(self.edits(choice))

    def measured(self, edits: Sequence[Edit]) -> float:
        """The loss of edits; heads that go leave zeros in their places, and so do linears behind them not shrink."""
        return self._measured(edits, self.many, MANY)

    def stay(self, attention: str, kept: int) -> Tensor:
        """Numbers of the heads (or groups) that stay where so many do, int32, ascending."""
        return largest(self._heads[attention], kept)

    @torch.no_grad()
    def _measured(self, edits: Sequence[Edit], rows: list[Batch], most: int) -> float:
        if most not in self._whole:
            self._whole[most] = Ending(Blockwise(self.model, rows, self.space.found), most)
        with shown(self.model, edits):
            gap = self._whole[most]()
        self.tell("a choice measured")
        return gap

    def tell(self, what: str) -> None:
        """A step is done: of a block, or of a choice."""
        step = next(self._steps)
        if self.progress is not None:
            total = 2 * len(self.space.blocks) + EXPECTED  # how many choices there will be is not known
            self.progress(step, total if step < total else 0, what)

    # --- once more

    @torch.no_grad()
    def refitted(self, choice: Choice) -> Losses:
        """The same with FFNs fitted to what they get where the choice's layers, heads and attentions are gone."""
        fresh = self.with_ffns({})
        fresh._narrow = {}
        gone = [edit for edit in self.edits(choice) if type(edit).silenced is not Edit.silenced]
        with shown(self.model, gone), Blockwise(self.model, self.fitted, self.space.found) as runs:
            for group in runs.groups:
                seen = observing(group, 0)
                runs.watch(group, seen.update, last=True)
                fresh.nested |= {ffn.name: self._nested(ffn, seen) for ffn in group}
                runs.advance(group)
                self.tell(f"{block_name(group[0].name)} fitted again")
        return fresh

    def with_ffns(self, own: Mapping[str, Edit]) -> Losses:
        """The same with edits of FFNs of their own in the place of those at each width."""
        fresh = copy.copy(self)
        fresh.nested, fresh.own = dict(self.nested), dict(own)
        return fresh
