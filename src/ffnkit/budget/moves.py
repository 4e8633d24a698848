"""What may go of a model: neurons and heads by number, FFNs, attentions and layers as a whole, FFNs that are shared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ffnkit.budget.targets import Target, window
from ffnkit.edits import Edit, SetWidth, Stage, Tie
from ffnkit.edits.heads import check_separable
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.heads import left_out, removal
from ffnkit.methods.drop.layers import LayerDrop
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name, ffns
from ffnkit.model.targets import select
from ffnkit.plans import Shape
from ffnkit.settings import WhichLayers
from ffnkit.surgery.meta import skeleton
from ffnkit.surgery.writer import ModelWriter

WIDE = 1024  # FFNs from this width on get multiples of 64, others of 8
PARTS = ("neurons", "heads", "ffns", "attention", "layers", "sharing")


@dataclass(eq=False)
class Graded:
    """Neurons of an FFN, or heads of an attention: how many stay is chosen.

    Attributes:
        name: of the FFN or attention. kind: "neurons" or "heads". whole: how many there are.
        options: how many may stay, ascending, all of them last. unit: what one of them takes of the target.
        costs: the loss that is foreseen for each option; 0 for the last.
    """

    name: str
    kind: str
    whole: int
    options: list[int]
    unit: float
    costs: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Joint:
    """Something that goes as a whole: a layer, an FFN, an attention, an FFN that others stand in for.

    Attributes:
        name: of the layer, FFN or attention. kind: one of ``PARTS``. saving: of the target.
        block: the layer in which it begins. covers: the FFNs and attentions of which nothing can be chosen then.
        edits: what does it. alone: the loss where nothing else goes; infinite until it is measured.
    """

    name: str
    kind: str
    saving: float
    block: str
    covers: tuple[str, ...]
    edits: tuple[Edit, ...]
    alone: float = math.inf


@dataclass(frozen=True)
class Choice:
    """What goes: some joint moves, and how many neurons and heads stay by name (of the others all do)."""

    joint: tuple[Joint, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> Any:
        """What tells choices apart."""
        return frozenset(id(each) for each in self.joint), frozenset(self.kept.items())


class Space:
    """All that may go of a model's layers under a target. Reads no weights.

    Args:
        parts: which of ``PARTS`` compete. multiple: widths are multiples of it.

    Attributes:
        whole: what the model has of the target. limit: what may be left. graded, joints: what may go.
    """

    def __init__(
        self, model: nn.Module, target: Target, layers: WhichLayers, parts: Sequence[str], multiple: int | None = None
    ) -> None:
        self.model, self.target = model, target
        self.found = select(ffns(model), layers)
        self.whole = target.count(model)
        self.limit = target.limit(self.whole)
        self._known = attentions(model)
        self.attentions = [each for each in select(self._known, layers) if not _refused(each)] if self._known else []
        self._every = [*(ffn.name for ffn in self.found), *(each.name for each in self.attentions)]
        self._saved: dict[Any, int] = {}
        self.blocks: dict[str, list[FFN]] = {}
        for ffn in self.found:
            self.blocks.setdefault(block_name(ffn.name), []).append(ffn)
        self.graded = [each for each in self._graded(multiple) if each.kind in parts and each.unit > 0]
        self.joints = [each for each in self._joints() if each.kind in parts and each.saving > 0]

    def ffn(self, name: str) -> FFN:
        """The FFN of that name."""
        return next(ffn for ffn in self.found if ffn.name == name)

    def attention(self, name: str) -> Attention:
        """The attention of that name."""
        return next(each for each in self.attentions if each.name == name)

    # --- what may go

    def _graded(self, multiple: int | None) -> Iterable[Graded]:
        for ffn in self.found:
            step = multiple or (64 if ffn.width >= WIDE else 8)
            options = [*range(step, ffn.width, step), ffn.width]
            if len(options) > 1:
                gone = self.saving(ffn.name, "neurons", (SetWidth(ffn.name, width=options[0]),))
                yield Graded(ffn.name, "neurons", ffn.width, options, gone / (ffn.width - options[0]))
        for each in self.attentions:
            options = list(range(each.multiple, each.units + 1, each.multiple))
            if len(options) > 1:
                gone = self.saving(each.name, "heads", (removal(each, torch.arange(options[0])),))
                yield Graded(each.name, "heads", each.units, options, gone / (each.units - options[0]))

    def _joints(self) -> Iterable[Joint]:
        for ffn in self.found:
            if ffn.width > 1 and not ffn.tied:
                gone = self.saving(ffn.name, "ffns", (SetWidth(ffn.name, width=1),))
                yield Joint(ffn.name, "ffns", gone, block_name(ffn.name), (ffn.name,), ())
        for each in self.attentions:
            if each.units > each.multiple:
                edit = left_out(each)
                gone = self.saving(each.name, "attention", (edit,))
                yield Joint(each.name, "attention", gone, block_name(each.name), (each.name,), (edit,))
        for block, group in self.blocks.items():
            try:
                edits = tuple(LayerDrop(layers="all").edits(self.model, [group]))
                gone = self.saving(block, "layers", edits)
            except FfnkitError:
                continue
            # BERT's linears hang on the layer itself, which is its FFN by name
            inside = tuple(name for name in self._every if f"{name}.".startswith(f"{block}."))
            yield Joint(block, "layers", gone, block, inside, edits)

    def add(self, kind: str, name: str, covers: tuple[str, ...], edits: tuple[Edit, ...]) -> Joint:
        """A further joint move, of FFNs that share; what each of them keeps of its own counts."""
        gone = self.saving(name, f"{kind} of {len(covers)}", tuple(_ties(edits)))
        joint = Joint(name, kind, gone, block_name(name), covers, edits)
        if gone > 0:
            self.joints.append(joint)
        return joint

    def leave_out(self, attention: str) -> None:
        """An attention is no choice: its family does not bear it."""
        self.attentions = [each for each in self.attentions if each.name != attention]
        self.graded = [each for each in self.graded if each.name != attention]
        self.joints = [each for each in self.joints if each.kind != "attention" or each.name != attention]

    def most(self, *, sharing: bool = False) -> int:
        """An upper bound of what may be saved: each place by the move that saves most of it.

        Args:
            sharing: FFNs may be shared; then all of each may go.
        """
        by_block: dict[str, float] = {}
        whole = {each.name: each.saving for each in self.joints if each.kind == "layers"}
        best: dict[str, float] = {each.name: each.saving for each in self.joints if each.kind != "layers"}
        for each in self.graded:
            best[each.name] = max(best.get(each.name, 0.0), each.unit * (each.whole - each.options[0]))
        for ffn in self.found if sharing else ():
            size = ffn.raw().up.element_size() if self.target.kind == "bytes" else 1
            best[ffn.name] = max(best.get(ffn.name, 0.0), float(size * Shape.of(ffn).parameters))
        for name, saving in best.items():
            by_block[block_name(name)] = by_block.get(block_name(name), 0.0) + saving
        saved = sum(max(by_block.get(b, 0.0), whole.get(b, 0.0)) for b in {*by_block, *whole})
        return int(saved - sum(self._stays(by_block, whole)))

    def _stays(self, by_block: dict[str, float], whole: dict[str, float]) -> Iterator[float]:
        """Of each stack of which all layers may go, what one layer that has to stay keeps beyond its other moves."""
        stacks: dict[str, set[str]] = {}
        for ffn in ffns(self.model):
            stacks.setdefault(ffn.stack, set()).add(block_name(ffn.name))
        for blocks in stacks.values():
            if blocks <= {*whole}:
                yield max(min(whole[b] - by_block.get(b, 0.0) for b in blocks), 0.0)

    # --- what it saves

    def saving(self, name: str, kind: str, edits: tuple[Edit, ...]) -> int:
        """What edits of one place save of the target; counted once for all places of one structure."""
        block = block_name(name) or name
        inside = self.model.get_submodule(block).named_parameters()
        rows = tuple((path, tuple(p.shape), p.dtype) for path, p in inside)
        # layers may keep keys and values of windows of their own
        windows = tuple(window(self.model, each) for each in self._known if each.name.startswith(f"{block}."))
        key = (kind, name.removeprefix(block), windows if self.target.kind == "kv" else (), rows)
        if key not in self._saved:
            self._saved[key] = self.whole - self.count(edits)
        return self._saved[key]

    def count(self, edits: Iterable[Edit]) -> int:
        """What a model has of the target once edits without numbers are carried out."""
        twin = skeleton(self.model)
        ModelWriter(twin, empty=True).carry_out(edits)
        return self.target.count(twin)

    def shapes(self, choice: Choice) -> list[Edit]:
        """A choice as edits without numbers, in normal form."""
        edits: list[Edit] = [
            edit for each in choice.joint if each.kind in ("layers", "attention") for edit in each.edits
        ]
        for each in self.graded:
            if (kept := choice.kept.get(each.name, each.whole)) < each.whole:
                heads = each.kind == "heads"
                edits.append(
                    removal(self.attention(each.name), torch.arange(kept)) if heads else SetWidth(each.name, width=kept)
                )
        edits += [SetWidth(each.name, width=1) for each in choice.joint if each.kind == "ffns"]
        edits += [edit for each in choice.joint if each.kind == "sharing" for edit in _ties(each.edits)]
        return edits


def _ties(edits: Iterable[Edit]) -> Iterator[Edit]:
    """What changes the structure where FFNs share: what members keep of their own, and the ties without numbers."""
    for edit in edits:
        if edit.joins:
            yield Tie.blank(edit.target, list(edit.touched[1:]))
        elif edit.stage is Stage.SCALE:
            yield edit


def _refused(attention: Attention) -> bool:
    """Whether no head of an attention can go."""
    try:
        check_separable(attention)
    except FfnkitError:
        return True
    return False
