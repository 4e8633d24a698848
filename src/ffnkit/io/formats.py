"""The marks of compact checkpoints; a module of its own because the hook needs it before transformers is whole."""

from __future__ import annotations

QUANT_METHOD = "ffnkit"
FORMAT = 1
