"""Which layers share: found by what sharing does to the whole model, one choice after the other put in place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from ffnkit.edits import Edit
from ffnkit.methods.share.windows import Groups, alike, label
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons
from ffnkit.plans import Progress
from ffnkit.surgery.temporary import temporarily, with_neurons


class Search:
    """The choice of groups that moves the model least.

    Args:
        measure: how far the model, as it is, has moved; less is better. fit: the edits that let a group share an FFN.
    """

    def __init__(
        self,
        model: nn.Module,
        measure: Callable[[], float],
        fit: Callable[[list[FFN]], list[Edit]],
        progress: Progress | None = None,
    ) -> None:
        self.model, self.measure, self.fit, self.progress = model, measure, fit, progress
        self.told: dict[str, float] = {}
        self._fitted: dict[tuple[str, ...], list[Edit]] = {}

    def best_of(self, choices: list[Groups], tries: int) -> tuple[Groups, dict[str, float]]:
        """The best of these choices, and every one that was measured.

        Args:
            tries: choices measured at most; those come first whose members the model can best do without.
        """
        if len(choices) > tries:
            alone = self._alone([ffn for groups in choices for group in groups for ffn in group])
            choices = sorted(choices, key=lambda groups: sum(_rank(group, alone) for group in groups))[:tries]
        if len(choices) == 1:
            return choices[0], self.told
        return min(choices, key=self._of), self.told

    def grown(self, rows: Groups, remove: list[int], tries: int) -> tuple[Groups, dict[str, float]]:
        """Neighbours of one shape become one, one step after the other, until so many FFNs of each stack are gone.

        At each step every choice is measured beside those taken before, or the ``tries`` that promise most.
        """
        alone = self._alone([ffn for one in rows for ffn in one])
        state = [[[ffn] for ffn in one] for one in rows]
        left = list(remove)
        while any(left):
            pairs = [(s, i) for s, groups in enumerate(state) if left[s] for i in range(len(groups) - 1)]
            choices = [(s, i) for s, i in pairs if alike(state[s][i] + state[s][i + 1])]
            choices.sort(key=lambda c: _rank(state[c[0]][c[1]] + state[c[0]][c[1] + 1], alone))
            best: tuple[float, int, int] | None = None
            for stack, i in choices[:tries]:
                value = self._of(self._joined(state, stack, i))
                if best is None or value < best[0]:
                    best = value, stack, i
            assert best is not None
            _, stack, i = best
            state = self._all_joined(state, stack, i)
            left[stack] -= 1
        return [group for groups in state for group in groups if len(group) > 1], self.told

    def _all_joined(self, state: list[Groups], stack: int, i: int) -> list[Groups]:
        own = state[stack]
        joined = [*own[:i], own[i] + own[i + 1], *own[i + 2 :]]
        return [joined if number == stack else groups for number, groups in enumerate(state)]

    def _joined(self, state: list[Groups], stack: int, i: int) -> Groups:
        return [group for groups in self._all_joined(state, stack, i) for group in groups if len(group) > 1]

    def _of(self, groups: Groups) -> float:
        """How far the model moves where these groups share."""
        edits = []
        for group in groups:
            key = tuple(ffn.name for ffn in group)
            if key not in self._fitted:
                self._fitted[key] = self.fit(group)
            edits += self._fitted[key]
        with temporarily(self.model, sorted(edits, key=lambda edit: edit.stage)):
            value = self.measure()
        self.told[label(groups)] = value
        if self.progress is not None:
            self.progress(len(self.told), len(self.told) + 1, label(groups))
        return value

    def _alone(self, found: list[FFN]) -> dict[str, float]:
        """How far the model moves without each FFN: what it costs at most, about, to give it up."""
        result = {}
        for ffn in {each.name: each for each in found}.values():
            own = ffn.raw()
            nothing = Neurons(**{name: torch.zeros_like(value) for name, value in own.tensors().items()})
            with ExitStack() as stack, torch.no_grad():
                stack.enter_context(with_neurons(ffn, nothing))
                result[ffn.name] = self.measure()
        return result


def _rank(group: list[FFN], alone: dict[str, float]) -> float:
    """What a group may cost: all but the member that is hardest to do without."""
    costs = sorted(alone[ffn.name] for ffn in group)
    return sum(costs[:-1])
