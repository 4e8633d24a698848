"""Attention heads and hidden neurons go together: by scores, in equal shares or as one budget of FLOPs says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn

from ffnkit.edits import Edit, SelectNeurons
from ffnkit.edits.heads import check_separable
from ffnkit.edits.slicing import check_cuttable
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, Layers, generator, largest, need_data
from ffnkit.methods.drop.heads import By, head_activity, head_scores, removal
from ffnkit.methods.drop.learnt import Learnt, of_heads, of_neurons
from ffnkit.methods.drop.units import Units, cheapest_counts, neuron_scores, uniform_counts
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns as find_ffns
from ffnkit.model.inspect import body_flops, neuron_flops, unit_flops
from ffnkit.model.targets import select
from ffnkit.plans import Draft, Progress, check_weights
from ffnkit.settings import Doc, check, renamed, told

WIDE, COARSE, FINE = 1024, 64, 8  # from how many neurons on a budget takes them by how many


@renamed(heads="remove_heads", neurons="remove_neurons")
@dataclass(frozen=True)
class StructuredPruning:
    """Remove the attention heads and the hidden neurons with the lowest scores, physically.

    Where several heads share a key and a value, whole groups go. An FFN or attention whose weights carry updates (DSEE,
    SparseGrad) loses the same rows and columns of them, and they train on.

    Source: DSEE (arXiv 2111.00160), structured pruning; Molchanov et al. (arXiv 1611.06440), section 2.2: scores are
        made comparable by each layer's own.
    Differs: a layer's scores are divided by their mean, not by their l2 norm, which depends on how many there are: a
        head and a neuron of average score cost the same a FLOP. Coefficients all start at 1, and stay as they are.
    """

    remove_heads: Annotated[
        int | float, Doc("what goes of each attention: a float is a share, an int counts; 0 leaves heads whole.")
    ] = 0.25
    remove_neurons: Annotated[
        int | float, Doc("what goes of each FFN: a float is a share, an int counts; 0 leaves neurons whole.")
    ] = 0.25
    by: Annotated[
        By,
        Doc(
            'what scores them. "weight": the sum of |W| over a head\'s rows of query and value, over a'
            ' neuron\'s rows of up and gate and its column of down; "update": of |update|, where they '
            'carry one; "both": of |W + update|; "activation": the rms of what it gives on data times'
            ' the norm of the weights behind it; "coefficients": |c|, learnt with the tuners\' setting'
            ' of that name; "random".'
        ),
    ] = "weight"
    neurons_by: Annotated[By | None, Doc("another score for neurons; none: as by.")] = None
    flops: Annotated[
        float | None,
        Doc(
            "a target, of the FLOPs a token of the body's linears (as inspect counts them, without "
            "heads, poolers and output embeddings): 0.75 leaves at most three quarters. heads and "
            "neurons say then in what proportion the two shares stand (0: that kind stays whole).",
            above=0,
            below=1,
            example=0.75,
        ),
    ] = None
    spread: Annotated[
        Literal["uniform", "budget"],
        Doc(
            '"uniform": one share for all layers; "budget": all layers share one budget, the same '
            "FLOPs as with equal shares, or flops: what goes has the least sum of scores, each "
            "relative to its own layer's."
        ),
    ] = "uniform"
    layers: Layers = "all"
    multiple: Annotated[
        int | None,
        Doc(
            "neurons that stay are a multiple of it; none: 1, and with a budget 64 (8 below 1024 neurons).", at_least=1
        ),
    ] = None
    seed: Annotated[int, Doc("of random scores.", at_least=0)] = 0

    name: ClassVar[str] = "structured"
    summary: ClassVar[str] = "remove attention heads and neurons by scores, to shares or to a budget of FLOPs"
    paper: ClassVar[str] = "arXiv 2111.00160"

    @property
    def beyond(self) -> str | None:
        """What it needs of data that statistics do not hold."""
        return "attention" if self.remove_heads and self.by == "activation" else None

    @property
    def needs_data(self) -> bool:
        """Whether activations are measured."""
        return (bool(self.remove_heads) and self.by == "activation") or (
            bool(self.remove_neurons) and self._by == "activation"
        )

    @property
    def _by(self) -> str:
        return self.by if self.neurons_by is None else self.neurons_by

    def settings(self) -> dict[str, Any]:
        return told(self)

    def check(self) -> None:
        """Raises FfnkitError on settings out of range."""
        check(self)
        for key in ("remove_heads", "remove_neurons"):
            _check_amount(key, getattr(self, key), whole=self.flops is None)
        if not self.remove_heads and not self.remove_neurons:
            raise FfnkitError("remove_heads 0 and remove_neurons 0", "nothing would go", "Give a share of one of them")

    def chosen(self, model: nn.Module) -> list[Attention | FFN]:
        """The attentions and FFNs that lose something. Raises FfnkitError where the settings do not fit the model."""
        self.check()
        found: list[Attention | FFN] = []
        if self.remove_heads:
            every = attentions(model)
            if not every:
                do = "Give remove_heads=0, or a model with attention of a known layout"
                raise FfnkitError(f"the heads of {type(model).__name__}", "no attention of it is known", do)
            for attention in select(every, self.layers):
                check_separable(attention)
                found.append(attention)
        if self.remove_neurons:
            for ffn in select(find_ffns(model), self.layers):
                check_cuttable(ffn, f"removing neurons of {ffn.name}")
                found.append(ffn)
        return found

    def learnt(self, model: nn.Module) -> list[Learnt]:
        """What the scores are read from that only a tuning leaves."""
        found, setting = self.chosen(model), "by" if self.neurons_by is None else "neurons_by"
        heads = of_heads("by", self.by, [each for each in found if isinstance(each, Attention)])
        return heads + of_neurons(setting, self._by, [each for each in found if isinstance(each, FFN)])

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        targets = self.chosen(model)
        units = self._units(model, targets, data, progress)
        before = body_flops(model)
        counts = self._counts(units, before)
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for target, each, kept in zip(targets, units, counts, strict=True):
            if kept == each.count:
                continue
            index = largest(each.scores, kept)
            quantities[each.name] = {"score lost": each.lost(kept)}
            if isinstance(target, Attention):
                edits.append(removal(target, index[0]))
            else:
                edits.append(SelectNeurons(target.name, width=kept, index=index if target.experts else index[0]))
        if not edits:
            raise FfnkitError("structured pruning", "nothing would go", "Ask for larger shares, or a smaller flops")
        gone = sum((each.count - kept) * each.flops for each, kept in zip(units, counts, strict=True))
        return Draft(tuple(edits), quantities, {"flops": {"before": before, "after": before - gone}})

    # --- scores

    def _units(
        self,
        model: nn.Module,
        targets: list[Attention | FFN],
        data: Iterable[Batch] | None,
        progress: Progress | None,
    ) -> list[Units]:
        """The scored units of every target, in order."""
        rms: dict[str, Tensor] = {}
        if self.needs_data:
            heads = [t for t in targets if isinstance(t, Attention) and self.by == "activation"]
            ffns = [t for t in targets if isinstance(t, FFN) and self._by == "activation"]
            rms = head_activity(model, need_data(data, self.name, beyond=self.beyond), heads, ffns, progress)
        found = []
        for number, target in enumerate(targets):
            draw = generator(self.seed, number)
            if isinstance(target, Attention):
                scores = head_scores(target, self.by, draw, rms)[None]
                flops, step = unit_flops(model, target), target.multiple
            else:
                check_weights(target.raw(), target.name)
                scores = neuron_scores(target, self._by, draw, rms.get(target.name))
                flops, step = neuron_flops(model, target), self._step(target.width)
            equal = (self.by if isinstance(target, Attention) else self._by) == "coefficients"
            found.append(Units(target.name, scores, flops, step, not equal, isinstance(target, FFN)))
            if progress is not None:
                progress(number + 1, len(targets), target.name)
        for kind, by in ((Attention, self.by), (FFN, self._by)):
            mine = [each for target, each in zip(targets, found, strict=True) if isinstance(target, kind)]
            if by == "update" and mine and not any(bool(each.scores.any()) for each in mine):
                what = "the updates are all zero, so they tell nothing"
                raise FfnkitError("by update", what, "Tune first, or take weight")
        return found

    def _step(self, width: int) -> int:
        if self.multiple is not None:
            return min(self.multiple, width)
        return 1 if self.spread == "uniform" else min(width, COARSE if width >= WIDE else FINE)

    # --- how many stay

    def _counts(self, units: list[Units], body: float) -> list[int]:
        """How many units of each target stay."""
        whole = sum(each.count * each.flops for each in units)
        budget = None if self.flops is None else self.flops * body - (body - whole)
        shares = self._shares(units)
        if self.spread == "uniform":
            return shares(1.0) if budget is None else uniform_counts(units, shares, budget, self._asked)
        if budget is None:
            budget = sum(kept * each.flops for kept, each in zip(shares(1.0), units, strict=True))
        return cheapest_counts(units, budget, self._asked)

    @property
    def _asked(self) -> str:
        return "a budget of equal shares" if self.flops is None else f"flops {self.flops}"

    def _shares(self, units: list[Units]) -> Callable[[float], list[int]]:
        """How many stay where this multiple of ``remove_heads`` and ``remove_neurons`` goes."""

        def left(times: float) -> list[int]:
            kept = []
            for each in units:
                amount = self.remove_neurons if each.neurons else self.remove_heads
                if isinstance(amount, float) and self.flops is not None:
                    amount = min(times * amount, 1.0)
                kept.append(each.left(amount))
            return kept

        return left


def _check_amount(key: str, value: int | float, *, whole: bool) -> None:
    """Raises FfnkitError unless a setting is a share from 0 to below 1, or with ``whole`` a count."""
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or value < 0 or (isinstance(value, float) and value >= 1):
        raise FfnkitError(f"{key} {value!r}", "no share from 0 to below 1, nor a count", f"Give {key}=0.25 or so")
    if isinstance(value, int) and value and not whole:
        found = "a count, where flops says how many go"
        raise FfnkitError(f"{key} {value}", found, f"Give {key} as a share: its proportion to the other counts")
