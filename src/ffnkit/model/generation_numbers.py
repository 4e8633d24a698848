"""What a generation config says by number of layers and heads; no class checks it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

PAIRS = "alignment_heads"  # Whisper: [layer, head] of cross-attentions that tell when a word was said
EXIT = "assistant_early_exit"  # so many of the first layers draft

Pair = tuple[int, int]


def renumber(
    config: Any, pair: Callable[[int, int], Pair | None], first: Callable[[int], int] = lambda count: count
) -> Any:
    """A copy of a generation config with other numbers, or the config itself where it names none.

    Args:
        pair: the new [layer, head], None where it is gone. Where all are gone the entry is too, and asking for what it
            is for raises.
        first: how many of the first layers are left.
    """
    pairs, count = getattr(config, PAIRS, None), getattr(config, EXIT, None)
    if not pairs and count is None:
        return config
    new = copy.deepcopy(config)
    if pairs:
        moved = [pair(int(layer), int(head)) for layer, head in pairs]
        setattr(new, PAIRS, [list(each) for each in moved if each is not None] or None)
    if count is not None:
        setattr(new, EXIT, first(count) or None)
    return new


def set_numbers(model: nn.Module, pair: Callable[[int, int], Pair | None], **more: Any) -> None:
    """Renumber the generation config of a model; the old one is left as it is."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        model.generation_config = renumber(config, pair, **more)
