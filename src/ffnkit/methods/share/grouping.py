"""Which layers share an FFN: as told, or the choices among which a search decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.methods.share.windows import Groups, alike, series, signature, windows
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.targets import select
from ffnkit.settings import Doc, WhichLayers, check, told

WANTED = "layers='4-7', groups=['0-3', [5, 7]], window=4, keep=3 or remove=0.5"


@dataclass(frozen=True)
class Sharing:
    """What methods have in common that let layers share an FFN: one of these settings says which layers."""

    layers: Annotated[WhichLayers | None, Doc('one group, e.g. "4-7", [4, 5, 7] or "all".')] = None
    groups: Annotated[
        Sequence[WhichLayers] | None,
        Doc('several groups, each a layer expression or a list of layer numbers, e.g. ["0-3", [4, 6, 7]].'),
    ] = None
    window: Annotated[int | None, Doc("number of adjacent layers; the best window is searched for.", at_least=2)] = None
    keep: Annotated[int | None, Doc("FFNs left in each stack, which says how long the window is.", at_least=1)] = None
    remove: Annotated[
        float | None,
        Doc("the least share of each stack's FFNs to save, which says it too.", above=0, below=1, example=0.5),
    ] = None

    name: ClassVar[str] = "sharing"

    @property
    def fits(self) -> bool:
        """Whether the shared FFN is fitted to what each of its members gives."""
        return False

    @property
    def searches(self) -> bool:
        """Whether several choices are compared."""
        return any(value is not None for value in (self.window, self.remove)) or (
            self.keep is not None and self.groups is None
        )

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return told(self)

    def check(self) -> None:
        """Raises FfnkitError on settings that contradict each other or lie out of range."""
        check(self)
        given = [k for k in ("layers", "groups", "window", "keep", "remove") if getattr(self, k) is not None]
        if len(given) != 1:
            found = f"{', '.join(given) or 'nothing'} says which layers"
            raise FfnkitError(self.name, found, f"Give one: {WANTED}")
        if self.groups is not None and not len(self.groups):
            raise FfnkitError("groups=[]", "no group is given", f"Give one: {WANTED}")

    def chosen(self, model: nn.Module) -> list[Groups]:
        """The groups to choose among: a list of groups for each choice, one choice where nothing is searched.

        Raises:
            FfnkitError: layers that are not there, in two groups, or alone in theirs; windows that do not fit;
                mixtures of experts and nothing beside them; FFNs of unlike shape in one group.
        """
        self.check()
        if not self.searches:
            asked = [self.layers] if self.layers is not None else list(self.groups or ())
            found = ffns(model)
            able = {ffn.name for row in _able(series(found)) for ffn in row}
            groups: Groups = []
            for one in asked:
                rows = series(select(found, one))
                groups += [row for row in rows if row[0].name in able] or rows
            return [self.fitting(groups)]
        rows = self.stacks(model)
        return [self.fitting(groups) for groups in self.windows(rows)]

    def windows(self, rows: Groups) -> list[Groups]:
        """The windows of FFNs of one shape. Raises FfnkitError where there is none."""
        lengths = [self.length(len(one)) for one in rows]
        found = [groups for groups in windows(rows, lengths, least=2) if all(map(alike, groups))]
        if not found:
            what = "no such window holds FFNs of one shape alone"
            raise FfnkitError(f"a window of {max(lengths)} layers", what, "Give a shorter one, or groups of one shape")
        return found

    def stacks(self, model: nn.Module) -> Groups:
        """The FFNs of each stack that may share at all. Raises FfnkitError where there are no two in one."""
        found = series(ffns(model))
        rows = _able(found)
        if not rows:
            self.fitting(found)
            raise FfnkitError(self.name, "no two FFNs of the model lie in one stack", "Use a narrowing method")
        for ffn in (each for row in rows for each in row):
            self._check_own(ffn)
        return rows

    def length(self, layers: int) -> int:
        """The window's length in a stack of so many FFNs."""
        if self.window is not None:
            return self.window
        there = f"there are {layers} FFNs in a stack"
        if self.keep is not None:
            if self.keep >= layers:
                raise FfnkitError(f"keep={self.keep}", there, f"Give a number below {layers}")
            return layers - self.keep + 1
        assert self.remove is not None
        most = (layers - 1) / layers
        if self.remove > most + 1e-9:
            do = f"Give {math.floor(100 * most) / 100:g} or less"
            raise FfnkitError(f"remove={self.remove:g}", f"{there}, and one of them stays", do)
        return next(k for k in range(2, layers + 1) if (k - 1) / layers >= self.remove - 1e-9)

    def fitting(self, groups: Groups) -> Groups:
        """The groups as they are. Raises FfnkitError as :meth:`chosen`."""
        seen: set[str] = set()
        for group in groups:
            names = ", ".join(ffn.name for ffn in group)
            if len(group) < 2:
                raise FfnkitError(f"merging {names}", "a group of one FFN", "Name at least two layers a group")
            for ffn in group:
                if ffn.experts or ffn.active < 1:
                    what = "it is one of a mixture of experts, which see different tokens"
                    raise FfnkitError(f"merging {ffn.name}", what, "Use a narrowing method such as fusion")
                if ffn.name in seen:
                    raise FfnkitError(f"merging {ffn.name}", "it is in two groups", "Name each layer once")
                seen.add(ffn.name)
                self._check_own(ffn)
                mine, first = (signature(each) for each in (ffn, group[0]))
                if mine != first:
                    what = f"{ffn.name} is {mine} and {group[0].name} is {first}"
                    raise FfnkitError(f"merging {names}", what, "Name layers whose FFNs have one shape")
        return groups

    def _check_own(self, ffn: FFN) -> None:
        ffn.check_plain(f"merging {ffn.name}")
        if self.fits and ffn.tied:
            what = f"it is shared already, with {', '.join(ffn.tied)}"
            do = "Share all of them in one plan, or export the model first: each layer then has an FFN of its own"
            raise FfnkitError(f"merging {ffn.name}", what, do)


def _able(rows: Groups) -> Groups:
    """The series whose FFNs may share: two or more, and no routed experts."""
    return [one for one in rows if len(one) > 1 and not one[0].experts and one[0].active == 1]
