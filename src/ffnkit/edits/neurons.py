"""Edits of an FFN's neurons: fewer of them, means of clusters, or new ones."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ffnkit.edits.base import Edit, Own, Shape, Stage, Writer
from ffnkit.edits.fields import Places, Size, Weights, held
from ffnkit.edits.slicing import check_cuttable, check_ffn_untied, keep_neurons, keep_of_experts, unmask
from ffnkit.errors import FfnkitError
from ffnkit.ops.neurons import Neurons, average, balance, cluster_sizes, concatenate


@dataclass(frozen=True, eq=False)
class NeuronEdit(Edit):
    """An edit that gives an FFN ``width`` neurons.

    Attributes:
        width: the new ff.
    """

    width: Size

    stage: ClassVar[Stage] = Stage.NEURONS
    precedence: ClassVar[int] = 3

    @property
    def new_width(self) -> int:
        return self.width

    @property
    def asked(self) -> str:
        return f"resizing {self.target} to {self.width}"

    def saved(self, shape: Shape) -> int:
        return shape.neuron_parameters * (shape.width - self.width)

    @classmethod
    def becomes(cls: type[Own], edits: Sequence[Own], name: str) -> str:
        return f"{edits[-1].new_width} neurons"

    def check(self, writer: Writer) -> None:
        check_ffn_untied(writer, writer.ffn(self.target), self.asked)

    def perform(self, writer: Writer) -> None:
        ffn = writer.ffn(self.target)
        old = ffn.raw()
        writer.resize(ffn, empty(old, self.width) if writer.empty else self.numbers(old, ffn.name))

    @abstractmethod
    def numbers(self, old: Neurons, name: str) -> Neurons:
        """The new neurons from the old ones; new tensors."""


@dataclass(frozen=True, eq=False)
class SetWidth(NeuronEdit):
    """The structure alone: so many neurons, whatever they hold. Of a config, whose weights a file brings."""

    kind: ClassVar[str] = "SetWidth"

    def numbers(self, old: Neurons, name: str) -> Neurons:
        raise FfnkitError(self.asked, "no numbers are given", "Use an edit that holds some")


@dataclass(frozen=True, eq=False)
class ClusterNeurons(NeuronEdit):
    """New neurons for one FFN: each the mean of a cluster of the old ones.

    Attributes:
        width: the new ff.
        labels: (ff,) int32 cluster of each neuron, or (E, ff) with experts; each cluster has a member.
        balance: whether gated neurons are brought to canonical scale and sign before the mean.
        root: whether up, its bias and down are multiplied by the root of the cluster's size (gated: gate is not).
    """

    labels: Places
    balance: bool = False
    root: bool = False

    kind: ClassVar[str] = "ClusterNeurons"
    formerly: ClassVar[tuple[str, ...]] = ("Resize",)

    def check_fields(self) -> str:
        if self.labels.ndim not in (1, 2) or not self.labels.numel() or int(self.labels.max()) >= self.width:
            return f"its labels are none of {self.width} clusters"
        return ""

    def check(self, writer: Writer) -> None:
        super().check(writer)
        ffn = writer.ffn(self.target)
        lead = (ffn.experts,) if ffn.experts else ()
        fits = tuple(self.labels.shape) == (*lead, ffn.width)
        if not fits or int(self.labels.min()) < 0 or int(cluster_sizes(self.labels, self.width).min()) == 0:
            raise FfnkitError(self.asked, "labels do not fit it", "Make the plan again")

    def numbers(self, old: Neurons, name: str) -> Neurons:
        """Means in float32 at least: in bf16 the small differences inside a cluster would be lost."""
        exact = torch.promote_types(old.up.dtype, torch.float32)
        lifted = old.to(exact)
        labels = self.labels.to(old.up.device).long()
        means = average(balance(lifted) if self.balance else lifted, labels, self.width)
        if not self.root:
            return means
        root = cluster_sizes(labels, self.width).to(exact).sqrt()
        bias = None if means.up_bias is None else means.up_bias * root
        return dataclasses.replace(means.scaled(root), up=means.up * root[..., None], up_bias=bias)


@dataclass(frozen=True, eq=False)
class SelectNeurons(NeuronEdit):
    """Some neurons stay, whole, and the others go; masks, and updates beside the weights, lose the same ones.

    Attributes:
        width: the new ff. index: (width,) int32 numbers of the neurons that stay, or (E, width) with experts.
    """

    index: Places

    kind: ClassVar[str] = "SelectNeurons"
    formerly: ClassVar[tuple[str, ...]] = ("Keep",)
    bears_updates: ClassVar[bool] = True

    @property
    def neurons_kept(self) -> torch.Tensor | None:
        return self.index

    def check_fields(self) -> str:
        rows = self.index.sort(-1).values
        if self.index.ndim not in (1, 2) or self.index.shape[-1] != self.width or bool((rows.diff() == 0).any()):
            return f"its numbers are not {self.width} different neurons"
        return ""

    def check(self, writer: Writer) -> None:
        super().check(writer)
        ffn = writer.ffn(self.target)
        lead = (ffn.experts,) if ffn.experts else ()
        inside = self.index.numel() == 0 or 0 <= int(self.index.min()) <= int(self.index.max()) < ffn.width
        if tuple(self.index.shape) != (*lead, self.width) or not inside:
            raise FfnkitError(self.asked, "numbers do not fit it", "Make the plan again")
        check_cuttable(ffn, f"removing neurons of {ffn.name}")

    def perform(self, writer: Writer) -> None:
        ffn, index = writer.ffn(self.target), self.index.long()
        if ffn.layout.experts:
            keep_of_experts(ffn, index)
            super().perform(writer)
        else:
            keep_neurons(writer, ffn, index)

    def numbers(self, old: Neurons, name: str) -> Neurons:
        index = self.index.to(old.up.device).long()
        if not old.experts:
            return old.take(index)
        return concatenate([old.expert(e).take(index[e]) for e in range(old.experts)])


@dataclass(frozen=True, eq=False)
class ReplaceNeurons(NeuronEdit):
    """New neurons for one FFN, given as weights (shapes as in ``ops.neurons.Neurons``)."""

    up: Weights
    down: Weights
    gate: Weights | None = None
    up_bias: Weights | None = None
    gate_bias: Weights | None = None
    down_bias: Weights | None = None

    kind: ClassVar[str] = "ReplaceNeurons"
    formerly: ClassVar[tuple[str, ...]] = ("Rewrite",)
    bears_masks: ClassVar[bool] = True

    @classmethod
    def of(cls, ffn: str, neurons: Neurons) -> ReplaceNeurons:
        """The edit that gives an FFN these neurons."""
        return cls(ffn, width=neurons.ff, **held(f"new neurons of {ffn}", **neurons.tensors()))

    def neurons(self) -> Neurons:
        """The new ones."""
        return Neurons(**dict(self.tensors()))

    def check(self, writer: Writer) -> None:
        super().check(writer)
        ffn = writer.ffn(self.target)
        wanted = {name: tuple(value.shape) for name, value in empty(ffn.raw(), self.width).tensors().items()}
        given = {name: tuple(value.shape) for name, value in self.tensors().items()}
        if wanted != given:
            odd = next(name for name in (*wanted, *given) if wanted.get(name) != given.get(name))
            what = f"its {odd} would be {given.get(odd, 'missing')} in the place of {wanted.get(odd, 'none')}"
            raise FfnkitError(self.asked, what, "Make the plan for this model")

    def perform(self, writer: Writer) -> None:
        unmask(writer, writer.ffn(self.target))  # masks are of the neurons that go
        super().perform(writer)

    def numbers(self, old: Neurons, name: str) -> Neurons:
        return self.neurons().map(torch.clone)  # a plan's tensors stay its own


def empty(neurons: Neurons, width: int) -> Neurons:
    """Neurons of another width with arbitrary values, on the same device."""

    def shape(name: str, own: torch.Size) -> tuple[int, ...]:
        if name == "down_bias":
            return tuple(own)
        return (*own[:-2], width, own[-1]) if name in ("up", "gate") else (*own[:-1], width)

    return Neurons(**{name: value.new_empty(shape(name, value.shape)) for name, value in neurons.tensors().items()})
