"""A model brought to a target: neurons, heads, FFNs, attentions, layers and sharing compete, and the loss decides."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import nn

from ffnkit.budget.expecting import passed, timed, works
from ffnkit.budget.finishing import Finish
from ffnkit.budget.losses import Losses, held_out
from ffnkit.budget.moves import PARTS, Choice, Joint, Space
from ffnkit.budget.search import Search, Tried
from ffnkit.budget.sharing import shared_runs
from ffnkit.budget.speed import Speed
from ffnkit.budget.targets import Target, check_key_values
from ffnkit.calibration.batches import Batch
from ffnkit.calibration.drift import BROKEN
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Layers, need_data
from ffnkit.methods.expecting import Work
from ffnkit.methods.narrow.calibrated import CalibratedFusion
from ffnkit.model.attention import attentions
from ffnkit.plans import Draft, Progress, check_weights
from ffnkit.settings import Doc, check, told
from ffnkit.surgery.apply import check_edits
from ffnkit.surgery.trial import try_out

UNIFORM = ("neurons", "layers")  # what saves something in a standard checkpoint
COUNTED = {"sharing": ("params", "bytes")}  # targets to which a part gives nothing otherwise
LATENCY_ROUNDS = 5


@dataclass(frozen=True)
class FitTo:
    """Bring a model to a target of parameters, FLOPs, bytes, keys and values, or time, at the least loss.

    One of ``params``, ``flops``, ``bytes``, ``kv`` and ``latency`` is given: a share of what the model has (float), or
    how much may be left (int). Single moves are foreseen: what their loss at the model's end is. Chosen together they
    are assembled and measured on rows that no fit saw, against one share for all FFNs and layers alone; what was
    measured corrects what is foreseen.

    Source: ours. The curves are those of data-aware fusion; block influence and greedy depth: ShortGPT (arXiv
        2403.03853), SLEB (arXiv 2402.09025).
    """

    params: Annotated[float | int | None, Doc("parameters, a shared one once.")] = None
    flops: Annotated[float | int | None, Doc("FLOPs a token, as inspect counts them.")] = None
    bytes: Annotated[float | int | None, Doc("bytes of the compact checkpoint's weights.")] = None
    kv: Annotated[float | int | None, Doc("bytes of keys and values at ``context`` tokens.")] = None
    latency: Annotated[float | None, Doc("seconds of a batch of the data, on this machine.")] = None
    context: Annotated[int, Doc("tokens of a sequence whose keys and values are counted.", at_least=1)] = 4096
    layers: Layers = "all"
    parts: Annotated[
        Sequence[str],
        Doc("what may go; sharing lets adjacent layers use one FFN.", choices=PARTS),
    ] = PARTS
    multiple: Annotated[
        int | None, Doc("widths are multiples of it; none: 64, and 8 below 1024 neurons.", at_least=1)
    ] = None
    uniform: Annotated[bool, Doc("one share for all FFNs, and whole layers: as standard checkpoints have it.")] = False
    rounds: Annotated[int, Doc("how often what was measured corrects the choice.", at_least=0)] = 2
    effort: Annotated[
        Literal["fast", "default", "best"],
        Doc(
            'how what was chosen is fitted, as calibrated-fusion does it: "fast" in closed form alone, each layer on '
            'its own; "best" with long regressions, one share for all FFNs too.'
        ),
    ] = "default"

    name: ClassVar[str] = "fit-to"
    summary: ClassVar[str] = "bring a model to one target by all that can go"
    paper: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True

    def settings(self) -> dict[str, Any]:
        return told(self)

    @property
    def target(self) -> Target:
        """The one target. Raises FfnkitError where none or several are given."""
        given = {kind: getattr(self, kind) for kind in ("params", "flops", "bytes", "kv", "latency")}
        return Target.of(given, self.context)

    def chosen(self, model: nn.Module) -> Space:
        """What may go. Raises FfnkitError where settings, layers or the target do not fit the model."""
        check(self)
        target = self.target
        counted = Target("flops", target.amount) if target.kind == "latency" else target
        parts = self._saving(self.parts)
        if target.kind == "kv" and not target.count(model):
            writes = getattr(model, "can_generate", lambda: False)() and not attentions(model)
            what = "has no attention of a known layout" if writes else "keeps no keys and values"
            raise FfnkitError(
                f"target {target}", f"{type(model).__name__} {what}", "Take params, flops, bytes or latency"
            )
        if not parts:
            form = " in standard form" if self.uniform else ""
            what = f"{', '.join(self.parts)} cannot save any of it{form}" if self.parts else "no parts are given"
            raise FfnkitError(f"target {target}", what, f"Give parts among {', '.join(self._saving(PARTS))}")
        space = Space(model, counted, self.layers, parts, self.multiple)
        for ffn in space.found:
            ffn.check_plain(f"fitting {ffn.name}")
        least = space.whole - space.most(sharing="sharing" in parts)
        if target.kind != "latency" and least > space.limit:
            what = f"with {', '.join(parts)} of layers {self.layers} at least {least:,} of {space.whole:,} stay"
            raise FfnkitError(f"target {target}", what, "Give a larger one, more layers, or more parts")
        return space

    def _saving(self, parts: Sequence[str]) -> list[str]:
        """Those of the parts that can save something of the target, in the form that is wanted."""
        kind = self.target.kind
        counted = [each for each in parts if kind in COUNTED.get(each, (kind,))]
        return [each for each in counted if each in UNIFORM] if self.uniform else counted

    def expects(self, model: nn.Module, tokens: int) -> tuple[list[Work], float]:
        """About what it takes on so many tokens: the work for each FFN, and the tokens that pass the model."""
        space, every = self.chosen(model), self.effort == "best"
        through = passed(space, self._fitting, tokens, every=every)
        again = timed() if self.target.kind == "latency" else 0.0
        return works(space, self._fitting, tokens, every=every), through + again

    @property
    def _fitting(self) -> CalibratedFusion | None:
        """How FFNs are fitted in the end; None: in closed form alone."""
        return None if self.effort == "fast" else CalibratedFusion(width=1, effort=self.effort)

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        started = time.perf_counter()
        batches = list(need_data(data, self.name))
        space = self.chosen(model)
        target = self.target
        for ffn in space.found:
            check_weights(ffn.raw(), ffn.name)
        if target.kind == "kv":
            check_key_values(model, batches[0], f"target {target}")
        fitted, measured = held_out(batches)
        _leave_out_unborne(space)
        losses = Losses(space, fitted, measured, progress)
        losses.foresee()
        if "sharing" in self.parts and not self.uniform and target.kind in COUNTED["sharing"]:
            shared_runs(space, losses, fitted, self._search(space, losses).rate())
        speed = Speed(model, measured[0]) if target.kind == "latency" else None
        found, search = self._searched(space, losses, speed)
        if found is None:
            do = "Give a larger one, more layers, or more parts"
            raise FfnkitError(f"target {target}", "what may go does not reach it", do)

        def keeps(choice: Choice) -> bool:
            return speed is None or speed.ratio(losses.edits(choice)) <= float(self.target.amount)

        made = Finish(search, losses, self._fitting, every=self.effort == "best", keeps=keeps).run(found)
        if speed is not None and speed.ratio(made.losses.edits(made.choice)) > float(self.target.amount):
            speed.ratio(made.losses.edits(made.choice))  # of what comes back, that is told
        if made.loss >= BROKEN:
            do = "Load the model with dtype float32 or bfloat16, or give a larger target"
            raise FfnkitError(f"target {target}", "whatever reaches it, the model's numbers overflow", do)
        report = _report(target, space, search, made.tried, speed) | {"seconds": time.perf_counter() - started}
        return Draft(tuple(made.edits()), _quantities(space, made.choice), {"target": report})

    def _searched(self, space: Space, losses: Losses, speed: Speed | None) -> tuple[Tried | None, Search]:
        """The best choice; of time, that with the FLOPs under which the time is kept."""
        asked = float(self.target.amount)
        share = asked
        best: tuple[Tried | None, Search] | None = None
        search = self._search(space, losses)
        for _ in range(LATENCY_ROUNDS if speed is not None else 1):
            search = search.under(space.limit)
            found = search.run(self.rounds)
            if speed is None:
                return found, search
            if found is None:
                break
            edits = losses.edits(found.choice)
            ratio = speed.ratio(edits)
            if ratio <= asked:
                ratio = max(ratio, speed.ratio(edits))  # of several that are timed one passes by chance
            if ratio <= asked:
                if best is None or best[0] is None or found.measured <= best[0].measured:
                    best = found, search
                if ratio >= 0.98 * asked:
                    break
            share = min(
                0.99, max(0.01, share + 0.9 * (asked - ratio) if ratio > asked else share + 0.5 * (asked - ratio))
            )
            space.limit = int(share * space.whole)
        if best is None:
            what = "what may go does not reach it by what was measured"
            raise FfnkitError(f"target {self.target}", what, "Give a larger one, or time it on an idle machine")
        return best

    def _search(self, space: Space, losses: Losses) -> Search:
        return Search(
            space.graded,
            space.joints,
            space.whole,
            space.limit,
            losses.together,
            losses.assembled,
            lambda choice: space.count(space.shapes(choice)),
            lambda joint: _bears(space, joint),
            self.uniform,
            lambda joint: _stand(space, joint),
        )


def _leave_out_unborne(space: Space) -> None:
    """Heads of families whose forward does not bear it are no choice: one attention of each structure is tried."""
    verdicts: dict[Any, bool] = {}
    for each in space.attentions:
        key = (type(each.inner), each.heads, each.kv_heads, each.cross)
        if key not in verdicts:
            verdicts[key] = _bear(space.model, [e for j in space.joints if j.name == each.name for e in j.edits])
        if not verdicts[key]:
            space.leave_out(each.name)


def _bears(space: Space, joint: Joint) -> bool:
    return joint.kind != "layers" or _bear(space.model, joint.edits)


def _stand(space: Space, joint: tuple[Joint, ...]) -> bool:
    """Whether a model is left with these moves together: not without any layer, or any of a kind."""
    layers = tuple(edit for each in joint if each.kind == "layers" for edit in each.edits)
    try:
        if layers:
            check_edits(space.model, layers)
        space.count(space.shapes(Choice(joint)))
    except FfnkitError:
        return False
    return True


def _bear(model: nn.Module, edits: Sequence[Any]) -> bool:
    try:
        check_edits(model, tuple(edits))
        try_out(model, edits)
    except FfnkitError:
        return False
    return True


def _quantities(space: Space, choice: Choice) -> dict[str, dict[str, float]]:
    """What was foreseen of each place that changes."""
    found = {each.name: {"foreseen loss": each.alone} for each in choice.joint}
    for each in space.graded:
        if each.name in choice.kept:
            found[each.name] = {"foreseen loss": each.costs[each.options.index(choice.kept[each.name])]}
    return found


def _report(target: Target, space: Space, search: Search, found: Tried, speed: Speed | None) -> dict[str, Any]:
    """How the choice was made, as plain data."""
    taken = [
        {"what": each.kind, "name": each.name, "saving": each.saving, "alone": each.alone}
        for each in found.choice.joint
    ]
    tried = [
        {"how": each.label, "foreseen": each.foreseen, "measured": each.measured, "left": each.count,
         "goes": _counts(each.choice)} for each in search.tried
    ]  # fmt: skip
    kept = found.choice.kept
    report: dict[str, Any] = {
        **asdict(target),
        "before": space.whole,
        "left": found.count,
        "foreseen": found.foreseen,
        "measured": found.measured,
        "joint": taken,
        "kept": {each.name: [each.whole, kept[each.name]] for each in space.graded if each.name in kept},
        "tried": tried,
    }  # fmt: skip
    return report if speed is None else report | {"seconds of a batch": speed.last}


def _counts(choice: Choice) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in choice.joint:
        counts[each.kind] = counts.get(each.kind, 0) + 1
    return counts | ({"narrowed": len(choice.kept)} if choice.kept else {})
