"""What a plan is made of: decisions about single FFNs, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ffnkit.errors import FfnkitError
from ffnkit.io.files import spooled
from ffnkit.ops.masks import packed, unpacked
from ffnkit.ops.neurons import Neurons


@dataclass(frozen=True, eq=False)
class Edit:
    """One decision about one FFN, as data.

    Tensors are small decisions (labels, indices) or new weights; large ones are memory-mapped (``files.spooled``).
    """

    ffn: str

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def touched(self) -> tuple[str, ...]:
        """The FFNs that it changes, by name."""
        return (self.ffn,)

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)}

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not isinstance(v, Tensor)}


@dataclass(frozen=True, eq=False)
class Resize(Edit):
    """New neurons for one FFN: each the mean of a cluster of the old ones.

    Attributes:
        width: the new ff.
        labels: (ff,) int32 cluster of each neuron, or (E, ff) with experts; each cluster has a member.
        balance: whether gated neurons are brought to canonical scale and sign before the mean.
        root: whether up, its bias and down are multiplied by the root of the cluster's size (gated: gate is not).
    """

    width: int
    labels: Tensor
    balance: bool = False
    root: bool = False


@dataclass(frozen=True, eq=False)
class Keep(Edit):
    """Some neurons stay, whole, and the others go.

    Attributes:
        width: the new ff. index: (width,) int32 numbers of the neurons that stay, or (E, width) with experts.
    """

    width: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Rewrite(Edit):
    """New neurons for one FFN, given as weights (shapes as in ``ops.neurons.Neurons``)."""

    width: int
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def of(cls, ffn: str, neurons: Neurons) -> Rewrite:
        """The edit that gives an FFN these neurons."""
        own = {name: spooled(value.detach()) for name, value in neurons.tensors().items()}
        return cls(ffn, width=neurons.ff, **own)

    def neurons(self) -> Neurons:
        return Neurons(**{name: value for name, value in self.tensors().items()})


@dataclass(frozen=True, eq=False)
class Swap(Edit):
    """A fixed factor stands in front of a linear, apart from its weight, until the model is folded.

    Attributes:
        site: "up", "gate" or "down". layer: the special linear's name, "scaled".
        scale: (in,), or (E, in) with experts: the fixed factor of the linear's inputs.
    """

    site: str
    layer: str
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Factor(Edit):
    """A linear becomes the product of two thin ones: first (r, in), second (out, r)."""

    site: str
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, ffn: str, site: str, first: Tensor, second: Tensor) -> Factor:
        """The edit that puts these two in the place of a linear."""
        return cls(ffn, site=site, first=spooled(first), second=spooled(second))


@dataclass(frozen=True, eq=False)
class Mask(Edit):
    """Weights of a linear, or of experts, become zero and stay zero.

    Attributes:
        ffn: the FFN; or, with site "", the path of a linear anywhere in the model.
        site: "up", "gate", "down", or "". shape: of the weight, (.., out, in).
        bits: uint8, the mask's bits packed row by row, the first one highest; ones stay.
    """

    site: str
    shape: list[int]
    bits: Tensor

    @classmethod
    def of(cls, ffn: str, site: str, mask: Tensor) -> Mask:
        """The edit that keeps the weights where ``mask`` (bool, as the weight lies in (.., out, in)) is true."""
        return cls(ffn, site=site, shape=list(mask.shape), bits=spooled(packed(mask)))

    @property
    def touched(self) -> tuple[str, ...]:
        return (self.ffn,) if self.site else ()  # a linear's mask changes no FFN's shape

    @property
    def kept(self) -> int:
        """How many weights stay."""
        parts = np.array_split(self.bits.numpy(), 1 + len(self.bits) // (1 << 20))
        return sum(int(np.unpackbits(part).sum()) for part in parts)  # bits past the end are zeros

    def mask(self) -> Tensor:
        """The mask, bool."""
        return unpacked(self.bits, self.shape)


@dataclass(frozen=True, eq=False)
class Tie(Edit):
    """Several FFNs become one, held once: the mean of their matched neurons, or this FFN as it is.

    Attributes:
        members: the other FFNs, by name.
        average: whether the mean of all is taken; else this FFN takes the others' place.
        orders: (members, ff) int32: neuron j of this FFN goes with neuron orders[i, j] of member i.
    """

    members: list[str]
    average: bool
    orders: Tensor

    @property
    def touched(self) -> tuple[str, ...]:
        return (self.ffn, *self.members)


@dataclass(frozen=True, eq=False)
class Drop(Edit):
    """A whole layer goes, with its attention and norms; the layers behind it move up.

    Attributes:
        layer: its path. parameters: those that go with it, other than of this FFN.
    """

    layer: str
    parameters: int


@dataclass(frozen=True, eq=False)
class Heads(Edit):
    """Attention heads go, with their rows of query, key and value and their columns of the output.

    Attributes:
        ffn: the attention's name. index: int32 numbers, ascending, of the units that stay: heads, or groups of heads
            that share a key and a value.
        heads, units: how many there are before. parameters: those that go.
    """

    index: Tensor
    heads: int
    units: int
    parameters: int

    @property
    def touched(self) -> tuple[str, ...]:
        return ()  # no FFN changes its shape

    @property
    def left(self) -> int:
        """Heads that stay."""
        return len(self.index) * self.heads // self.units


@dataclass(frozen=True, eq=False)
class Adapt(Edit):
    """A small update of a linear trains beside its frozen weight; the linear may be any of the model.

    Attributes:
        ffn: path of the linear. layer: the name of the layer that takes its place.
        given: its settings. parts: its tensors by name, of whatever names the layer has.
        fingerprint: of the weight (``nn.adapted.fingerprint``), or None.
    """

    layer: str
    given: dict[str, Any]
    parts: dict[str, Tensor]
    fingerprint: list[int] | None = None

    @property
    def touched(self) -> tuple[str, ...]:
        return ()  # no FFN changes its shape

    @property
    def trained(self) -> int:
        """How many numbers train."""
        return int(self.given["trained"])

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.parts)

    def settings(self) -> dict[str, Any]:
        own = {"ffn": self.ffn, "layer": self.layer, "given": self.given}
        return own if self.fingerprint is None else own | {"fingerprint": self.fingerprint}


@dataclass(frozen=True, eq=False)
class Train(Edit):
    """Beside adapted linears only these parts of the model train, until it is folded.

    Attributes:
        ffn: empty: it is about the whole model. parts: names of ``ffnkit.model.parts.PARTS``.
        values: what those parameters become, by name; of an adapter that was trained.
    """

    parts: list[str]
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.values)

    def settings(self) -> dict[str, Any]:
        return {"ffn": self.ffn, "parts": list(self.parts)}

    @property
    def touched(self) -> tuple[str, ...]:
        return ()


EDITS: tuple[type[Edit], ...] = (Resize, Keep, Rewrite, Swap, Factor, Mask, Tie, Drop, Heads, Adapt, Train)


def build(kind: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    """An edit from its saved parts. Raises FfnkitError for a kind that this version does not know."""
    for cls in EDITS:
        if cls.__name__ == kind and cls is Adapt:
            return Adapt(**settings, parts=tensors)
        if cls.__name__ == kind and cls is Train:
            return Train(**settings, values=tensors)
        if cls.__name__ == kind:
            names = {field.name for field in dataclasses.fields(cls)}
            if names == set(settings) | set(tensors):
                return cls(**{**settings, **tensors})
            raise FfnkitError(f"edit '{kind}'", f"fields {sorted(set(settings) | set(tensors))}", f"Expected {names}")
    known = ", ".join(cls.__name__ for cls in EDITS)
    raise FfnkitError(f"edit '{kind}'", f"this version knows {known}", "Update ffnkit or make the plan again")
