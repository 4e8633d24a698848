"""An assembled choice fitted as data-aware fusion does it: each FFN on what the choice before it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from ffnkit.budget.losses import Losses, joined, spread
from ffnkit.budget.moves import Choice
from ffnkit.calibration.blockwise import lent
from ffnkit.edits import Edit, ReplaceNeurons
from ffnkit.methods.narrow.calibrated import CalibratedFusion
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery.temporary import TemporaryPlan
from ffnkit.surgery.writer import ModelWriter

TOKENS = 4096  # to which choices are fitted that are only compared


class Refining:
    """FFNs of a choice fitted on data, beside all else that the choice does to the model.

    Args:
        losses: of the choice. method: how FFNs are fitted, whatever its width.
    """

    def __init__(self, losses: Losses, method: CalibratedFusion) -> None:
        self.losses, self.method, self.space = losses, method, losses.space
        self.readings = method.readings(self.space.model, self.space.found, losses.fitted)

    def fitted(self, choice: Choice, beside: Sequence[Edit], what: str, *, quick: bool = False) -> Losses:
        """The losses of the choice with its FFNs fitted.

        FFNs that keep their width are fitted too. Those that go, and those that others use, stay as they are.

        Args:
            beside: edits of linears that are in place too. quick: closed forms alone, on some of the tokens.
        """
        covered = {name for each in choice.joint for name in each.covers}
        found = [(ffn, choice.kept.get(ffn.name, ffn.width)) for ffn in self.space.found if ffn.name not in covered]
        method = dataclasses.replace(self.method, refine=0) if quick else self.method
        data = joined(spread(self.losses.fitted, TOKENS)) if quick else self.losses.fitted
        around = Beside(self.losses, choice, beside)
        fits = method.fits(
            self.space.model,
            found,
            data,
            lambda _, __, name: self.losses.tell(f"{name} {what}"),
            readings=self.readings,
            beside=around.placed,
            whole=True,
        )
        # the factor is no part of what a target counts: it goes into the output layer
        own: dict[str, Edit] = {
            ffn.name: ReplaceNeurons.of(ffn.name, fits[ffn.name].given().to(ffn.raw().up.dtype)) for ffn, _ in found
        }
        return self.losses.with_ffns(own)


class Beside:
    """What a choice does to a model beside its narrower FFNs, put in place for one pass after the other.

    Only references below single layers are exchanged, so that hooks elsewhere stay.

    Args:
        linears: edits of linears that are in place too.
    """

    def __init__(self, losses: Losses, choice: Choice, linears: Sequence[Edit]) -> None:
        self.model = losses.model
        self._hooked = [edit for edit in losses.edits(choice) if type(edit).silenced is not Edit.silenced]
        covered = {name for each in choice.joint if each.kind in ("ffns", "sharing") for name in each.covers}
        self._neurons = _given(losses, losses.standing(choice), covered)
        self._linears = TemporaryPlan(self.model, linears) if linears else None
        with self._replaced():
            self._writer = ModelWriter(self.model)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """The model with it while the block runs."""
        # what lends saves the owners' state, linears too: it has to give it back before those go
        with self._replaced(), ExitStack() as stack:
            for ffn, neurons in self._neurons:
                stack.enter_context(lent(self.model, ffn, neurons))
            for edit in self._hooked:
                for handle in edit.silenced(self._writer):
                    stack.callback(handle.remove)
            yield

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._linears is not None:
                stack.enter_context(self._linears)
            yield


def _given(losses: Losses, edits: Sequence[Edit], names: set[str]) -> list[tuple[FFN, Neurons]]:
    """These FFNs with the neurons that they run on under the edits; of FFNs that share, each with its own."""
    if not edits:
        return []
    with TemporaryPlan(losses.model, edits):  # what it puts into parameters is taken out again: values, not parameters
        owners = [each for ffn in ffns(losses.model) for each in ffn.apart()]
        neurons = {each.name: each.read().map(Tensor.detach) for each in owners if each.name in names}
    return [(losses.space.ffn(name), neurons[name]) for name in neurons]
