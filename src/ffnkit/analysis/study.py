"""``fk.analyze``: several methods, plans or checkpoints against one uncompressed model, in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ffnkit.analysis import errors as local
from ffnkit.analysis import ntk as kernel
from ffnkit.analysis.ntk import NtkSettings
from ffnkit.analysis.reference import Other, Reference, temporary_plan
from ffnkit.analysis.result import Analysis, Row
from ffnkit.analysis.scalar import singles
from ffnkit.calibration.batches import Batch, kept, prepared
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import newly_initialized
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.targets import select
from ffnkit.plans import Method, Plan, Progress
from ffnkit.surgery.planning import plan

DRAWN = "the head was drawn at random, so f of the kernel is a random function of the last hidden state"
FOLDED = "folded"


@dataclass(frozen=True)
class Candidate:
    """A method or plan to be analysed.

    Attributes:
        what: a method or a plan.
        fold: whether factors are multiplied into the weights first, as ``fk.fold`` does: the function is the same,
            the kernel is not.
    """

    what: Method | Plan
    fold: bool = False

    @property
    def label(self) -> str:
        name = self.what.method if isinstance(self.what, Plan) else self.what.name
        return f"{name}, {FOLDED}" if self.fold else name

    @property
    def settings(self) -> dict[str, Any]:
        return self.what.settings if isinstance(self.what, Plan) else self.what.settings()


Given = Candidate | Method | Plan


def analyze(
    model: nn.Module,
    methods: Mapping[str, Given] | Iterable[Given] | Given = (),
    *,
    data: Iterable[Batch],
    calibration: Iterable[Batch] | StatisticsFile | None = None,
    against: nn.Module | Mapping[str, nn.Module] | None = None,
    errors: bool = True,
    ntk: bool | NtkSettings = True,
    progress: Progress | None = None,
) -> Analysis:
    """Measure how far each method's model is from ``model``, untuned: FFN outputs, hidden states, kernels.

    One plan at a time is put in the model's place and taken out again; the model is the very same afterwards. Plans
    are measured together, a pass of the uncompressed model for all, while their FFNs have no more numbers than its.

    Args:
        model: the uncompressed model, with a head where kernels are wanted.
        methods: methods, plans or :class:`Candidate` s; named by a mapping's keys, else by the methods.
        data: batches for ``model(**batch)`` on which everything is measured; they are held.
        calibration: batches for methods that measure activations, or statistics of a pass; they should be of other
            texts than ``data``.
        against: compressed models, tuned or not, of the same class; a lone one is called "against".
        errors: measure FFN outputs and hidden states on all of ``data``.
        ntk: measure kernels on the first examples of ``data``; settings in place of True change how.

    Raises:
        FfnkitError: nothing to compare, a method that needs ``calibration``, a plan or model that does not fit, no
            logits for the kernel.

    Example:
        >>> fk.analyze(model, [fk.Fusion(0.25), fk.CalibratedFusion(0.25)], data=test, calibration=train)
    """
    candidates, others = _candidates(methods), _models(against)
    if not candidates and not others:
        raise FfnkitError("analyze", "no method and no second model is given", "Give methods=[...] or against=model")
    for candidate in candidates.values():
        _check_calibration(candidate.what, calibration)
    held = kept(data, "data")
    study = _Study(model, held, errors, NtkSettings() if ntk is True else ntk or None, progress)
    calibrated: Any = calibration
    if calibration is not None and not isinstance(calibration, StatisticsFile):
        calibrated = kept(calibration, "calibration")
    last: tuple[Any, Plan] | None = None  # the same method folded and not is planned once
    for name, candidate in candidates.items():
        if last is None or last[0] != candidate.what:
            last = (candidate.what, _planned(model, candidate.what, calibrated, progress))
        given = {"method": last[1].method, "settings": last[1].settings, "fold": candidate.fold}
        study.add(name, temporary_plan(model, last[1], fold=candidate.fold), given)
    for name, other in others.items():
        study.add(name, Reference(model, other), {})
    return Analysis(type(model).__name__, tuple(study.finish()), study.conditions(), study.notes())


class _Study:
    """What is measured, and of the uncompressed model only once."""

    def __init__(
        self, model: nn.Module, data: list[Batch], errors: bool, ntk: NtkSettings | None, progress: Progress | None
    ) -> None:
        self.model, self.data, self.errors, self.ntk, self.progress = model, data, errors, ntk, progress
        self.parameters = sum(ffn.num_parameters for ffn in ffns(model))
        self.tokens: dict[str, int] = {}
        self.rows: list[Row] = []
        self.waiting: list[tuple[Row, Other]] = []
        if ntk is not None:
            self.theta = [ffn.name for ffn in select(ffns(model), ntk.layers)]
            held = (prepared(model, batch) for batch in data)
            self.examples = singles(held, ntk.examples, next(model.parameters()).device)
            self.before = self.kernels(model, {ffn.name: ffn for ffn in ffns(model)})

    def kernels(self, model: nn.Module, found: Mapping[str, FFN]) -> kernel.Kernels:
        assert self.ntk is not None
        return kernel.kernels(
            model,
            [found[name] for name in self.theta],
            self.examples,
            output=self.ntk.output,
            memory=self.ntk.memory,
            progress=self.progress,
        )

    def add(self, name: str, other: Other, given: dict[str, Any]) -> None:
        """Measure the kernel of one; its errors come with those of others."""
        with other:
            after = self.kernels(other.model, other.found) if self.ntk is not None else None
            left = sum(ffn.num_parameters for ffn in other.found.values())
        row = Row(
            name=name,
            **{"method": None, "settings": {}, "fold": False, **given},
            ffn_parameters=left,
            ffn_share=left / self.parameters,
            errors=None,
            ntk=kernel.compare(self.before, after) if after is not None else None,
        )
        if self.errors and self.waiting and sum(r.ffn_parameters for r, _ in self.waiting) + left > self.parameters:
            self.flush()
        self.waiting.append((row, other))

    def flush(self) -> None:
        """Measure the errors of those that wait."""
        rows, others = [row for row, _ in self.waiting], [other for _, other in self.waiting]
        self.waiting = []
        if self.errors and rows:
            found = local.measure(self.model, others, self.data, progress=self.progress)
            rows = [replace(row, errors=each) for row, each in zip(rows, found, strict=True)]
            self.tokens = found[0].tokens
        self.rows += rows

    def finish(self) -> list[Row]:
        """All rows, in the order in which they were added."""
        self.flush()
        return self.rows

    def conditions(self) -> dict[str, Any]:
        """On what it was measured."""
        found: dict[str, Any] = {"ffn_parameters": self.parameters}
        if self.errors:
            found |= {"batches": len(self.data), "tokens": self.tokens}
        if self.ntk is not None:
            found["ntk"] = {
                **asdict(self.ntk),
                "ffns": list(self.theta),
                "parameters": self.before.parameters,
                "passes": self.before.passes,
            }
        return found

    def notes(self) -> tuple[str, ...]:
        return (DRAWN,) if self.ntk is not None and newly_initialized(self.model) else ()


def _candidates(methods: Mapping[str, Given] | Iterable[Given] | Given) -> dict[str, Candidate]:
    if isinstance(methods, Mapping):
        return {name: _candidate(given) for name, given in methods.items()}
    lone = isinstance(methods, Candidate | Plan) or hasattr(methods, "draft")
    given = [_candidate(each) for each in ((methods,) if lone else methods)]  # type: ignore[union-attr]
    return dict(zip(labels(given), given, strict=True))


def _candidate(given: Any) -> Candidate:
    if isinstance(given, Candidate):
        return given
    if not isinstance(given, Plan) and not (hasattr(given, "draft") and hasattr(given, "settings")):
        do = "Give methods such as fk.Fusion(width=0.25), plans, or models as against=..."
        raise FfnkitError("analyze", f"a {type(given).__name__} among the methods", do)
    return Candidate(given)


def labels(candidates: list[Candidate]) -> list[str]:
    """A name for each: the method's, with the settings in which several of one method differ."""
    names = [each.label for each in candidates]
    for name, count in Counter(names).items():
        if count == 1:
            continue
        places = [place for place, each in enumerate(names) if each == name]
        settings = [candidates[place].settings for place in places]
        differ = [key for key in settings[0] if len({str(each.get(key)) for each in settings}) > 1]
        for number, (place, own) in enumerate(zip(places, settings, strict=True), 1):
            names[place] += "".join(f" {key}={own.get(key)}" for key in differ) or f" ({number})"
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def _models(against: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    if against is None:
        return {}
    return {"against": against} if isinstance(against, nn.Module) else dict(against)


def _check_calibration(what: Method | Plan, calibration: Any) -> None:
    if getattr(what, "needs_data", False) and calibration is None:
        name = getattr(what, "name", "a method")
        do = "Give batches of other texts: fk.analyze(..., data=test, calibration=train)"
        raise FfnkitError(f"analyze with {name}", "it measures activations, and no calibration is given", do)


def _planned(model: nn.Module, what: Method | Plan, calibration: Any, progress: Progress | None) -> Plan:
    if isinstance(what, Plan):
        return what
    needed = bool(getattr(what, "needs_data", False))
    return plan(model, what, data=calibration if needed else None, progress=progress)
