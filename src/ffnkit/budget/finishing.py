"""The last stage of a target: what was chosen is fitted and mended; what is measured better stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ffnkit.budget.losses import Losses
from ffnkit.budget.mending import Mended, gaps_closed, heads_refitted
from ffnkit.budget.moves import Choice
from ffnkit.budget.refining import Refining
from ffnkit.budget.search import ONE_SHARE, Search, Tried
from ffnkit.budget.sharing import regressed
from ffnkit.edits import Edit
from ffnkit.methods.narrow.calibrated import CalibratedFusion

RIVAL = 1.5  # times the least loss: what loses more than that before it is fitted is not fitted


@dataclass(frozen=True)
class Assembled:
    """A choice, and the edits that stand for it.

    Attributes:
        tried: how it was measured. losses: with its FFNs as they are. mends: edits beside those of the choice; shown:
            the same beside heads that leave zeros in their places.
    """

    tried: Tried
    losses: Losses
    mends: list[Edit] = field(default_factory=list)
    shown: list[Edit] = field(default_factory=list)

    @property
    def choice(self) -> Choice:
        return self.tried.choice

    @property
    def loss(self) -> float:
        return self.tried.measured

    def edits(self) -> list[Edit]:
        """As a plan holds them, in normal form."""
        return [*self.losses.edits(self.choice), *self.mends]


class Finish:
    """Fits and mends choices of a search; whatever is measured is told there.

    Args:
        method: how FFNs are fitted; None: in closed form alone. every: all candidates are fitted wholly, not just the
            better one. keeps: whether a choice keeps what counts do not tell, a time.
    """

    def __init__(
        self,
        search: Search,
        losses: Losses,
        method: CalibratedFusion | None,
        *,
        every: bool = False,
        keeps: Callable[[Choice], bool] = lambda _: True,
    ) -> None:
        self.search, self.losses, self.method, self.every, self.keeps = search, losses, method, every, keeps

    def run(self, found: Tried) -> Assembled:
        """The choice that was found, or its rival where that is better once it is fitted: one share for all."""
        start = Assembled(found, self.losses)
        if self.method is None:
            best = self._better(self._again(start), start)
            return self._mended(self._mended(best, heads_refitted), gaps_closed)
        refining = Refining(self.losses, self.method)
        ready = [self._shared(self._mended(each, heads_refitted)) for each in (start, *self._rivals(found))]
        if len(ready) > 1:
            quick = [(self._fitted(refining, each, quick=True), each) for each in ready]
            order = sorted(quick, key=lambda pair: pair[0].loss)
            ready = [each for _, each in order] if self.every else [order[0][1]]
            best = min((each for pair in quick for each in pair), key=lambda each: each.loss)
        else:
            [best] = ready
        for each in ready:
            best = self._better(self._fitted(refining, each), best)
        return self._mended(best, gaps_closed)

    # --- steps

    def _rivals(self, found: Tried) -> list[Assembled]:
        """One share for all beside another choice, and the best other choice beside one share."""
        others = [each for each in self.search.tried if _even(each) is not _even(found)]
        near = [each for each in others if each.measured <= RIVAL * found.measured]
        for each in sorted(near, key=lambda each: each.measured):
            if self.keeps(each.choice):
                return [Assembled(each, self.losses)]
        return []

    def _again(self, start: Assembled) -> Assembled:
        """FFNs fitted in closed form, each on its own, to what they get without the layers and heads that went."""
        if not start.choice.joint and not any(each.kind == "heads" for each in self.search.graded):
            return start
        return self._measured(replace(start, losses=self.losses.refitted(start.choice)), "fitted again")

    def _shared(self, start: Assembled) -> Assembled:
        """FFNs that layers share fitted by regression, where that is better."""
        if not any(each.kind == "sharing" for each in start.choice.joint):
            return start
        made = replace(start, tried=replace(start.tried, choice=regressed(start.losses, start.choice)))
        return self._better(self._measured(made, "shared FFNs fitted again"), start)

    def _fitted(self, refining: Refining, start: Assembled, *, quick: bool = False) -> Assembled:
        """Each FFN fitted on what the compressed model before it gives."""
        how = "fitted in closed form" if quick else "fitted"
        losses = refining.fitted(start.choice, start.shown, how, quick=quick)
        return self._measured(replace(start, losses=losses), how)

    def _mended(self, start: Assembled, mend: Callable[..., Mended]) -> Assembled:
        made, beside = mend(start.losses, start.choice, start.edits())
        if not made:
            return start
        mends, shown = [*start.mends, *made], [*start.shown, *beside]
        return self._better(self._measured(replace(start, mends=mends, shown=shown), TOLD[mend]), start)

    def _measured(self, made: Assembled, how: str) -> Assembled:
        loss = made.losses.measured([*made.losses.edits(made.choice), *made.shown])
        tried = replace(made.tried, label=f"{made.tried.label}, {how}", measured=loss)
        self.search.tried.append(tried)
        return replace(made, tried=tried)

    def _better(self, made: Assembled, start: Assembled) -> Assembled:
        return made if made.loss < start.loss else start


def _even(tried: Tried) -> bool:
    return tried.label.startswith(ONE_SHARE)


TOLD: dict[Callable[..., Mended], str] = {
    heads_refitted: "outputs of heads refitted",
    gaps_closed: "with a factor for what went",
}
