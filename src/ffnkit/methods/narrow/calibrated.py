"""Data-aware fusion: the neurons that the output needs, an output layer fitted to them, on a few thousand tokens."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import kept
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.fisher import fisher
from ffnkit.calibration.hooks import Activations
from ffnkit.calibration.reading import Metric, output_metric
from ffnkit.calibration.statistics import HeldInputs, HiddenMoments, Statistics
from ffnkit.calibration.stored import StatisticsFile, first_batches
from ffnkit.calibration.streams import Streams
from ffnkit.edits import Edit, ReplaceNeurons, ScaleInputs
from ffnkit.methods.common import Batch, Narrowing, generator, lifted, need_data, norms
from ffnkit.methods.expecting import Work, fused
from ffnkit.methods.narrow.by_block import Fitted, block_by_block
from ffnkit.model.ffn import FFN, activations
from ffnkit.ops import local
from ffnkit.ops.moments import Moments
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.ops.subset import choose, outputs, ranked, refit, weighed
from ffnkit.plans import Draft, Progress, check_weights
from ffnkit.settings import Doc
from ffnkit.settings.presets import Preset, with_presets

logger = logging.getLogger(__name__)

RIDGE = 1e-2  # of the selection, relative to the mean square of the activations
# Of the neurons that stay, those chosen by the loss without each. Leverage carries over to text of another kind, but
# keeps nothing for the few outputs that a model may stand on; some neurons by their loss keep those.
BY_LOSS = {"loss": 1.0, "balanced": 0.5, "leverage": 0.0}
COMPRESSED = "what each layer gets once those before it are compressed (sequential=true)"
ROWS = 1024  # tokens that pass through an FFN at a time
JUDGED = 2048  # tokens at most that are held out to judge a fit


@with_presets
@dataclass(frozen=True)
class CalibratedFusion(Narrowing):
    """Narrow each FFN so that its output on data stays: choose neurons, refit the output layer, then all of it.

    On the tokens of the data, with H the hidden activations and W the output layer:
    1. neurons S are chosen (``select``): unless told otherwise half of them by how much the error of H_S D^T, in the
       ``metric`` of what comes behind, grows with the best D where one of them alone goes, the rest by leverage;
    2. D (and the output bias) is refitted in closed form by ridge regression, so that what the dropped neurons did
       is taken over by the kept ones as far as it can be: they are fused into them. The ridge pulls towards the old
       columns, not towards zero. With ``sequential``, H is what the compressed layers before give, and the target is
       what the *block* gave in the model as it was: the FFN makes up for what was lost before it;
    3. ``refine`` steps of regression fit the remaining weights too, kept only where held-out tokens gain;
    4. a fixed factor p = sum_i |h_i| / sum_S |h_i| stands in front of D, apart from it (D / p is stored), so that
       under Adam the narrow output layer moves the output as far as the wide one did (its NTK).

    Source: ours. Leverage: MoDeGPT (arXiv 2408.09632); the greedy selection is simultaneous orthogonal matching pursuit
        (Tropp et al. 2006); least-squares correction after pruning: Frantar and Alistarh, OBC (arXiv 2208.11580), GRAIL
        (arXiv 2602.23795); Fisher information as the metric (arXiv 1801.05787); inputs of the compressed model and
        targets of the original one: GPTAQ, asymmetric calibration (arXiv 2504.02692); the kernel that p keeps: MLP
        Fusion (arXiv 2307.08941).
    """

    sequential: Annotated[
        bool | None,
        Doc(
            "fit each layer to what its block gave in the model as it was, from what the compressed layers before it "
            "give; else each to its own outputs. None: where the data themselves are given, not statistics of them."
        ),
    ] = None
    refine: Annotated[
        int, Doc("regression steps; 0 leaves the chosen neurons' own weights as they are.", at_least=0)
    ] = 100
    metric: Annotated[
        Literal["fisher", "norm"],
        Doc(
            'what errors of the outputs count by in the choice: "fisher", what they do to the answers of the model, '
            'or "norm", what they do to what the next norm gives.'
        ),
    ] = "fisher"
    select: Annotated[
        Literal["balanced", "loss", "leverage", "greedy"],
        Doc(
            'which neurons stay: by the "loss" without each of them, by "leverage" (what the others cannot give), '
            '"balanced" (half by loss, the rest by leverage), or "greedy", one after the other.'
        ),
    ] = "balanced"
    ridge: Annotated[
        float,
        Doc("of the refit, towards the old columns, relative to the mean square of the activations.", at_least=0),
    ] = 0.1
    tokens: Annotated[
        int, Doc("most tokens a layer that are held for the regression; the statistics use all.", at_least=1)
    ] = 16384
    seed: Annotated[int, Doc("of the regression's batches.", at_least=0)] = 0
    effort: Annotated[
        Literal["fast", "default", "best"],
        Doc(
            'values for what is not given: "fast" takes a third of the time, "best" three times as long (compress then '
            "decides ridge and steps on held-out text)."
        ),
    ] = "default"

    chooses_preset: ClassVar[str] = "effort"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fast": Preset(
            "closed forms alone, each layer on its own", {"sequential": False, "metric": "norm", "refine": 0}
        ),
        "best": Preset("long regressions", {"refine": 500}),
    }
    name: ClassVar[str] = "calibrated-fusion"
    summary: ClassVar[str] = "keep the neurons that data need and refit the output layer: data-aware fusion"
    paper: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True

    def work(self, ffn: FFN, width: int, tokens: int) -> Work:
        """About what one FFN takes."""
        return fused(ffn, width, tokens, greedy=self.select == "greedy", refine=self.refine, kept=self.tokens)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        found = self.chosen(model)
        batches = need_data(data, self.name, beyond=COMPRESSED if self.sequential else None)
        stored = isinstance(batches, StatisticsFile)
        batches = batches if stored else kept(batches)
        sequential = not stored if self.sequential is None else self.sequential
        widths = {ffn.name: width for ffn, width in found}
        for ffn, _ in found:
            ffn.check_plain(f"calibrating {ffn.name}")
            check_weights(ffn.raw(), ffn.name)
        narrow = [ffn for ffn, _ in found]
        seen = observing(narrow, self.tokens if self.refine else 0)
        few = batches if stored else first_batches(batches)
        metrics = output_metric(model, narrow, few, seed=self.seed)
        weights = {name: metric.dimensions for name, metric in metrics.items()}
        if self.metric == "fisher":
            weights |= fisher(model, narrow, few, seed=self.seed)
        streams = Streams(model, batches, narrow) if sequential and narrow else None

        def show(blocks: Blockwise, group: list[FFN], last: bool) -> None:
            if streams is not None:
                streams.see(blocks, group, seen)
            else:
                blocks.see(group, seen, last=last)

        def fit(ffn: FFN) -> Fitted:
            reading = Reading(weights[ffn.name], metrics[ffn.name])
            neurons, factor, error = self._narrow(ffn, seen, widths[ffn.name], reading)
            rewrite = ReplaceNeurons.of(ffn.name, neurons)
            edits: list[Edit] = [rewrite]
            if widths[ffn.name] < ffn.width:
                edits.append(ScaleInputs(ffn.name, site="down", scale=factor))
            return Fitted(edits, {"output error on the data": error}, rewrite.neurons().scaled(factor))

        beside = () if streams is None else (streams.before,)
        done = block_by_block(model, batches, narrow, show, fit, progress, sequential=sequential, beside=beside)
        edits = tuple(edit for ffn, _ in found for edit in done[ffn.name].edits)
        return Draft(edits, {name: each.quantities for name, each in done.items()})

    def _narrow(self, ffn: FFN, seen: Statistics[Part], width: int, reading: Reading) -> tuple[Neurons, Tensor, float]:
        """New neurons (factor divided out of down), the factor (width,) or (E, width), the relative output error."""
        old = lifted(ffn.raw())
        parts = []
        for number in range(max(old.experts, 1)):
            single = old.expert(number) if old.experts else old
            parts.append(self._fit(ffn, single, seen.parts.pop((ffn.name, number), None), width, number, reading))
        made = concatenate([p[0] for p in parts]) if old.experts else parts[0][0]
        factor = torch.stack([p[1] for p in parts]) if old.experts else parts[0][1]
        weight = [p[3] for p in parts]
        error = sum(p[2] * w for p, w in zip(parts, weight, strict=True)) / max(sum(weight), 1e-300)
        dtype = ffn.raw().up.dtype
        return made.to(dtype), factor, error**0.5

    def _fit(
        self, ffn: FFN, old: Neurons, seen: Part | None, width: int, number: int, reading: Reading | None = None
    ) -> tuple[Neurons, Tensor, float, float]:
        """One FFN or expert: neurons, factor, squared relative error held out, squared norm of outputs.

        Args:
            reading: what errors count by; None: all alike.
        """
        if width == old.ff:
            return old, old.up.new_ones(width), 0.0, 0.0
        if seen is None:  # an expert that no token reached: nothing is known but its weights
            kept = torch.sort(norms(old), descending=True, stable=True).indices[:width].sort().values
            return old.take(kept), old.up.new_ones(width), 0.0, 0.0
        moments = seen.moments
        gram = moments.centred(last=True) if old.down_bias is not None else moments.second(last=True)
        metric = reading.metric if reading is not None else None
        read = old.down if reading is None else weighed(old.down, reading.weights)
        if self.select == "greedy":
            kept = choose(gram, read, width, RIDGE).order.sort().values.to(gram.device)
        else:
            kept = ranked(gram, RIDGE, read, BY_LOSS[self.select])[:width].sort().values
        centred = old.down_bias is not None
        down, explained = refit(gram, old.down, kept, self.ridge, seen.missing(centred=centred))
        norm = outputs(gram, old.down)
        del gram
        moments.forget()
        error = max(norm - explained, 0.0) / max(norm, 1e-300)
        fresh = dataclasses.replace(old.take(kept), down=down.to(old.down.dtype))
        if old.down_bias is not None:
            lost = old.down.double() @ moments.mean() - down @ moments.mean()[kept] + seen.beyond.mean()
            fresh = dataclasses.replace(fresh, down_bias=(old.down_bias.double() + lost).to(old.down_bias.dtype))
        x, hidden = seen.held.probe
        activation = local.activation_of(old, x, hidden, activations(ffn))
        products = ffn.raw().up.dtype
        if activation is None:
            logger.warning("%s is not refined, its error is of fitted tokens: its activation is not known", ffn.name)
        elif self.refine and seen.held.inputs:
            dimensions = None if metric is None else metric.dimensions.to(x.device)
            fresh = self._refined(old, fresh, seen.held, activation, products, number, dimensions)
        if activation is not None and seen.apart.inputs:
            error = held_out(old, fresh, seen.apart, activation, products, metric)
        size = moments.absolute()
        factor = (size.sum() / size[kept].sum().clamp_min(1e-30)).clamp_min(1.0).float().item()
        scale = old.up.new_full((width,), factor)
        return dataclasses.replace(fresh, down=fresh.down / factor), scale, error, norm

    def _refined(
        self,
        old: Neurons,
        start: Neurons,
        seen: HeldInputs,
        activation: local.Activation,
        products: torch.dtype,
        number: int,
        dimensions: Tensor | None,
    ) -> Neurons:
        """``start`` after the regression, where that helps."""
        x, target = torch.cat(seen.inputs), wanted(old, seen, activation, products)
        weights = torch.cat(seen.weights) if seen.weights else None
        seen.inputs.clear()
        return local.regress(
            start,
            x,
            target,
            activation,
            steps=self.refine,
            generator=generator(self.seed, number),
            weights=weights,
            dimensions=dimensions,
            products=products,
        )


@dataclass(frozen=True)
class Reading:
    """What errors of an FFN's outputs count by: ``weights``, (d,) or (d, d), in the choice, ``metric`` in the rest."""

    weights: Tensor
    metric: Metric


