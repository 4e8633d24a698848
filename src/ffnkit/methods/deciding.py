"""Settings decided on held-out text of another kind than the fitted one; how far apart draws of the text lead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, first_tensor, kept, run
from ffnkit.edits import Edit
from ffnkit.errors import FfnkitError
from ffnkit.methods.calibrating import calibrate
from ffnkit.model.trainable import body
from ffnkit.plans import Progress
from ffnkit.settings import settings_of
from ffnkit.surgery.temporary import temporarily

CANDIDATES: dict[str, tuple[Any, ...]] = {
    "ridge": (0.03, 0.3, 1.0),
    "refine": (0, 300),
    "tokens": (2048,),
}  # beside what a method has
FEW = 4  # layers that candidates are tried on
ENTRIES = 1 << 25  # logits held for comparison: 128 MiB in float32
GAIN = 0.01  # relative; less is no reason to leave what was set


class Judge:
    """How far changes move the end of a model, on text that nothing was fitted to.

    Of a model that writes it is the next tokens' distribution, compared by the mean Kullback-Leibler divergence a
    token, with the perplexity where labels are given; of any other the body's output, by the relative squared
    difference.

    Memory beyond the model: the outputs that are compared, at most ``ENTRIES`` numbers or one batch.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Runs the model as it is, in eval mode."""
        self.model = model
        self.writes = getattr(model, "get_output_embeddings", lambda: None)() is not None
        self.batches: list[Batch] = []
        self.reference: list[Tensor] = []
        for batch in kept(batches):
            if sum(map(Tensor.numel, self.reference)) >= ENTRIES:
                break
            self.batches.append(batch)
            self.reference.append(self._outputs(batch))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """ "KL" or "error", and "perplexity" where there is one, of the model as it is now."""
        gap = norm = lost = 0.0
        count = 0
        for batch, wanted in zip(self.batches, self.reference, strict=True):
            found = self._outputs(batch)
            labels = self._labels(batch, len(found))
            for rows in torch.arange(len(found), device=found.device).split(256):
                new, old = found[rows].float(), wanted[rows].float()
                if not self.writes:
                    gap, norm = gap + float((new - old).square().sum()), norm + float(old.square().sum())
                    continue
                ours, theirs = new.log_softmax(-1), old.log_softmax(-1)
                gap, norm = gap + float((theirs.exp() * (theirs - ours)).sum()), norm + len(rows)
                if labels is not None:
                    known = labels[rows]
                    asked = known >= 0
                    lost -= float(ours[asked].gather(1, known[asked, None]).sum())
                    count += int(asked.sum())
        figures = {"KL" if self.writes else "error": max(gap, 0.0) / max(norm, 1e-300)}
        return figures | ({"perplexity": math.exp(min(lost / count, 700.0))} if count else {})

    def _outputs(self, batch: Batch) -> Tensor:
        """What is compared: (tokens that count, columns)."""
        caught: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            value = getattr(output, "logits", None) if self.writes else None
            caught.append((value if value is not None else first_tensor(output)).detach())

        handle = (self.model if self.writes else body(self.model)).register_forward_hook(note)
        try:
            run(self.model, [batch])
        finally:
            handle.remove()
        value = caught[-1]
        mask = self._mask(batch, value)
        flat = value.reshape(-1, value.shape[-1])
        return flat if mask is None else flat[mask]

    def _mask(self, batch: Batch, value: Tensor) -> Tensor | None:
        """Which tokens count, flat; None where it is not known that some do not."""
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        for given, off in ((labels, -100), (mask, 0)):
            if isinstance(given, Tensor) and given.shape == value.shape[:-1]:
                return given.ne(off).flatten().to(value.device)
        return None

    def _labels(self, batch: Batch, count: int) -> Tensor | None:
        """What each token that counts is to give, -1 where it is not asked for; None where nothing is written."""
        labels = batch.get("labels")
        config = getattr(self.model, "config", None)
        whole = getattr(config, "is_encoder_decoder", False)
        causal = whole or bool(getattr(self.model, "can_generate", lambda: False)())
        if not isinstance(labels, Tensor) or labels.ndim != 2 or not causal or not self.writes:
            return None
        counted = labels.ne(-100)
        if not whole:  # the next one's
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        wanted = labels[counted].masked_fill(labels[counted].eq(-100), -1)
        return wanted.to(next(self.model.parameters()).device) if len(wanted) == count else None


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
    taken once, of these layers. Another value is taken where it gains more than a hundredth.

    Args:
        fit: batches that the trials are fitted to. held: batches of other text, of another kind where there is one
            (:func:`ffnkit.tune.deciding_batches` gives both).
        method: one that narrows, with data. candidates: values by setting; None takes ``CANDIDATES`` of the settings
            that it has.
        layers: how many are narrowed.

    Raises:
        FfnkitError: no candidate is a setting of the method, or a trial's error.
    """
    known = [each.name for each in settings_of(type(method))]
    wanted = {name: values for name, values in (candidates or CANDIDATES).items() if candidates or name in known}
    if not wanted or (unknown := [name for name in wanted if name not in known]):
        what = f"it has no setting {unknown[0]}" if wanted else f"it has none of {', '.join(CANDIDATES)}"
        raise FfnkitError(f"deciding settings of {method.name}", what, "Use calibrated-fusion, or set them yourself")
    chosen = [(ffn, width) for ffn, width in method.chosen(model) if width < ffn.width]
    if not chosen:
        raise FfnkitError(f"deciding settings of {method.name}", "no FFN gets narrower", "Give a smaller width")
    step = (len(chosen) - 1) / max(min(layers, len(chosen)) - 1, 1)
    few = [chosen[round(number * step)] for number in range(min(layers, len(chosen)))]
    trial = dataclasses.replace(method, width={ffn.name: width for ffn, width in few})
    places = ",".join(f"{ffn.stack}:{ffn.layer}" if ffn.stack else str(ffn.layer) for ffn, _ in few)
    places = ",".join(f"{ffn.stack}:{ffn.layer}" if ffn.stack else str(ffn.layer) for ffn, _ in few)
    sequential = getattr(method, "sequential", False)
    data = kept(fit) if sequential else calibrate(model, fit, layers=places, progress=progress)
    judge = Judge(model, held)
    tried: list[dict[str, Any]] = []
    total = 1 + sum(len([v for v in values if v != getattr(method, name)]) for name, values in wanted.items())

    def lost(settings: dict[str, Any]) -> float:
        draft = dataclasses.replace(trial, **settings).draft(model, data, None)
        figures = moved(model, draft.edits, judge)
        tried.append({"given": {name: getattr(method, name) for name in wanted} | settings, **figures})
        if progress is not None:
            progress(len(tried), total, "settings")
        return next(iter(figures.values()))

    best: dict[str, Any] = {}
    least = lost(best)
    for name, values in wanted.items():
        found = [(lost({**best, name: value}), value) for value in values if value != getattr(method, name)]
        smallest = min(found, key=lambda each: each[0], default=(least, None))
        if smallest[0] < least * (1 - GAIN):
            least, best[name] = smallest
    return Decision(dataclasses.replace(method, **best), tried, tuple(ffn.name for ffn, _ in few))


def moved(model: nn.Module, edits: Iterable[Edit], judge: Judge) -> dict[str, float]:
    """The judge's figures with the edits in the model for a while."""
    with temporarily(model, edits):
        return judge.measure()
