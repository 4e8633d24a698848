"""What merging is compared with: whole layers dropped, or their FFNs alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import kept
from ffnkit.calibration.drift import Drift, apart
from ffnkit.calibration.features import Passage, passages
from ffnkit.edits import DropLayer, Edit, ReplaceNeurons
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, need_data
from ffnkit.methods.drop.gaps import Gap, ffns_alone, mean_outputs, whole_layers
from ffnkit.methods.drop.standing import stand_ins
from ffnkit.methods.share.windows import Groups, Score, best, computable, label, score_name, series, windows
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name, ffns
from ffnkit.model.targets import select
from ffnkit.nn.masked import Masked
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc, WhichLayers, check, told


@dataclass(frozen=True)
class _Drop:
    """What both have in common: one of ``layers`` and ``window`` says what goes."""

    layers: Annotated[WhichLayers | None, Doc('where, e.g. "last:2", "4-7", [4, 5, 9], "encoder:last:2".')] = None
    window: Annotated[int | None, Doc("number of adjacent layers; the best window is searched for.", at_least=1)] = None
    score: Annotated[
        Score | None,
        Doc(
            "what tells the best window: None, how little it does on data (of layers the cosine of what "
            "enters and what leaves it, of FFNs how little they add relative to what enters their layers), a function "
            "of the model without it that gives a number, higher is better, or a task's metric."
        ),
    ] = None

    refit: Annotated[
        bool,
        Doc(
            "let what stays stand for what goes: a factor fitted to data, in weights that are there "
            "(and a shift, where there is a bias to hold it)."
        ),
    ] = False

    name: ClassVar[str]

    def edits(self, model: nn.Module, groups: Groups) -> list[Edit]:
        """What drops these groups."""
        raise NotImplementedError

    def gaps(self, model: nn.Module, groups: Groups, batches: list[Batch]) -> list[Gap]:
        """The same as gaps in the stream of hidden states, from the first to the last."""
        raise NotImplementedError

    def worth(self, window: list[Passage]) -> tuple[float, float]:
        """How little a window does, summed over its tokens, and their number."""
        raise NotImplementedError

    @property
    def needs_data(self) -> bool:
        """Whether what a window does is measured, or what stays is refitted."""
        return self.refit or (self.window is not None and self.score is None)

    @property
    def reads_weights(self) -> bool:
        """Whether the window is searched for, or what stays is refitted."""
        return self.window is not None or self.refit

    def settings(self) -> dict[str, Any]:
        return told(self) | {"score": score_name(self.score)}

    def chosen(self, model: nn.Module) -> list[Groups]:
        """The groups of FFNs to choose among. Raises FfnkitError where the settings do not fit the model."""
        check(self)
        if (self.layers is None) == (self.window is None):
            given = "neither" if self.layers is None else "both"
            raise FfnkitError(self.name, f"{given} of layers and window given", "Give layers='4-7' or window=4")
        found = ffns(model)
        if self.layers is not None:
            return [series(select(found, self.layers))]
        rows = [one for one in series(found) if len(one) > 1]
        if not rows:
            raise FfnkitError(self.name, "no two FFNs of the model lie in one stack", "Name them, as in layers='all'")
        return windows(rows, [self.window or 1] * len(rows))

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        started = time.perf_counter()
        choices = self.chosen(model)
        score = computable(self.score)
        scores: list[float] = []
        searched = len(choices) > 1 and self.score is None
        batches = kept(need_data(data, self.name, beyond="hidden states")) if searched or self.refit else []
        if searched:
            scores = _proxies(model, batches, choices, self.worth)
        places = {id(groups): number for number, groups in enumerate(choices)}
        chosen, tried = best(
            model, choices, score, partial(self.edits, model), lambda groups: scores[places[id(groups)]]
        )
        report: dict[str, Any] = {"groups": [[ffn.name for ffn in group] for group in chosen], "layers": label(chosen)}
        if tried:
            report["search"] = tried
        edits, told = self.edits(model, chosen), dict[str, dict[str, float]]()
        if self.refit:
            fitted, judged = apart(batches)
            gaps = self.gaps(model, chosen, fitted)
            measure = Drift(model, judged)
            held, told = stand_ins(model, fitted, gaps, progress, measure=measure)
            edits = [*(edit for gap in gaps for edit in gap.edits), *held]
        return Draft(tuple(edits), told, report | {"seconds": time.perf_counter() - started})


@dataclass(frozen=True)
class LayerDrop(_Drop):
    """Drop whole layers: attention, norms and FFN.

    One of ``layers`` and ``window`` says which. In models of two stacks both lose the same numbers.

    Source: the baseline of Verma et al. (arXiv 2501.06126); the similarity is the block influence of Men et al.,
        ShortGPT (arXiv 2403.03853); of ``refit`` Prune&Comp (arXiv 2507.18212) and LinearPatch (arXiv 2505.24680).
    """

    name: ClassVar[str] = "layer-drop"
    summary: ClassVar[str] = "drop whole layers (baseline)"
    paper: ClassVar[str] = "arXiv 2501.06126"

    def edits(self, model: nn.Module, groups: Groups) -> list[Edit]:
        return _gone(model, groups)

    def gaps(self, model: nn.Module, groups: Groups, batches: list[Batch]) -> list[Gap]:
        return whole_layers(model, groups, lambda group: _gone(model, [group]))

    def worth(self, window: list[Passage]) -> tuple[float, float]:
        return _likeness(window)


@dataclass(frozen=True)
class FfnDrop(_Drop):
    """Drop the FFNs of layers and keep their attention: one neuron of zeros stands in for each.

    The neuron gives no output and gets no gradient where the activation is 0 at 0 (GELU, ReLU, SiLU); it makes the
    checkpoint one of ordinary FFNs. One of ``layers`` and ``window`` says which.

    With ``refit`` an output bias gives the FFN's mean output in its place, where there is such a bias.

    Source: a baseline of FFN merging, asked for by its reviewers (arXiv 2501.06126); of ``refit`` as for layers.
    """

    name: ClassVar[str] = "ffn-drop"
    summary: ClassVar[str] = "drop the FFNs of some layers (baseline)"
    paper: ClassVar[str] = "arXiv 2501.06126"

    def edits(self, model: nn.Module, groups: Groups) -> list[Edit]:
        return _silent(model, groups)

    def gaps(self, model: nn.Module, groups: Groups, batches: list[Batch]) -> list[Gap]:
        means = mean_outputs(model, batches, [ffn for group in groups for ffn in group])
        return ffns_alone(model, groups, lambda ffn: _silent(model, [[ffn]], means))

    def worth(self, window: list[Passage]) -> tuple[float, float]:
        return _added(window)


def _gone(model: nn.Module, groups: Groups) -> list[Edit]:
    """One edit a layer; its further FFNs go with it."""
    by_layer: dict[str, FFN] = {}
    for ffn in (ffn for group in groups for ffn in group):
        if ffn.tied:
            raise FfnkitError(f"dropping {ffn.name}", "its weights are shared with other layers", "Keep this layer")
        by_layer.setdefault(block_name(ffn.name), ffn)
    edits: list[Edit] = []
    for layer, ffn in by_layer.items():
        whole = sum(p.numel() for p in model.get_submodule(layer).parameters())
        edits.append(DropLayer(ffn.name, layer=layer, parameters=whole - ffn.num_parameters))
    return edits


def _silent(model: nn.Module, groups: Groups, means: Mapping[str, Tensor] | None = None) -> list[Edit]:
    """``means``: what an output bias gives in an FFN's place, by its name."""
    edits: list[Edit] = []
    for ffn in (ffn for group in groups for ffn in group):
        ffn.check_plain(f"dropping {ffn.name}", but=(Masked.kind,))
        first = torch.zeros(1, dtype=torch.long, device=ffn.raw().up.device)
        nothing = ffn.raw().take(first).map(torch.zeros_like)
        if means and nothing.down_bias is not None:
            nothing = dataclasses.replace(nothing, down_bias=means[ffn.name].to(nothing.down_bias))
        edits.append(ReplaceNeurons.of(ffn.name, nothing))
    return edits