def wide(neurons: Neurons, x: Tensor, activation: local.Activation, products: torch.dtype) -> Tensor:
    """The outputs (n, d), float32, for inputs x (n, d), some rows at a time."""
    with torch.no_grad(), local.multiplying(x.device, products):
        return torch.cat([local.forward(neurons, rows, activation).float() for rows in x.split(ROWS)])


def wanted(old: Neurons, seen: HeldInputs, activation: local.Activation, products: torch.dtype) -> Tensor:
    """What an FFN is to give (n, d) for the inputs that are held: what it gave, and what is missing beyond it."""
    outputs = wide(old, torch.cat(seen.inputs), activation, products)
    return outputs + torch.cat(seen.missing) if seen.missing else outputs


def held_out(
    old: Neurons,
    new: Neurons,
    seen: HeldInputs,
    activation: local.Activation,
    products: torch.dtype,
    metric: Metric | None = None,
) -> float:
    """The squared error of the new outputs on tokens that no fit saw, relative to the wanted ones' spread.

    Args:
        metric: how much tokens and dimensions count; of the first tokens alone, where it tells of no more.
    """
    x, target = torch.cat(seen.inputs), wanted(old, seen, activation, products).double()
    weights = torch.cat(seen.weights).double() if seen.weights else x.new_ones(len(x), dtype=torch.float64)
    gap = wide(new, x, activation, products).double() - target
    if metric is not None and metric.apart is not None:
        few = min(len(metric.apart), len(x))
        gap, target, weights = gap[:few], target[:few], weights[:few] * metric.apart[:few].to(weights)
    dimensions = target.new_ones(target.shape[1]) if metric is None else metric.dimensions.to(target)
    centred = target - (weights @ target) / weights.sum().clamp_min(1e-300)
    rest, total = (float(weights @ (each.square() @ dimensions)) for each in (gap, centred))
    return rest / total if total > 0 else 0.0


