"""How far a model that is changed for a while moves from what it was, on a few rows kept apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, first_tensor, forward, has_decoder, kept, prepared

TOKENS = 2048  # that are compared, at least, where there are so many
ROWS = 256  # whose distributions are compared at a time


class Drift:
    """What a model gave on some batches, and how far it is from that now.

    Of a model that writes it is the Kullback-Leibler divergence of the next token's distribution, the mean over tokens.
    Of any other it is the squared difference of the hidden states behind its last layer, relative to their variance:
    heads are left out, for they may not be trained yet.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], tokens: int = TOKENS) -> None:
        """Runs the model as it is. Memory: what is compared, for about ``tokens`` tokens, in the model's dtype."""
        self.model = model
        self.written = getattr(model, "get_output_embeddings", lambda: None)() is not None
        self.batches: list[dict[str, Any]] = []
        self.reference: list[Tensor] = []
        seen = 0
        for batch in kept(batches):
            self.batches.append(prepared(model, batch))
            self.reference.append(self._gives(self.batches[-1]))
            seen += len(self.reference[-1])
            if seen >= tokens:
                break

    def __call__(self) -> float:
        """How far the model is now from what it was; 0 where nothing changed."""
        gap = norm = 0.0
        mean = torch.cat([r.float() for r in self.reference]).mean(0) if not self.written else None
        for batch, was in zip(self.batches, self.reference, strict=True):
            now = self._gives(batch)
            if mean is None:
                gap, norm = gap + divergence(now, was), norm + len(was)
                continue
            for ours, theirs in zip(now.split(ROWS), was.split(ROWS), strict=True):
                ours, theirs = ours.float(), theirs.float()
                gap += float((ours - theirs).square().sum())
                norm += float((theirs - mean).square().sum())
        return max(gap, 0.0) / max(norm, 1e-30)

    @torch.no_grad()
    def _gives(self, batch: dict[str, Any]) -> Tensor:
        """(tokens that count, columns) of what is compared."""
        caught: list[Any] = []
        base = getattr(self.model, "base_model", self.model)
        handle = base.register_forward_hook(lambda _, __, output: caught.append(output))
        try:
            with evaluating(self.model):
                output = forward(self.model, batch)
        finally:
            handle.remove()
        value = output.logits if self.written else first_tensor(caught[-1] if caught else output)
        mask = batch.get("decoder_attention_mask" if has_decoder(self.model) else "attention_mask")
        flat = value.detach().reshape(-1, value.shape[-1])
        counts = isinstance(mask, Tensor) and mask.shape == value.shape[:-1]
        return flat[mask.reshape(-1) > 0] if counts else flat  # type: ignore[union-attr]


def divergence(new: Tensor, old: Tensor) -> float:
    """The sum over rows of KL(old, new), of logits (n, V) both; some rows at a time, in float32."""
    gap = 0.0
    for ours, theirs in zip(new.split(ROWS), old.split(ROWS), strict=True):
        first, second = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        gap += (first.exp() * (first - second)).sum().item()
    return gap


def apart(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(rows to fit on, rows kept apart): every tenth batch, the last one of fewer, some rows of a single one.

    A single row cannot be parted: it is both.
    """
    found = kept(batches)
    if len(found) > 1:
        held = found[9::10] or found[-1:]
        return [batch for batch in found if not any(batch is each for each in held)], held
    rows = {len(v) for v in found[0].values() if isinstance(v, Tensor) and v.ndim}
    if len(rows) != 1 or (count := rows.pop()) < 2:
        return found, found
    cut = count - max(count // 10, 1)
    return [_rows(found[0], slice(None, cut))], [_rows(found[0], slice(cut, None))]


def _rows(batch: Batch, rows: slice) -> Batch:
    return {name: value[rows] if isinstance(value, Tensor) and value.ndim else value for name, value in batch.items()}
