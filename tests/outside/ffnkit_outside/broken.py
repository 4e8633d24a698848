"""Ten things that are wrong, each in its own way, and the check that is meant to catch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.edits import Edit, LinearEdit, NeuronEdit, SelectNeurons, Stage
from ffnkit.edits.base import Writer
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.ops.neurons import Neurons
from ffnkit.plans import Draft

from . import MAKERS, Each, Gained, Halve

HALF = torch.tensor(0.5)


def _gain(layer_class: type[ReparametrizedLinear], name: str) -> type[LinearEdit]:
    """A kind of edit with this layer."""

    @dataclass(frozen=True, eq=False)
    class Gain(LinearEdit):
        gain: Tensor

        kind: ClassVar[str] = f"outside:{name}"
        layer: ClassVar[type[ReparametrizedLinear] | None] = layer_class
        stage: ClassVar[Stage] = Stage.SCALE

        @classmethod
        def blank(cls, ffn: FFN, site: str, row: dict[str, Any]) -> Any:
            return cls(ffn.name, site, ffn.oriented(site).new_empty(()))

        @classmethod
        def becomes(cls, edits: Any, name: str) -> str:
            return "with a gain"

        def pieces(self) -> tuple[Tensor, ...]:
            return (self.gain,)

    return Gain


class Transposed(Gained):
    kind = "outside-transposed"

    def folded(self) -> nn.Parameter:
        return nn.Parameter((self.weight * self.gain).detach().T.contiguous().view(self.weight.shape))


class Biasless(Gained):
    kind = "outside-biasless"

    def fold(self, weight: nn.Parameter | None = None) -> Any:
        plain = super().fold(weight)
        plain.bias = nn.Parameter(torch.zeros_like(plain.bias))
        return plain


class Unscaled(Gained):
    kind = "outside-unscaled"

    def folded(self) -> nn.Parameter:
        return self.weight


TransposedGain, BiaslessGain, UnscaledGain = (
    _gain(layer, layer.__name__) for layer in (Transposed, Biasless, Unscaled)
)


@dataclass(frozen=True, eq=False)
class InPlace(NeuronEdit):
    """Writes into the weights that are there."""

    kind: ClassVar[str] = "outside:InPlace"

    def numbers(self, old: Neurons, name: str) -> Neurons:
        old.up.data.mul_(0.5)
        return old.take(torch.arange(self.width))


@dataclass(frozen=True, eq=False)
class FirstOwner(Edit):
    """Reaches the first of the places that share a bias."""

    kind: ClassVar[str] = "outside:FirstOwner"
    stage: ClassVar[Stage] = Stage.NEURONS

    def perform(self, writer: Writer) -> None:
        linear: Any = writer.ffn(self.target).linear("down")
        linear.bias = nn.Parameter(linear.bias.detach() * 0.5)


@dataclass(frozen=True, eq=False)
class SilentDrop(Edit):
    """Takes the last layer out and tells nobody."""

    kind: ClassVar[str] = "outside:SilentDrop"
    stage: ClassVar[Stage] = Stage.LAYERS
    renumbers: ClassVar[bool] = True

    @property
    def touched(self) -> tuple[str, ...]:
        return ()

    @property
    def saved_elsewhere(self) -> int:
        return 348  # as many as there are, so that only the config is wrong

    @classmethod
    def lines(cls, edits: Any, quantities: Any) -> list[str]:
        return [f"  a layer goes, with {edit.target}" for edit in edits]

    def perform(self, writer: Writer) -> None:
        layers = writer.model.layers
        del layers[len(layers) - 1]


@dataclass(frozen=True, eq=False)
class NeedsNumbers(NeuronEdit):
    """Decides by the weights while it is carried out."""

    kind: ClassVar[str] = "outside:NeedsNumbers"

    def perform(self, writer: Writer) -> None:
        ffn = writer.ffn(self.target)
        if float(ffn.raw().up.sum()) < 1e9:
            writer.resize(ffn, ffn.raw().take(torch.arange(self.width)))

    def numbers(self, old: Neurons, name: str) -> Neurons:
        return old


EDITS = [TransposedGain, BiaslessGain, UnscaledGain, InPlace, FirstOwner, SilentDrop, NeedsNumbers]


class Writes(Halve):
    """A plan that writes."""

    def draft(self, model: nn.Module, data: Any, progress: Any) -> Draft:
        next(model.parameters()).data.add_(1e-3)
        return super().draft(model, data, progress)


class Random(Halve):
    """A plan that is another one every time."""

    def draft(self, model: nn.Module, data: Any, progress: Any) -> Draft:
        edits = [
            SelectNeurons(f.name, width=2, index=torch.randperm(f.width)[:2].sort().values.int()) for f in ffns(model)
        ]
        return Draft(tuple(edits))


@dataclass(frozen=True)
class Forgetful(Halve):
    """Its settings are not all that it was made with."""

    by: str = "down"

    def settings(self) -> dict[str, Any]:
        return {} if self.by == "down" else {"by": "down"}


MAKERS.update(
    transposed=lambda ffn: TransposedGain(ffn.name, "up", HALF),
    biasless=lambda ffn: BiaslessGain(ffn.name, "up", HALF),
    unscaled=lambda ffn: UnscaledGain(ffn.name, "up", HALF),
    in_place=lambda ffn: InPlace(ffn.name, width=4),
    first_owner=lambda ffn: FirstOwner(ffn.name),
    silent_drop=lambda ffn: SilentDrop(ffn.name),
    needs_numbers=lambda ffn: NeedsNumbers(ffn.name, width=4),
)
METHODS: dict[str, tuple[Any, str]] = {
    "a transposed weight": (lambda: Each("transposed"), "fold keeps outputs"),
    "a fold that drops the bias": (lambda: Each("biasless"), "fold keeps outputs"),
    "a scale forgotten": (lambda: Each("unscaled"), "fold keeps outputs"),
    "an edit that writes in place": (lambda: Each("in_place"), "numbers are new tensors"),
    "a tie missed": (lambda: Each("first_owner"), "ties stay ties"),
    "a config key forgotten": (lambda: Each("silent_drop", last=True), "the config says what there is"),
    "a structure that hangs on numbers": (
        lambda: Each("needs_numbers"),
        "planning",  # which rehearses
    ),
    "a plan that writes": (Writes, "planning writes nothing"),
    "a plan of chance": (Random, "plans are deterministic"),
    "settings forgotten": (lambda: Forgetful(by="up"), "settings round-trip"),
}
