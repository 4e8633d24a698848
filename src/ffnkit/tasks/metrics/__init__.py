"""Metrics by name: of labels and numbers, and of generated texts."""

from __future__ import annotations


def greater_is_better(name: str) -> bool:
    """Whether more of a metric is better: of labels, of generated text, or the loss and the perplexity."""
    from ffnkit.tasks.metrics import labelled, texts

    for table in (labelled.METRICS, texts.METRICS):
        if name in table:
            return table[name].greater_is_better
    return name not in ("loss", "perplexity", "bits_per_byte")
