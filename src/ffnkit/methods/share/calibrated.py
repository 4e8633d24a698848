"""Sharing fitted to data: the best neurons of all members, then an output layer and all weights fitted to each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from torch import nn

from ffnkit.calibration.drift import BROKEN, Drift, apart
from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, need_data
from ffnkit.methods.share.fitting import Fit, Fitting
from ffnkit.methods.share.grouping import Sharing
from ffnkit.methods.share.search import Search
from ffnkit.methods.share.windows import Groups, Score, alike, computable, label, score_name
from ffnkit.model.ffn import FFN
from ffnkit.plans import Draft, Progress
from ffnkit.settings import Doc


@dataclass(frozen=True)
class CalibratedMerging(Sharing):
    """Let several layers share one FFN that is fitted to all of them on data.

    On the tokens of the data, with what each member receives and gives, errors relative to its own outputs as the next
    norm reads them:
    1. the shared neurons are chosen one after the other from those of *all* members, by how much each lowers the error
       of all outputs (``ops.union``);
    2. the output layer is refitted to all members in closed form, strongly pulled towards the columns as they were:
       where one member's error changes what the next one gets, large weights that fit the clean inputs break the model;
    3. ``refine`` steps of regression fit all weights; the share is taken that is best on rows not fitted;
    4. each member keeps a factor for each hidden neuron and an output bias of its own (``extras``), and if asked for a
       difference of low rank (``extra_rank``).

    Which layers share (``window``, ``keep``, ``remove``) is found by what sharing does to the model's end on rows kept
    apart: choices are put in place for a moment and measured (``Drift``), the most harmless is taken, and so on.

    Source: ours. The choice is simultaneous orthogonal matching pursuit (Tropp et al. 2006); sharing: FFN merging
        (arXiv 2501.06126); a difference of low rank beside shared layers: Relaxed Recursive Transformers (arXiv
        2410.20672); least squares behind a choice: GRAIL (arXiv 2602.23795).
    """

    refine: Annotated[int, Doc("regression steps; 0 leaves the chosen neurons' weights as they are.", at_least=0)] = 300
    extras: Annotated[
        bool, Doc("whether each member keeps a factor for each hidden neuron, and an output bias, of its own.")
    ] = True
    extra_rank: Annotated[
        int, Doc("rank of a difference of the output layer that each member keeps of its own.", at_least=0)
    ] = 0
    ridge: Annotated[
        float | None,
        Doc(
            "of the refit, towards the old columns, relative to the mean square of the activations. None: 1 where a "
            "regression follows, 0.1 where none does.",
            at_least=0,
        ),
    ] = None
    score: Annotated[
        Score | None,
        Doc(
            "what tells the best choice of layers: None, how far the model's end moves on rows kept apart; or a "
            "function of the model that gives a number, higher is better; or, where a task is at hand, its metric."
        ),
    ] = None
    tries: Annotated[
        int, Doc("choices of layers that are fitted and measured at each step of a search, at most.", at_least=1)
    ] = 8
    tokens: Annotated[int, Doc("most tokens that a layer is fitted to.", at_least=4)] = 16384
    seed: Annotated[int, Doc("of the regression's batches.", at_least=0)] = 0

    name: ClassVar[str] = "calibrated-merging"
    summary: ClassVar[str] = "let several layers share one FFN that is fitted to all of them on data"
    paper: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True

    @property
    def fits(self) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"score": score_name(self.score)}

    def check(self) -> None:
        super().check()
        if self.extra_rank and not self.extras:
            what = "members are to have nothing of their own (extras=False)"
            raise FfnkitError(f"extra_rank={self.extra_rank}", what, "Leave extras on, or extra_rank out")

    def windows(self, rows: Groups) -> list[Groups]:
        """Where groups grow, one choice: the runs of neighbours of one shape, in which they do."""
        if self.window is not None:
            return super().windows(rows)
        found = [_runs(row) for row in rows]
        for row, runs in zip(rows, found, strict=True):
            goes, most = self.length(len(row)) - 1, len(row) - len(runs)
            if goes > most:
                what = f"neighbours of one shape can save {most}"
                do = f"Give keep={len(row) - most} or more, or groups of one shape"
                raise FfnkitError(f"saving {goes} of {len(row)} FFNs", what, do if most else "Use a narrowing method")
            for run in runs:
                self._check_saves(run if goes == most else run[:2])  # the smallest group that may come of it
        return [[run for runs in found for run in runs if len(run) > 1]]

    def fitting(self, groups: Groups) -> Groups:
        for group in super().fitting(groups):
            self._check_saves(group)
        return groups

    def _check_saves(self, group: list[FFN]) -> None:
        """Raises FfnkitError where what the members keep of their own is no less than what sharing saves."""
        ffn = group[0]
        if self.extra_rank > (most := min(ffn.d, ffn.width)):
            what = f"output layers of {ffn.d} x {ffn.width} differ by a rank of {most} at most"
            raise FfnkitError(f"extra_rank={self.extra_rank}", what, f"Give a rank far below {most}")
        bias = ffn.raw().down_bias
        each = ffn.width + self.extra_rank * (ffn.width + ffn.d) if self.extras else 0
        kept = len(group) * each
        saved = (len(group) - 1) * (ffn.own_parameters - (0 if bias is None or not self.extras else len(bias)))
        if len(group) > 1 and kept >= saved:
            what = f"its members would keep {kept:,} numbers of their own, and sharing saves {saved:,}"
            do = "Give a lower extra_rank, or more layers a group" if self.extra_rank else "Share with extras=false"
            raise FfnkitError(f"merging {', '.join(one.name for one in group)}", what, do)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        started = time.perf_counter()
        self.check()
        score = computable(self.score)
        choices = self.chosen(model)
        found = list({ffn.name: ffn for groups in choices for group in groups for ffn in group}.values())
        fit, held = apart(need_data(data, self.name))
        fitting = Fitting(model, found, fit, held, self.tokens)
        groups = choices[0]
        told: dict[str, float] = {}
        if self.searches:
            measure = Drift(model, held) if score is None else _lower(score, model)
            search = Search(
                model, measure, lambda group: self._fit(fitting, group, 0).edits(group, self.extras), progress
            )
            if self.window is not None:
                groups, told = search.best_of(choices, self.tries)
            else:
                rows = self.stacks(model)
                groups, told = search.grown(rows, [self.length(len(row)) - 1 for row in rows], self.tries)
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        for number, group in enumerate(groups, 1):
            done = self._fit(fitting, group, self.refine)
            edits += done.edits(group, self.extras)
            for ffn, error in zip(group, done.errors, strict=True):
                quantities[ffn.name] = {"output error on rows kept apart": error**0.5}
            if progress is not None:
                progress(number, len(groups), group[0].name)
        report: dict[str, Any] = {"groups": [[ffn.name for ffn in group] for group in groups], "layers": label(groups)}
        if told:
            report["search"] = told
        return Draft(_in_order(edits), quantities, report | {"seconds": time.perf_counter() - started})

    def _fit(self, fitting: Fitting, group: list[FFN], refine: int) -> Fit:
        return fitting.of(
            group, refine=refine, ridge=self.ridge, extras=self.extras, rank=self.extra_rank, seed=self.seed
        )


def _runs(row: list[FFN]) -> Groups:
    """Neighbours of one shape together."""
    found = [row[:1]]
    for before, ffn in pairwise(row):
        if alike((before, ffn)):
            found[-1].append(ffn)
        else:
            found.append([ffn])
    return found


def _lower(score: Any, model: nn.Module) -> Any:
    """A score as something of which less is better."""

    def lower() -> float:
        found = -float(score(model))
        return BROKEN if math.isnan(found) else found

    return lower


def _in_order(edits: list[Edit]) -> tuple[Edit, ...]:
    return tuple(sorted(edits, key=lambda edit: edit.stage))
