"""How far a changed model moves from what it was, on rows that no fit saw: one rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, first_tensor, forward, has_decoder, kept, prepared
from ffnkit.calibration.padding import TokenMasks
from ffnkit.model.trainable import body

TOKENS = 2048  # that are compared, at least, where there are so many
ENTRIES = 1 << 27  # numbers of outputs that are held at most: 256 MiB in bfloat16
ROWS = 256  # whose distributions are compared at a time
BROKEN = 1e9  # further than anything else, and still a number that can be compared and added


def comparable(loss: float) -> float:
    """A loss as a number that can be compared: ``BROKEN`` where numbers overflowed."""
    return loss if math.isfinite(loss) else BROKEN


class Drift:
    """What a model gave on some batches, and how far it is from that now.

    Of a model that writes it is the Kullback-Leibler divergence of the next token's distribution, the mean over tokens.
    Of any other it is the squared difference of what its body gives, relative to the variance of that: heads are left
    out, for they may not be trained yet. Every search, budget, decision and report measures by it.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        tokens: int = TOKENS,
        *,
        run: Callable[[int], Any] | None = None,
    ) -> None:
        """Runs the model as it is. Memory: what is compared, for about ``tokens`` tokens, in the model's dtype.

        Args:
            run: lets the model run on one of the batches, by its number, where passes are cut short.
        """
        self.model, self._run = model, run
        self.written, self._masks = writes(model), whole_masks(model)
        self.batches: list[dict[str, Any]] = []
        self.reference: list[Tensor] = []
        seen = held = 0
        for batch in kept(batches):
            self.batches.append(prepared(model, batch))
            self.reference.append(self._gives(len(self.batches) - 1)[0])
            seen, held = seen + len(self.reference[-1]), held + self.reference[-1].numel()
            if seen >= tokens or held >= ENTRIES:
                break

    def __call__(self) -> float:
        """How far the model is now from what it was; 0 where nothing changed, ``BROKEN`` where numbers overflow."""
        return comparable(next(iter(self.measure().values())))

    def measure(self) -> dict[str, float]:
        """ "KL" or "error" (see above), and "perplexity" where the batches have labels of texts."""
        gap = norm = lost = 0.0
        asked = 0
        mean = None if self.written else self._centre()
        for number, was in enumerate(self.reference):
            now, labels = self._gives(number)
            if mean is not None:
                for ours, theirs in zip(now.split(ROWS), was.split(ROWS), strict=True):
                    gap += float((ours.float() - theirs.float()).square().sum())
                    norm += float((theirs.float() - mean).square().sum())
                continue
            gap, norm = gap + divergence(now, was), norm + len(was)
            if labels is not None:
                lost += _written(now, labels)
                asked += int(labels.ne(-100).sum())
        figures = {"KL" if self.written else "error": max(gap, 0.0) / max(norm, 1e-30)}
        return figures | ({"perplexity": math.exp(min(lost / asked, 700.0))} if asked else {})

    def _centre(self) -> Tensor:
        """(columns,) the mean of what was given; of a single token, which has no spread about it, the origin."""
        rows = torch.cat([each.float() for each in self.reference])
        return rows.mean(0) if len(rows) > 1 else rows.new_zeros(rows.shape[1])

    @torch.no_grad()
    def _gives(self, number: int) -> tuple[Tensor, Tensor | None]:
        """(tokens that count, columns) of what is compared, and what each of them is to write, if that is known."""
        batch = self.batches[number]
        with evaluating(self.model):
            value, mask = given(self.model, batch, self._masks, self._run and partial(self._run, number))
        value = value.detach()
        flat, labels = value.reshape(-1, value.shape[-1]), self._labels(batch, value)
        if mask is None:
            return flat, labels
        return flat[mask > 0], None if labels is None else labels[mask > 0]

    def _labels(self, batch: Batch, value: Tensor) -> Tensor | None:
        """What every place is to write (tokens,), -100 where it is not asked for; None of a model of other labels."""
        labels, whole = batch.get("labels"), has_decoder(self.model)
        writes = whole or bool(getattr(self.model, "can_generate", lambda: False)())
        if not self.written or not writes or not isinstance(labels, Tensor) or labels.shape != value.shape[:-1]:
            return None
        if not whole:  # the next one's
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return labels.reshape(-1).to(value.device)


def writes(model: nn.Module) -> bool:
    """Whether what a model gives is a distribution over tokens."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def whole_masks(model: nn.Module) -> TokenMasks:
    """Which tokens count in what the model as a whole gives."""
    return TokenMasks(model, {"": ("decoder" if has_decoder(model) else "", ())})


def given(
    model: nn.Module, batch: Batch, masks: TokenMasks, run: Callable[[], Any] | None = None
) -> tuple[Tensor, Tensor | None]:
    """What a model that writes gives, its logits, or the body of any other: (..., columns), and which rows count.

    Args:
        batch: prepared. masks: of :func:`whole_masks`. run: lets the model run on it, where that is not a whole pass.

    Returns:
        The second is (rows,), ones for those that count; None where all do.
    """
    caught: list[Any] = []
    written = writes(model)
    end = model if written else body(model)
    handle = end.register_forward_hook(lambda _, __, output: caught.append(output))
    try:
        forward(model, batch) if run is None else run()
    finally:
        handle.remove()
    logits = getattr(caught[-1], "logits", None) if written else None
    value = first_tensor(caught[-1]) if logits is None else logits
    masks.start(batch)
    return value, masks.of("", value, quiet=True)


def divergence(new: Tensor, old: Tensor) -> float:
    """The sum over rows of KL(old, new), of logits (n, V) both; some rows at a time, in float32."""
    gap = 0.0
    for ours, theirs in zip(new.split(ROWS), old.split(ROWS), strict=True):
        first, second = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        gap += (first.exp() * (first - second)).sum().item()
    return gap


def _written(logits: Tensor, labels: Tensor) -> float:
    """The sum over rows of the cross-entropy of logits (n, V), where a label is asked for; some rows at a time."""
    parts = zip(logits.split(ROWS), labels.split(ROWS), strict=True)
    return sum(float(nn.functional.cross_entropy(x.float(), y, reduction="sum", ignore_index=-100)) for x, y in parts)


def apart(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(rows to fit on, rows kept apart): every tenth batch, the last one of fewer, some rows of a single one.

    A single row cannot be parted: it is both.
    """
    found = kept(batches)
    if len(found) > 1:
        held = range(9, len(found), 10) or range(len(found) - 1, len(found))  # places: a batch may stand there twice
        return [batch for n, batch in enumerate(found) if n not in held], [found[n] for n in held]
    rows = {len(v) for v in found[0].values() if isinstance(v, Tensor) and v.ndim}
    if len(rows) != 1 or (count := rows.pop()) < 2:
        return found, found
    cut = count - max(count // 10, 1)
    return [_rows(found[0], slice(None, cut))], [_rows(found[0], slice(cut, None))]


def _rows(batch: Batch, rows: slice) -> Batch:
    return {name: value[rows] if isinstance(value, Tensor) and value.ndim else value for name, value in batch.items()}