def _proxies(
    model: nn.Module,
    data: Iterable[Batch],
    choices: list[Groups],
    worth: Callable[[list[Passage]], tuple[float, float]],
) -> list[float]:
    """A score for each choice: the mean over its groups and all tokens."""
    found = {block_name(ffn.name): ffn for groups in choices for group in groups for ffn in group}
    sums = [[0.0, 0.0] for _ in choices]

    def add(passed: dict[str, Passage]) -> None:
        for number, groups in enumerate(choices):
            for group in groups:
                value, count = worth([passed[block_name(ffn.name)] for ffn in group])
                sums[number][0] += value
                sums[number][1] += count

    passages(model, data, found, add)
    return [value / max(count, 1e-300) for value, count in sums]


def _likeness(window: list[Passage]) -> tuple[float, float]:
    """Summed cosine of what enters the window and what leaves it, and the number of tokens."""
    first, last = window[0].entering.float(), window[-1].leaving.float()
    return float(nn.functional.cosine_similarity(first, last, dim=1).double().sum()), float(len(first))


def _added(window: list[Passage]) -> tuple[float, float]:
    """Minus the summed size of what the FFNs add, relative to what enters their layers, and the number of tokens."""
    parts = [p.added.float().norm(dim=1) / p.entering.float().norm(dim=1).clamp_min(1e-12) for p in window]
    return -float(torch.stack(parts).double().sum()), float(len(parts[0]))
