"""Metrics by name: of labels and numbers, and of generated texts."""

from __future__ import annotations

from typing import Any


def greater_is_better(name: str) -> bool:
    """Whether more of a metric is better: of labels, of generated text, or the loss and the perplexity."""
    known = _known(name)
    return known.greater_is_better if known else not name.endswith(("loss", "perplexity", "bits_per_byte"))


def greatest(name: str) -> float | None:
    """The greatest value that a metric can have, 1 or 100 say; None where it has no bound, or is not known here."""
    known = _known(name)
    return known.greatest if known else 1.0 if name == "top5" else None


def _known(name: str) -> Any:
    from ffnkit.tasks.metrics import labelled, texts

    return labelled.METRICS.get(name) or texts.METRICS.get(name)
