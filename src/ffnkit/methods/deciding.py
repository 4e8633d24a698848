"""Settings decided on held-out text of another kind than the fitted one; how far apart draws of the text lead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffnkit.calibration.batches import Batch, kept
from ffnkit.calibration.drift import Drift, comparable
from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.methods.calibrating import HELD, calibrate
from ffnkit.methods.common import Narrowing
from ffnkit.plans import Progress
from ffnkit.settings import settings_of
from ffnkit.surgery.temporary import temporarily

CANDIDATES: dict[str, tuple[Any, ...]] = {
    "select": ("loss", "leverage"),
    "ridge": (0.03, 0.3, 1.0),
    "refine": (0, 300),
    "refine_metric": ("norm",),
    "tokens": (2048,),
}  # beside what a method has
FEW = 4  # layers that candidates are tried on
JUDGED = 8192  # tokens of held-out text that are compared
GAIN = 0.01  # relative; less is no reason to leave what was set


@dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
        method: with the settings that did best. tried: the settings and figures of each trial, in order.
        layers: the FFNs that were narrowed in the trials.
    """

    method: Any
    tried: list[dict[str, Any]]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        given = [
            f"{key}={getattr(self.method, key)}" for key in dict.fromkeys(k for t in self.tried for k in t["given"])
        ]
        return f"{', '.join(given)}: best of {len(self.tried)} on held-out text, {len(self.layers)} layers narrowed"


@torch.no_grad()
def decide(
    model: nn.Module,
    fit: Iterable[Batch],
    held: Iterable[Batch],
    method: Any,
    candidates: Mapping[str, Sequence[Any]] | None = None,
    *,
    layers: int = FEW,
    progress: Progress | None = None,
) -> Decision:
    """The method with those of the candidate settings that lose least on held-out text.

    Settings are decided one after the other, each with the values that the earlier ones got: the method's own value,
    then the candidates. A few layers, spread over the depth, are narrowed together as the method says; statistics are
    taken once, of these layers, where they do for the method. Another value is taken where it gains more than a
    hundredth.

    Args:
        fit: batches that the trials are fitted to. held: batches of other text, of another kind where there is one
            (:func:`ffnkit.tune.deciding_batches` gives both).
        method: one that narrows, with data. candidates: values by setting; None takes ``CANDIDATES`` of the settings
            that it has.
        layers: how many are narrowed.

    Raises:
        FfnkitError: no candidate is a setting of the method, or a trial's error.
    """
    asked = f"deciding settings of {method.name}"
    if not isinstance(method, Narrowing):
        raise FfnkitError(asked, "it narrows no FFN", "Use calibrated-fusion, or set them yourself")
    known = [each.name for each in settings_of(type(method))]
    if getattr(method, "refit", None) is False:
        known.remove("ridge")  # of the refit that is not asked for
    wanted = {name: values for name, values in (candidates or CANDIDATES).items() if candidates or name in known}
    if not wanted or (unknown := [name for name in wanted if name not in known]):
        what = f"it has no setting {unknown[0]} that counts" if wanted else f"it has none of {', '.join(CANDIDATES)}"
        raise FfnkitError(asked, what, "Use calibrated-fusion, or set them yourself")
    chosen = [(ffn, width) for ffn, width in method.chosen(model) if width < ffn.width]
    if not chosen:
        raise FfnkitError(asked, "no FFN gets narrower", "Give a smaller width")
    step = (len(chosen) - 1) / max(min(layers, len(chosen)) - 1, 1)
    few = [chosen[round(number * step)] for number in range(min(layers, len(chosen)))]
    trial = dataclasses.replace(method, width={ffn.name: width for ffn, width in few})
    places = ",".join(f"{ffn.stack}:{ffn.layer}" if ffn.stack else str(ffn.layer) for ffn, _ in few)
    held_inputs = max(HELD, getattr(method, "tokens", HELD))
    data = kept(fit) if method.beyond else calibrate(model, fit, layers=places, held=held_inputs, progress=progress)
    judge = Drift(model, held, JUDGED)
    tried: list[dict[str, Any]] = []
    total = 1 + sum(len([v for v in values if v != getattr(method, name)]) for name, values in wanted.items())

    def lost(settings: dict[str, Any]) -> float:
        draft = dataclasses.replace(trial, **settings).draft(model, data, None)
        figures = moved(model, draft.edits, judge)
        tried.append({"given": {name: getattr(method, name) for name in wanted} | settings, **figures})
        if progress is not None:
            progress(len(tried), total, "settings")
        return comparable(next(iter(figures.values())))

    best: dict[str, Any] = {}
    least = lost(best)
    for name, values in wanted.items():
        found = [(lost({**best, name: value}), value) for value in values if value != getattr(method, name)]
        smallest = min(found, key=lambda each: each[0], default=(least, None))
        if smallest[0] < least * (1 - GAIN):
            least, best[name] = smallest
    return Decision(dataclasses.replace(method, **best), tried, tuple(ffn.name for ffn, _ in few))


def moved(model: nn.Module, edits: Iterable[Edit], judge: Drift) -> dict[str, float]:
    """The figures with the edits in the model for a while."""
    with temporarily(model, edits):
        return judge.measure()
