"""Data-aware fusion: the neurons that the output needs, an output layer fitted to them, on a few thousand tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import kept
from ffnkit.calibration.blockwise import Beside, Blockwise
from ffnkit.calibration.fisher import fisher
from ffnkit.calibration.reading import Metric, output_metric
from ffnkit.calibration.statistics import Statistics
from ffnkit.calibration.stored import StatisticsFile, first_batches
from ffnkit.calibration.streams import Streams
from ffnkit.edits import Edit, ReplaceNeurons, ScaleInputs
from ffnkit.methods.common import COMPRESSED, Batch, Narrowing, generator, lifted, need_data, norms
from ffnkit.methods.expecting import Work, fused
from ffnkit.methods.narrow.by_block import Fitted, block_by_block, drafted
from ffnkit.methods.narrow.judging import Judged, problem_of, warn_unknown
from ffnkit.methods.narrow.observed import Part, observing
from ffnkit.model.ffn import FFN, activations
from ffnkit.ops import local
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.ops.refit import ridges_of
from ffnkit.ops.subset import choose, outputs, ranked, weighed
from ffnkit.plans import Draft, Progress, check_weights
from ffnkit.settings import Doc
from ffnkit.settings.presets import Preset, with_presets

RIDGE = 1e-2  # of the selection, relative to the mean square of the activations
# Of the neurons that stay, those chosen by the loss without each. Leverage carries over to text of another kind, but
# keeps nothing for the few outputs that a model may stand on; some neurons by their loss keep those.
BY_LOSS = {"loss": 1.0, "balanced": 0.5, "leverage": 0.0}


@with_presets
@dataclass(frozen=True)
class CalibratedFusion(Narrowing):
    """Narrow each FFN so that its output on data stays: choose neurons, refit the output layer, then all of it.

    On the tokens of the data, with H the hidden activations and W the output layer:
    1. neurons S are chosen (``select``): unless told otherwise half of them by how much the error of H_S D^T, in the
       ``metric`` of what comes behind, grows with the best D where one of them alone goes, the rest by leverage;
    2. D (and the output bias) is refitted in closed form by ridge regression, so that what the dropped neurons did
       is taken over by the kept ones as far as it can be: they are fused into them. The ridge pulls towards the old
       columns, not towards zero; fits under several are mixed by what tokens say that were not fitted. With
       ``sequential``, H is what the compressed layers before give, and the target is what the *block* gave in the model
       as it was: the FFN makes up for what was lost before it;
    3. ``refine`` steps of regression fit all weights; of what they learnt the share is taken that carries over to those
       tokens, and the output layer is refitted to it;
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
    refine_metric: Annotated[
        Literal["fisher", "norm"] | None,
        Doc("what errors of the outputs count by in the regression; None: what they count by in the choice."),
    ] = None
    select: Annotated[
        Literal["balanced", "loss", "leverage", "greedy"],
        Doc(
            'which neurons stay: by the "loss" without each of them, by "leverage" (what the others cannot give), '
            '"balanced" (half by loss, the rest by leverage), or "greedy", one after the other.'
        ),
    ] = "balanced"
    ridge: Annotated[
        float | None,
        Doc(
            "of the refit, towards the old columns, relative to the mean square of the activations. None: several, "
            "mixed by what tokens say that were not fitted; 1 where those are too few.",
            at_least=0,
        ),
    ] = None
    tokens: Annotated[
        int, Doc("most tokens a layer that are held for the regression; the statistics use all.", at_least=1)
    ] = 16384
    seed: Annotated[int, Doc("of the regression's batches.", at_least=0)] = 0
    effort: Annotated[
        Literal["fast", "default", "best"],
        Doc(
            'values for what is not given: "fast" takes a third of the time or less, "best" three times as long '
            "(compress then decides ridge and steps on held-out text)."
        ),
    ] = "default"

    chooses_preset: ClassVar[str] = "effort"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fast": Preset(
            "closed forms alone, each layer on its own", {"sequential": False, "metric": "norm", "refine": 0}
        ),
        "best": Preset(
            "long regressions on more tokens",
            {"refine": 500, "tokens": 65536},
        ),
    }
    name: ClassVar[str] = "calibrated-fusion"
    summary: ClassVar[str] = "keep the neurons that data need and refit the output layer: data-aware fusion"
    paper: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True

    @property
    def beyond(self) -> str | None:
        return COMPRESSED if self.sequential else None

    def work(self, ffn: FFN, width: int, tokens: int) -> Work:
        """About what one FFN takes."""
        greedy, ridges = self.select == "greedy", len(ridges_of(self.ridge))
        return fused(ffn, width, tokens, greedy=greedy, refine=self.refine, kept=self.tokens, ridges=ridges)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        found = self.chosen(model)
        batches = need_data(data, self.name, beyond=self.beyond)
        batches = batches if isinstance(batches, StatisticsFile) else kept(batches)
        for ffn, _ in found:
            ffn.check_plain(f"calibrating {ffn.name}")
            check_weights(ffn.raw(), ffn.name)
        made = drafted([ffn for ffn, _ in found], self.fits(model, found, batches, progress))
        return dataclasses.replace(made, report={"sequential": self._follows(batches)})

    def fits(
        self,
        model: nn.Module,
        found: list[tuple[FFN, int]],
        batches: list[Batch] | StatisticsFile,
        progress: Progress | None = None,
        *,
        readings: Mapping[str, Reading] | None = None,
        beside: Beside = nullcontext,
        whole: bool = False,
    ) -> dict[str, Fitted]:
        """The FFNs at their widths, by name, fitted to the data in the order in which they run.

        Args:
            readings: what errors count by, where it is known (:meth:`readings`).
            beside: what else is done to the model as it is compressed; it is in place where the compressed layers run,
                not where the model as it was gives what is to be met. It leaves these FFNs as they are.
            whole: FFNs that keep their width are fitted too: they make up for what is lost before them.
        """
        narrow = [ffn for ffn, _ in found]
        widths = {ffn.name: width for ffn, width in found}
        sequential = self._follows(batches)
        counted = readings if readings is not None else self.readings(model, narrow, batches)
        seen = observing(narrow, self.tokens if self.refine else 0)
        streams = None
        if sequential and narrow and not isinstance(batches, StatisticsFile):
            streams = Streams(model, batches, narrow)

        def show(blocks: Blockwise, group: list[FFN], last: bool) -> None:
            if streams is not None:
                streams.see(blocks, group, seen)
            else:
                blocks.see(group, seen, last=last)

        def fit(ffn: FFN) -> Fitted:
            neurons, factor, error = self._narrow(ffn, seen, widths[ffn.name], counted[ffn.name], whole)
            rewrite = ReplaceNeurons.of(ffn.name, neurons)
            edits: list[Edit] = [rewrite]
            if widths[ffn.name] < ffn.width:
                edits.append(ScaleInputs(ffn.name, site="down", scale=factor))
            return Fitted(edits, {"output error on the data": error}, rewrite.neurons().scaled(factor))

        passes = () if streams is None else (streams.before,)
        return block_by_block(
            model, batches, narrow, show, fit, progress, sequential=sequential, beside=beside, passes=passes
        )

    def _follows(self, batches: list[Batch] | StatisticsFile) -> bool:
        """Whether layers are fitted to what compressed ones before them give; of statistics they cannot be."""
        return not isinstance(batches, StatisticsFile) if self.sequential is None else self.sequential

    def readings(self, model: nn.Module, found: list[FFN], batches: list[Batch] | StatisticsFile) -> dict[str, Reading]:
        """What errors of each FFN's outputs count by, by name, on the first of the data."""
        few = batches if isinstance(batches, StatisticsFile) else first_batches(batches)
        metrics = output_metric(model, found, few, seed=self.seed)
        read = {"norm": {name: metric.dimensions for name, metric in metrics.items()}}
        regressed = (self.refine_metric or self.metric) if self.refine else "norm"
        if "fisher" in (self.metric, regressed):
            read["fisher"] = read["norm"] | fisher(model, found, few, seed=self.seed)
        return {name: Reading(read[self.metric][name], metrics[name], read[regressed][name]) for name in metrics}

    def _narrow(
        self, ffn: FFN, seen: Statistics[Part], width: int, reading: Reading, whole: bool
    ) -> tuple[Neurons, Tensor, float]:
        """New neurons (factor divided out of down), the factor (width,) or (E, width), the relative output error."""
        old = lifted(ffn.raw())
        parts = []
        for number in range(max(old.experts, 1)):
            single = old.expert(number) if old.experts else old
            parts.append(
                self._fit(ffn, single, seen.parts.pop((ffn.name, number), None), width, number, reading, whole)
            )
        if not all(part.judged for part in parts):
            warn_unknown(ffn, refined=bool(self.refine))
        made = concatenate([part.neurons for part in parts]) if old.experts else parts[0].neurons
        factor = torch.stack([part.factor for part in parts]) if old.experts else parts[0].factor
        error = sum(part.error * part.norm for part in parts) / max(sum(part.norm for part in parts), 1e-300)
        dtype = ffn.raw().up.dtype
        return made.to(dtype), factor, error**0.5

    def _fit(
        self,
        ffn: FFN,
        old: Neurons,
        seen: Part | None,
        width: int,
        number: int,
        reading: Reading | None = None,
        whole: bool = False,
    ) -> _One:
        """One FFN or expert.

        Args:
            reading: what errors count by; None: all alike. whole: it is fitted at its whole width too.
        """
        if width == old.ff and (seen is None or not whole):
            return _One(old, old.up.new_ones(width))
        if seen is None:  # an expert that no token reached: nothing is known but its weights
            kept = torch.sort(norms(old), descending=True, stable=True).indices[:width].sort().values
            return _One(old.take(kept), old.up.new_ones(width))
        moments = seen.moments
        gram = moments.second(last=True) if old.down_bias is None else moments.centred(last=True)
        weights = None if reading is None else reading.weights
        read = old.down if weights is None else weighed(old.down, weights)
        if self.select == "greedy":
            kept = choose(gram, read, width, RIDGE).order.sort().values.to(gram.device)
        else:
            kept = ranked(gram, RIDGE, read, BY_LOSS[self.select])[:width].sort().values
        problem = problem_of(old, seen, gram, kept)
        norm = outputs(gram, old.down)
        del gram
        moments.forget()
        judged = Judged(old, seen, activations(ffn), ffn.raw().up.dtype)
        ridges = ridges_of(self.ridge)
        fresh, down = judged.refitted(old.take(kept), problem, ridges, weights)
        error = max(norm - problem.explained(down), 0.0) / max(norm, 1e-300)
        start = problem.start
        del problem
        if self.refine and seen.held.inputs and judged.activation is not None:
            sample = judged.sample(old, seen.held)
            seen.held.inputs.clear()
            fitted = local.regress(
                fresh,
                sample,
                judged.activation,
                steps=self.refine,
                generator=generator(self.seed, number),
                held=judged.decides,
                dimensions=None if reading is None else reading.regressed.to(sample.inputs.device),
                products=judged.products,
            )
            if fitted is not fresh:
                fresh = judged.refitted_again(fitted, sample, start, ridges, weights)
        told = judged.error(fresh, None if reading is None else reading.metric)
        size = moments.absolute()
        factor = (size.sum() / size[kept].sum().clamp_min(1e-30)).clamp_min(1.0).float().item()
        scale = old.up.new_full((width,), factor)
        narrow = dataclasses.replace(fresh, down=fresh.down / factor)
        return _One(narrow, scale, error if told is None else told, norm, judged.activation is not None)


class _One(NamedTuple):
    """One FFN or expert: the factor (width,), the squared relative error held out, the squared norm of its outputs.

    ``judged``: whether its activation is known, so that neurons that moved can be judged.
    """

    neurons: Neurons
    factor: Tensor
    error: float = 0.0
    norm: float = 0.0
    judged: bool = True


@dataclass(frozen=True)
class Reading:
    """What errors of an FFN's outputs count by: ``weights``, (d,) or (d, d), in the choice, ``regressed``, likewise, in
    the regression, ``metric`` in what is told.
    """

    weights: Tensor
    metric: Metric
    regressed: Tensor
