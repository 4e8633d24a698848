"""FFN merging: FFNs of several layers, their neurons matched, become one that all of them use."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ffnkit.calibration.drift import apart
from ffnkit.calibration.features import Features
from ffnkit.edits import Edit, ReplaceNeurons, Tie
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, generator, lifted, need_data
from ffnkit.methods.share.fitting import Fitting
from ffnkit.methods.share.grouping import Sharing
from ffnkit.methods.share.refitting import Corrector, shared
from ffnkit.methods.share.windows import Groups, Score, best, computable, label, score_name, series
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.ops.matching import Spread, assign, correlation, likeness, matched, spread
from ffnkit.ops.neurons import Neurons
from ffnkit.plans import Draft, Progress, check_weights
from ffnkit.settings import Doc, WhichLayers, check
from ffnkit.settings.presets import Preset, with_presets

Pair = tuple[Tensor, float]


@with_presets
@dataclass(frozen=True)
class Merging(Sharing):
    """Let several layers share one FFN: the mean of their FFNs, neurons matched by what they do on data.

    One of ``layers``, ``groups``, ``window``, ``keep`` and ``remove`` says which. In models of two stacks each stack
    has groups of its own, of the same layer numbers.

    Source: Verma, Murray, Duh: Merging feed-forward sublayers (arXiv 2501.06126).
    Differs: neurons are matched by their weights, the paper's by the outputs of up (``preset="paper"``); every window
        is searched, the last one too; padding does not count; the anchor counts once; each stack has its own count of
        tokens.
    """

    groups: Annotated[
        Literal["similar"] | Sequence[WhichLayers] | None,
        Doc(
            'several groups, each a layer expression or a list of layer numbers, e.g. ["0-3", [4, 6, '
            '7]]; "similar" lets the features choose groups, adjacent or not, ``keep`` of them in '
            "each stack."
        ),
    ] = None
    anchor: Annotated[
        Literal["first", "middle", "last"],
        Doc('the FFN whose order of neurons the others take: "first", "middle" or "last" of its group.'),
    ] = "first"
    features: Annotated[
        Literal["weights", "up", "gate", "hidden", "sum", "both"],
        Doc(
            'what is compared: "weights" (cosines of what a neuron reads and writes; no data), on data "up" (the '
            'outputs of up; before the activation where there is no gate), "gate", "hidden" (what down receives), '
            '"sum" of their correlations; or "both", weights and that sum.'
        ),
    ] = "weights"
    match: Annotated[
        bool, Doc('whether neurons are matched; False takes them in the order in which they lie ("vanilla").')
    ] = True
    take: Annotated[
        Literal["mean", "anchor", "random"], Doc('"mean" of the group, the "anchor" as it is, or "random" weights.')
    ] = "mean"
    correct: Annotated[
        Literal["none", "output"], Doc('"output" refits the shared output layer to all of the group by least squares.')
    ] = "none"
    score: Annotated[
        Score | None,
        Doc(
            "what tells the best window: None, the mean correlation of the matched neurons; or a "
            "function of the model with the window merged that gives a number, higher is better; or, "
            "where a task is at hand, the name of its metric."
        ),
    ] = None
    tokens: Annotated[int, Doc("rows of features that are compared.", at_least=4)] = 10000
    ridge: Annotated[
        float | None,
        Doc(
            "of the correction, towards the mean, relative to the hidden activations' mean square. None: the one of "
            "several with which the model's end moves least on rows kept apart.",
            at_least=0,
        ),
    ] = None
    seed: Annotated[int, Doc("of random weights.", at_least=0)] = 0
    preset: Annotated[Literal["paper"] | None, Doc("values for what is not given.")] = None

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            "FFN merging (arXiv 2501.06126), released code; windows by the task's score on validation rows (score)",
            {"anchor": "first", "features": "up", "match": True, "take": "mean", "correct": "none", "tokens": 10000},
        )
    }
    name: ClassVar[str] = "merging"
    summary: ClassVar[str] = "let several layers share one FFN, the mean of theirs with matched neurons"
    paper: ClassVar[str] = "arXiv 2501.06126"

    @property
    def needs_data(self) -> bool:
        """Whether features on data are needed: to match, to search, to choose groups or to correct."""
        searches = self.groups == "similar" or (self.searches and self.score is None)
        matches = self.match and self.take == "mean"
        return (self.features != "weights" and (matches or searches)) or self.correct != "none"

    @property
    def fits(self) -> bool:
        return self.correct != "none"

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"score": score_name(self.score)}

    def check(self) -> None:
        if self.groups != "similar":
            super().check()
            return
        check(self)
        given = [k for k in ("layers", "groups", "window", "keep", "remove") if getattr(self, k) is not None]
        if given != ["groups", "keep"]:
            raise FfnkitError("groups='similar'", f"given are {', '.join(given)}", "Give keep= with it, no other")

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        self.check()
        score = computable(self.score)
        started = time.perf_counter()
        candidates = self.chosen(model)
        held: Features | None = None
        corrector: Corrector | None = None
        if self.needs_data:
            batches = need_data(data, self.name, beyond="features of layers, token by token")
            found = list({ffn.name: ffn for groups in candidates for group in groups for ffn in group}.values())
            if self.correct == "output":
                batches, judging = apart(batches)
                corrector = Corrector(model, Fitting(model, found, batches, judging, self.tokens), judging, self.ridge)
            if self.compared:
                held = self._features(model, found, batches)
        if self.groups == "similar":
            candidates = [self._similar(model, held)]
        work = _Work(self, held, corrector, progress, {pair for groups in candidates for pair in self._pairs(groups)})
        chosen, scores = best(model, candidates, score, lambda groups: work.edits(groups)[0], work.alike)
        edits, quantities = work.edits(chosen)
        report: dict[str, Any] = {"groups": [[ffn.name for ffn in group] for group in chosen], "layers": label(chosen)}
        if scores:
            report["search"] = scores
        report |= {"seconds": time.perf_counter() - started, "seconds of the assignments": work.assigning}
        return Draft(tuple(edits), quantities, report)

    # --- which layers

    def chosen(self, model: nn.Module) -> list[Groups]:
        if self.groups != "similar":
            return super().chosen(model)
        self.check()
        found = [rows for rows in series(ffns(model)) if len(rows) > 1]
        for rows in found:
            self.length(len(rows))  # says where so many cannot be kept
        return [self.fitting(found)]

    def fitting(self, groups: Groups) -> Groups:
        bare = next((ffn.name for group in super().fitting(groups) for ffn in group if not ffn.gated), None)
        if self.features == "gate" and bare is not None:
            raise FfnkitError("features='gate'", f"{bare} has no gate", "Use features='up' or 'hidden'")
        return groups

    def _similar(self, model: nn.Module, held: Features | None) -> list[list[FFN]]:
        """Groups by average linkage over one minus the matched correlation: ``keep`` of them in each stack."""
        from scipy.cluster.hierarchy import cut_tree, linkage
        from scipy.spatial.distance import squareform

        assert self.keep is not None
        result = []
        for rows in series(ffns(model)):
            if len(rows) < 2:
                continue
            work = _Work(self, held, None, None, set())
            distance = torch.zeros(len(rows), len(rows), dtype=torch.float64)
            for i, first in enumerate(rows):
                for j in range(i + 1, len(rows)):
                    distance[i, j] = distance[j, i] = 1 - work.pair(first, rows[j])[1]
            tree = linkage(squareform(distance.clamp_min(0).numpy(), checks=False), method="average")
            labels = cut_tree(tree, self.keep)[:, 0]  # so many, also where distances are equal
            by_label: dict[int, list[FFN]] = defaultdict(list)
            for ffn, number in zip(rows, labels, strict=True):
                by_label[int(number)].append(ffn)
            result += [group for group in by_label.values() if len(group) > 1]
        return result

    # --- work

    def placed(self, group: list[FFN]) -> list[FFN]:
        """The group with its anchor first."""
        at = {"first": 0, "middle": len(group) // 2, "last": len(group) - 1}[self.anchor]
        return [group[at], *group[:at], *group[at + 1 :]]

    @property
    def compared(self) -> list[str]:
        """The kinds of features whose correlations are added."""
        several: dict[str, list[str]] = {
            "weights": [],
            "sum": ["up", "gate", "hidden"],
            "both": ["up", "gate", "hidden"],
        }
        return several.get(self.features, [self.features])

    def _pairs(self, groups: list[list[FFN]]) -> set[tuple[str, str]]:
        return {(anchor.name, ffn.name) for anchor, *rest in map(self.placed, groups) for ffn in rest}

    def _features(self, model: nn.Module, found: list[FFN], data: Iterable[Batch]) -> Features:
        kinds = {f.name: [k for k in self.compared if k != "gate" or f.gated] for f in found}
        return Features(model, data, found, kinds, self.tokens)


class _Work:
    """Pairs that are matched once, whichever groups need them."""

    def __init__(
        self,
        method: Merging,
        held: Features | None,
        corrector: Corrector | None,
        progress: Progress | None,
        pairs: set[tuple[str, str]],
    ) -> None:
        self.corrector = corrector
        self.method, self.held, self.progress, self.total = method, held, progress, len(pairs)
        self.found: dict[tuple[str, str], Pair] = {}
        self.spreads: dict[tuple[str, str], Spread] = {}
        self.assigning = 0.0

    def pair(self, anchor: FFN, member: FFN) -> Pair:
        """The member's neuron for each of the anchor's, and how much they correlate in the mean."""
        key = (anchor.name, member.name)
        if key not in self.found:
            self.found[key] = self._matched(anchor, member)
            if self.progress is not None:
                self.progress(len(self.found), max(self.total, len(self.found)), member.name)
        return self.found[key]

    def _matched(self, anchor: FFN, member: FFN) -> Pair:
        same = torch.arange(anchor.width)
        parts: list[Tensor] = []
        if self.method.features in ("weights", "both"):
            parts.append(likeness(lifted(anchor.raw()), lifted(member.raw())))
        held = self.held
        for kind in self.method.compared if held is not None else ():
            assert held is not None
            if kind != "gate" or anchor.gated:
                mine, other = ((held.get(ffn.name, kind), self._spread(ffn.name, kind)) for ffn in (anchor, member))
                parts.append(correlation(mine[0], other[0], mine[1], other[1]))
        if not parts:
            return same, float("nan")
        total = parts[0] if len(parts) == 1 else torch.stack([part.to(parts[0]) for part in parts]).mean(0)
        start = time.perf_counter()
        order = assign(total) if self.method.match else same
        self.assigning += time.perf_counter() - start
        return order, matched(total, order)

    def _spread(self, name: str, kind: str) -> Spread:
        if (name, kind) not in self.spreads:
            assert self.held is not None
            self.spreads[name, kind] = spread(self.held.get(name, kind))
        return self.spreads[name, kind]

    def alike(self, groups: list[list[FFN]]) -> float:
        """The mean correlation of matched neurons over all members of the groups."""
        found = [self.pair(anchor, m)[1] for anchor, *rest in map(self.method.placed, groups) for m in rest]
        return sum(found) / len(found)

    def edits(self, groups: list[list[FFN]]) -> tuple[list[Edit], dict[str, dict[str, float]]]:
        """The edits that merge these groups, and what was measured of each member."""
        starts = [self._start(number, group) for number, group in enumerate(groups)]
        quantities = {name: {"correlation": c} for start in starts for name, c in start.alike.items()}
        if self.corrector is None:
            return [edit for start in starts for edit in start.edits()], quantities
        made = self.corrector.best([(start.group, start.neurons()) for start in starts])
        for _, errors in made:
            for name, error in errors.items():
                quantities.setdefault(name, {})["output error on rows kept apart"] = error
        return [edit for start, (n, _) in zip(starts, made, strict=True) for edit in start.edits(n)], quantities

    def _start(self, number: int, group: list[FFN]) -> _Start:
        method = self.method
        anchor, *rest = placed = method.placed(group)
        for ffn in group:
            check_weights(ffn.raw(), ffn.name)
        pairs = [self.pair(anchor, member) for member in rest] if method.take == "mean" else []
        same = torch.arange(anchor.width)
        orders = torch.stack([p[0] for p in pairs] or [same for _ in rest]).to(torch.int32)
        alike = {m.name: p[1] for m, p in zip(rest, pairs, strict=False) if p[1] == p[1]}
        drawn = _random(anchor, generator(method.seed, number)) if method.take == "random" else None
        return _Start(placed, orders, alike, method.take == "mean", drawn)


@dataclass(frozen=True)
class _Start:
    """A group as it is merged before any correction.

    Attributes:
        group: the anchor first. orders: (len(group) - 1, ff) of the others' neurons. alike: their correlation, by name.
        average: whether the mean is shared. drawn: random neurons that are shared in its place.
    """

    group: list[FFN]
    orders: Tensor
    alike: dict[str, float]
    average: bool
    drawn: Neurons | None

    def neurons(self) -> Neurons:
        """The shared FFN."""
        return self.drawn or shared(self.group, self.orders if self.average else self.orders[:0])

    def edits(self, other: Neurons | None = None) -> list[Edit]:
        """The edits that let the group share it, or ``other`` in its place."""
        anchor, *rest = self.group
        given = other or self.drawn
        own: list[Edit] = [] if given is None else [ReplaceNeurons.of(anchor.name, given)]
        average = self.average and other is None
        return [*own, Tie(anchor.name, members=[ffn.name for ffn in rest], average=average, orders=self.orders)]


def _random(ffn: FFN, draw: torch.Generator) -> Neurons:
    """Neurons of the FFN's shape, drawn with the spread of its own weights; biases zero."""
    own = lifted(ffn.raw())
    fresh: dict[str, Tensor] = {}
    for name, value in own.tensors().items():
        plain = torch.randn(value.shape, generator=draw).to(value) * value.std()
        fresh[name] = torch.zeros_like(value) if name.endswith("bias") else plain
    return type(own)(**fresh).to(ffn.raw().up.dtype)