class Beyond:
    """Sums over tokens of what outputs are to be more than they are (``Activations.missing``), with hidden units."""

    def __init__(self) -> None:
        self._count = 0.0
        self._sum: Tensor | None = None
        self._cross: Tensor | None = None

    def update(self, acts: Activations) -> None:
        if acts.missing is None or not len(acts.input):
            return
        missing, hidden = acts.missing.float(), acts.hidden.float()
        if self._sum is None or self._cross is None:
            self._sum = missing.new_zeros(missing.shape[1], dtype=torch.float64)
            self._cross = missing.new_zeros(missing.shape[1], hidden.shape[1], dtype=torch.float64)
        self._count += len(missing)
        self._sum += missing.sum(0, dtype=torch.float64)
        self._cross += missing.T @ hidden

    def mean(self) -> Tensor | float:
        """(d,), or 0 where nothing is missing."""
        return 0.0 if self._sum is None else self._sum / self._count

    def cross(self, around: Moments | None) -> Tensor | None:
        """(d, ff), the mean of missing x hidden^T, less the product of their means where moments are given."""
        if self._sum is None or self._cross is None:
            return None
        cross = self._cross / self._count
        return cross if around is None else cross.addr_(self._sum / self._count, around.mean(), alpha=-1)


class Part:
    """What one FFN, or one expert, did on the data.

    Attributes:
        moments: of the hidden activations. held: inputs for the regression, and what tells the activation.
        apart: inputs that neither saw (:meth:`~ffnkit.calibration.hooks.Activations.apart`), to judge the fit by.
        beyond: what the outputs are to be more than they are.
    """

    stored: ClassVar[str] = "fusion"

    def __init__(self, most: int) -> None:
        self.hidden, self.held, self.apart = HiddenMoments(), HeldInputs(most), HeldInputs(JUDGED)
        self.beyond = Beyond()

    @property
    def moments(self) -> Moments:
        return self.hidden.moments

    def missing(self, *, centred: bool) -> Tensor | None:
        """(d, ff) E^T H / n of what is missing E (n, d), around the means or not; None where nothing is."""
        return self.beyond.cross(self.moments if centred else None)

    def update(self, acts: Activations) -> None:
        fitted, apart = acts.counted().apart()
        self.hidden.update(fitted)
        self.held.update(fitted)
        self.beyond.update(fitted)
        if len(apart.input):
            self.apart.update(apart)

    def merge(self, other: Part) -> None:
        for mine, theirs in zip(self._parts().values(), other._parts().values(), strict=True):
            mine.merge(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value for name, part in self._parts().items() for key, value in part.state_dict().items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        for name, part in self._parts().items():
            length = len(name) + 1
            part.load({key[length:]: value for key, value in state.items() if key.startswith(f"{name}.")})

    def _parts(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "held": self.held, "apart": self.apart}


def observing(group: list[FFN], tokens: int) -> Statistics[Part]:
    """Empty statistics of these FFNs; of each, ``tokens`` inputs are held at most, shared by its experts."""
    most = {ffn.name: tokens // max(ffn.experts, 1) for ffn in group}
    return Statistics(lambda name: Part(most[name]))
