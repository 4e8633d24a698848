"""Several methods in one plan, each on FFNs of its own: some are merged, say, and others narrowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from ffnkit.calibration.batches import kept
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.edits import Edit, Stage
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.plans import Draft, Method, Progress
from ffnkit.settings import Doc
from ffnkit.surgery.temporary import TemporaryPlan


@dataclass(frozen=True)
class Combined:
    """Several methods, one after the other, each on FFNs that no other one changes.

    A method that reads data sees the model with the edits of those before it, but for updates, which start at zero. To
    treat one FFN twice (merge it, then narrow what is shared), apply the first plan and plan again. Updates
    (``fk.SparseGrad``, ``fk.DSEE``) go on linears that no other one updates, after what narrows or merges these; what
    any of them trains beside its updates trains.
    """

    methods: Annotated[Sequence[Any], Doc("methods, or mappings of ``method`` and its settings.")]

    name: ClassVar[str] = "combined"
    summary: ClassVar[str] = "several methods in one plan, each on FFNs of its own"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        given = self.methods if isinstance(self.methods, list | tuple) else ()
        if len(given) < 2:
            do = "Give methods=[{method: merging, layers: 0-2}, {method: fusion, layers: 3-5, width: 0.5}]"
            raise FfnkitError(f"combined methods={self.methods!r}", "not a list of two methods or more", do)
        object.__setattr__(self, "methods", tuple(_built(each) for each in given))

    @property
    def needs_data(self) -> bool:
        """Whether one of them does."""
        return any(getattr(method, "needs_data", False) for method in self.methods)

    @property
    def reads_weights(self) -> bool:
        """Whether one of them does."""
        return any(getattr(method, "reads_weights", True) for method in self.methods)

    @property
    def batches(self) -> int:
        """How many batches the one that reads most of them reads, of those that say so."""
        return max((getattr(method, "batches", 0) for method in self.methods), default=0)

    def settings(self) -> dict[str, Any]:
        return {"methods": [{"method": method.name, **method.settings()} for method in self.methods]}

    def chosen(self, model: nn.Module) -> None:
        """Raises FfnkitError where the settings of one do not fit the model, or two name one FFN."""
        by: dict[str, Method] = {}
        for method in self.methods:
            found = method.chosen(model)
            searched = isinstance(found, list) and len(found) > 1 and isinstance(found[0], list)
            for ffn in () if searched else _ffns(found):
                _claim(by, ffn.name, method)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        batches = data if data is None or isinstance(data, StatisticsFile) else kept(data)
        edits: list[Edit] = []
        quantities: dict[str, dict[str, float]] = {}
        report: dict[str, Any] = {}
        by: dict[str, Method] = {}
        self.chosen(model)
        with ExitStack() as stack:
            for number, method in enumerate(self.methods):
                draft = method.draft(model, batches, progress)
                for edit in draft.edits:
                    if edit.renumbers:
                        what = f"it drops the layer of {edit.target}, and those behind it change their numbers"
                        raise FfnkitError(f"{method.name} with others", what, "Apply it first, then plan the others")
                    for name in edit.claimed:
                        _claim(by, name, method)
                _check_updates(model, edits, draft.edits, method)
                edits += draft.edits
                quantities |= draft.quantities
                report |= {f"{number + 1} {method.name}": draft.report} if draft.report else {}
                if method is not self.methods[-1]:
                    stack.enter_context(TemporaryPlan(model, [e for e in draft.edits if not e.trains]))
        return Draft(tuple(edits), quantities, report)


def _claim(by: dict[str, Method], name: str, method: Method) -> None:
    if by.setdefault(name, method) is not method:
        what = f"{name} is changed by {by[name].name} too"
        do = "Name other layers; to treat it twice, apply one plan and plan again"
        raise FfnkitError(f"{method.name} with others", what, do)


def _check_updates(model: nn.Module, earlier: list[Edit], now: Sequence[Edit], method: Method) -> None:
    """Raises FfnkitError where a method changes FFNs that earlier ones update, or updates FFNs that they merge."""
    updated = {edit.target for edit in earlier if edit.stage is Stage.UPDATE}
    touched = {name for edit in now for name in edit.touched}
    tied = {name for edit in earlier if edit.joins for name in edit.touched}
    updating = {edit.target for edit in now if edit.stage is Stage.UPDATE}
    for ffn in ffns(model) if updated or tied else ():
        if ffn.layout.experts:
            continue
        linears = {f"{owner}.{ffn.path(site)}" for owner in ffn.owners for site in ffn.sites}
        if ffn.name in touched and (both := linears & updated):
            what = f"an update of an earlier method is on {min(both)}"
            raise FfnkitError(f"{method.name} with others", what, "Name what changes the FFN first")
        if ffn.name in tied and (both := linears & updating):
            what = f"an earlier method merges {ffn.name}, and {min(both)} with it"
            raise FfnkitError(f"{method.name} with others", what, "Apply that plan first, then plan the update")


def _ffns(found: Any) -> Iterator[FFN]:
    """Those in nested lists, whatever else is in them."""
    if isinstance(found, FFN):
        yield found
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _ffns(each)


def _built(given: Any) -> Any:
    """A method, from itself or from its name and settings."""
    from ffnkit import methods

    if not isinstance(given, dict):
        return given
    settings = dict(given)
    name = settings.pop("method", None)
    if not isinstance(name, str):
        raise FfnkitError(f"combined with {given!r}", "it names no method", "Write {method: fusion, width: 0.5}")
    return methods.build(name, **settings)
