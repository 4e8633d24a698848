"""Which moves keep a target at the least loss: foreseen one by one, assembled, measured, chosen again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ffnkit.budget.moves import Choice, Graded, Joint
from ffnkit.ops.knapsack import cheapest

AGAIN = 6  # joint moves that are measured beside those that were taken, a step, at most
CANDIDATES = 8  # joint moves of the least loss for what they save that may be exchanged for others
HOPELESS = 3.0  # times the least loss that is foreseen: more joint moves are not tried then
ONE_SHARE = "one share for all"
TRIES = 8  # to keep the true count where the counts of single moves do not quite add up


@dataclass(frozen=True)
class Tried:
    """A choice that was assembled: what it was tried as, the loss that was foreseen and measured, and its count."""

    label: str
    choice: Choice
    foreseen: float
    measured: float
    count: int


@dataclass
class Search:
    """A target, what may go, and how losses are measured.

    Args:
        graded, joints: what may go, with its foreseen losses. whole, limit: of the target.
        together: the loss of joint moves without others. assembled: the loss of a choice.
        count: what a choice leaves of the target, exactly. borne: whether the model bears a joint move.
        uniform: one share for all FFNs, as standard checkpoints have it. stand: whether it bears several joint moves
            together: of a stack one layer stays, of some families one of each kind.

    Attributes:
        tried: what was assembled, in order. scales: by which factor graded losses were foreseen too low, by kind.
    """

    graded: Sequence[Graded]
    joints: Sequence[Joint]
    whole: int
    limit: int
    together: Callable[[tuple[Joint, ...]], float]
    assembled: Callable[[Choice], float]
    count: Callable[[Choice], int]
    borne: Callable[[Joint], bool] = lambda _: True
    uniform: bool = False
    stand: Callable[[tuple[Joint, ...]], bool] = lambda _: True
    tried: list[Tried] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=lambda: {"neurons": 1.0, "heads": 1.0})
    _together: dict[frozenset[int], float] = field(default_factory=dict)
    _borne: dict[int, bool] = field(default_factory=dict)
    _stood: dict[frozenset[int], bool] = field(default_factory=dict)

    def run(self, rounds: int = 2) -> Tried | None:
        """The best choice that was found; None where the target cannot be reached.

        Joint moves are taken one after the other, the one that loses least for what it saves, each measured beside
        those before it. What is missing then is filled by neurons and heads, by their foreseen losses. The most
        promising choices are assembled and measured, with their neighbours; so are narrowing alone, in one share for
        all FFNs (of heads, where neurons save nothing), and layers alone. What was measured corrects what is foreseen,
        for as many rounds as are asked for.
        """
        path = self._path(self.joints)
        kind = "FFNs" if any(each.kind == "neurons" for each in self.graded) else "heads"
        self._try(f"{ONE_SHARE} {kind}", (), uniform=True)
        layers = [each for each in self.joints if each.kind == "layers"]
        ended = self._path(layers, to_the_end=True)
        for joint in ended[:0:-1]:
            if self._try("layers alone", joint) is not None:
                break
        least = float("inf")
        for number in range(rounds + 1):
            some = self._climb(path)
            if not some or number == rounds or (number and self._least == least):
                break  # what was corrected found nothing better
            least = self._least
            path = self._corrected(path)
        if self.best is None:  # what was taken first may bar the layers that would save most
            for joint in self._path(self.joints, ended[-1], to_the_end=True):
                if self._try("as much as may go", joint) is not None:
                    break
        return self.best

    def under(self, limit: int) -> Search:
        """The same search under another limit, with what holds under any: losses of joint moves alone, and scales."""
        return replace(self, limit=limit, tried=[])

    def rate(self) -> float:
        """The loss that is foreseen for one of the target, where neurons and heads alone keep it; else infinite."""
        choice = self.fill(())
        return float("inf") if choice is None else self.foreseen(choice) / max(self.whole - self.limit, 1)

    @property
    def best(self) -> Tried | None:
        """What was measured best so far."""
        return min(self.tried, key=lambda each: each.measured, default=None)

    @property
    def _least(self) -> float:
        return min((each.measured for each in self.tried), default=float("inf"))

    # --- joint moves

    def loss(self, joint: Iterable[Joint]) -> float:
        """The measured loss of joint moves without others."""
        joint = tuple(joint)
        key = frozenset(map(id, joint))
        if key not in self._together:
            self._together[key] = joint[0].alone if len(joint) == 1 else self.together(joint) if joint else 0.0
        return self._together[key]

    def _path(
        self, joints: Sequence[Joint], start: tuple[Joint, ...] = (), *, to_the_end: bool = False
    ) -> list[tuple[Joint, ...]]:
        """None, one, two, ... joint moves, until they alone keep the target, or more of them are hopeless.

        Args:
            start: moves that are taken already, in place of none.
        """
        path: list[tuple[Joint, ...]] = [start]
        rates = {id(each): each.alone / each.saving for each in joints}
        least = float("inf")
        while self.whole - sum(each.saving for each in path[-1]) > self.limit:
            taken = path[-1]
            if not to_the_end:
                if (choice := self.fill(taken)) is not None:
                    least = min(least, self.foreseen(choice))
                if self.loss(taken) > HOPELESS * least:
                    break
            longer = self._next(taken, joints, rates)
            if longer is None:
                break
            path.append(longer)
        return path

    def _next(
        self, taken: tuple[Joint, ...], joints: Sequence[Joint], rates: dict[int, float]
    ) -> tuple[Joint, ...] | None:
        """With the move that adds least loss for what it saves. Losses seldom shrink beside others: the lowest known
        rate is measured anew until it stays the lowest."""
        free = {id(each): (each, more) for each in joints if (more := _with(taken, each)) is not None}
        fresh: set[int] = set()
        while free:
            lowest = min(free, key=lambda key: rates[key])
            joint, more = free[lowest]
            if lowest in fresh or len(fresh) >= AGAIN:
                return free[min(fresh, key=lambda key: rates[key])][1]
            if not self._bears(joint) or not self._stand(more):
                del free[lowest]
                continue
            saved = sum(each.saving for each in more) - sum(each.saving for each in taken)
            rates[lowest] = (self.loss(more) - self.loss(taken)) / max(saved, 1e-12)
            fresh.add(lowest)
        return None

    def _bears(self, joint: Joint) -> bool:
        if id(joint) not in self._borne:
            self._borne[id(joint)] = self.borne(joint)
        return self._borne[id(joint)]

    def _stand(self, joint: tuple[Joint, ...]) -> bool:
        key = frozenset(map(id, joint))
        if key not in self._stood:
            self._stood[key] = len(joint) < 2 or self.stand(joint)
        return self._stood[key]

    # --- neurons and heads

    def fill(self, joint: tuple[Joint, ...], *, uniform: bool = False) -> Choice | None:
        """Joint moves, and the neurons and heads that go beside them to keep the target; None where too few can.

        By the counts of single moves; :meth:`exact` keeps the true count.
        """
        return self._filled(joint, self.limit, uniform=uniform or self.uniform)

    def exact(self, joint: tuple[Joint, ...], *, uniform: bool = False) -> Choice | None:
        """The same by what the choice truly leaves."""
        limit = self.limit
        for _ in range(TRIES):
            choice = self._filled(joint, limit, uniform=uniform or self.uniform)
            over = 0 if choice is None else self.count(choice) - self.limit
            if over <= 0:
                return choice
            limit -= over
        return None

    def _filled(self, joint: tuple[Joint, ...], limit: int, *, uniform: bool) -> Choice | None:
        covered = {name for each in joint for name in each.covers}
        left = [each for each in self.graded if each.name not in covered]
        if uniform:
            kind = "neurons" if any(each.kind == "neurons" for each in left) else "heads"
            left = [each for each in left if each.kind == kind]
        fixed = self.whole - sum(each.saving for each in joint) - sum(each.unit * each.whole for each in left)
        kept = _even(left, limit - fixed) if uniform else self._cheapest(left, limit - fixed)
        if uniform and kept is not None and not self.uniform:  # what one step of all would leave unused comes back
            kept = self._cheapest(left, limit - fixed, kept)
        if kept is None:
            return None
        return Choice(joint, {e.name: number for e, number in zip(left, kept, strict=True) if number < e.whole})

    def _cheapest(self, left: list[Graded], budget: float, around: list[int] | None = None) -> list[int] | None:
        """How many stay of each at the least foreseen loss; what still fits then comes back.

        Args:
            around: as many stay of each, or a step more.
        """
        options = [each.options for each in left]
        if around is not None:
            options = [row[(at := row.index(number)) : at + 2] for row, number in zip(options, around, strict=True)]
        sizes = [[-int(-each.unit * n // 1) for n in row] for each, row in zip(left, options, strict=True)]
        costs = [dict(zip(each.options, each.costs, strict=True)) for each in left]
        prices = [
            [self.scales[each.kind] * cost[n] for n in row]
            for each, cost, row in zip(left, costs, options, strict=True)
        ]
        if sum(row[0] for row in sizes) > budget:
            return None
        picked = cheapest(sizes, prices, int(budget)) if left else []
        slack = budget - sum(row[number] for row, number in zip(sizes, picked, strict=True))
        while True:
            steps = [
                (row[at] - row[at + 1], sizes[place][at + 1] - sizes[place][at], place)
                for place, (row, at) in enumerate(zip(prices, picked, strict=True))
                if at + 1 < len(row) and sizes[place][at + 1] - sizes[place][at] <= slack
            ]
            if not steps:
                return [row[number] for row, number in zip(options, picked, strict=True)]
            _, size, place = max(steps, key=lambda step: step[0] / step[1])
            picked[place] += 1
            slack -= size

    def foreseen(self, choice: Choice, of_joint: float | None = None) -> float:
        """The loss that a choice is foreseen to have; ``of_joint``: that of its joint moves, where it is not asked."""
        costs = {each.name: dict(zip(each.options, each.costs, strict=True)) for each in self.graded}
        kinds = {each.name: each.kind for each in self.graded}
        graded = sum(self.scales[kinds[name]] * costs[name][number] for name, number in choice.kept.items())
        return (self.loss(choice.joint) if of_joint is None else of_joint) + graded

    # --- assembled

    def _try(self, label: str, joint: tuple[Joint, ...], *, uniform: bool = False) -> Tried | None:
        choice = self.exact(joint, uniform=uniform)
        if choice is None:
            return None
        known = next((each for each in self.tried if each.choice.key == choice.key), None)
        if known is not None:
            return known
        found = Tried(label, choice, self.foreseen(choice), self.assembled(choice), self.count(choice))
        self.tried.append(found)
        return found

    def _climb(self, path: list[tuple[Joint, ...]]) -> bool:
        """Assemble what is foreseen best along the path, and its neighbours as long as they are better; whether there
        is anything."""
        fills = [self.fill(joint) for joint in path]
        places = [number for number, choice in enumerate(fills) if choice is not None]
        if not places:
            return False
        losses = {number: self.foreseen(choice) for number in places if (choice := fills[number]) is not None}
        at = min(places, key=lambda number: losses[number])
        measured: dict[int, float] = {}

        def value(number: int) -> float:
            if number not in measured:
                found = self._try("assembled", path[number])
                measured[number] = found.measured if found is not None else float("inf")
            return measured[number]

        while True:
            near = [number for number in (at - 1, at, at + 1) if number in losses]
            best = min(near, key=value)
            if best == at:
                return bool(self.tried)
            at = best

    def _corrected(self, path: list[tuple[Joint, ...]]) -> list[tuple[Joint, ...]]:
        """Factors of the foreseen losses from what the best choice has of each kind alone; and further sets of joint
        moves, near those of the best choice."""
        best = self.best
        assert best is not None
        for kind in self.scales:
            names = {each.name for each in self.graded if each.kind == kind}
            mine = {name: number for name, number in best.choice.kept.items() if name in names}
            if mine and (told := self.foreseen(Choice((), mine))) > 0:
                self.scales[kind] *= max(self.assembled(Choice((), mine)) / told, 1e-3)
        return [*path, *self._near(best.choice.joint)]

    def _near(self, joint: tuple[Joint, ...]) -> list[tuple[Joint, ...]]:
        """Sets of joint moves with one more, one less or one exchanged: the few that are foreseen best as if losses
        added up, of moves that lose least alone."""
        cheap = sorted(self.joints, key=lambda each: each.alone / each.saving)[:CANDIDATES]
        sets: dict[frozenset[int], tuple[Joint, ...]] = {}
        for out in (None, *joint):
            rest = tuple(each for each in joint if each is not out)
            covered = {name for each in rest for name in each.covers}
            free = [each for each in cheap if each not in joint and covered.isdisjoint(each.covers)]
            for more in (None, *free):
                found = rest if more is None else (*rest, more)
                sets.setdefault(frozenset(map(id, found)), found)
        rough: list[tuple[float, int, tuple[Joint, ...]]] = []
        for number, found in enumerate(sets.values()):
            choice = self.fill(found)
            if choice is not None and all(map(self._bears, found)) and self._stand(found):
                gone = sum(each.alone for each in joint if each not in found)
                more_lost = sum(each.alone for each in found if each not in joint)
                loss = self.loss(joint) - gone + more_lost + self.foreseen(choice, of_joint=0.0)
                rough.append((loss, number, found))
        return [found for *_, found in sorted(rough)[:AGAIN]]


def _with(taken: tuple[Joint, ...], joint: Joint) -> tuple[Joint, ...] | None:
    """Moves with one more, a longer run of layers that share in the place of those within it; None where one of them
    bars it."""
    mine = set(joint.covers)
    out = [each for each in taken if not mine.isdisjoint(each.covers)]
    if any(joint.kind != "sharing" or each.kind != "sharing" or not set(each.covers) < mine for each in out):
        return None
    return (*(each for each in taken if each not in out), joint)


def _even(left: list[Graded], budget: float) -> list[int] | None:
    """The largest one share of all within the budget."""
    marks = sorted({number / each.whole for each in left for number in each.options}, reverse=True)
    for mark in marks:
        kept = [max((n for n in each.options if n <= mark * each.whole), default=each.options[0]) for each in left]
        if sum(each.unit * number for each, number in zip(left, kept, strict=True)) <= budget:
            return kept
    return [] if not left and budget >= 0 else None
