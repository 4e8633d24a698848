"""The marks of compact checkpoints; a module of its own because the hook needs it before transformers is whole.

``quantization_config`` of a compact checkpoint names no ``quant_method``: such a config is what transformers refuses,
for every class, while an unknown method only makes it warn and open something else. Format 1 named one.
"""

from __future__ import annotations

from typing import Any

QUANT_METHOD = "ffnkit"
FORMAT = 2
MARK = {"compact": QUANT_METHOD, "open_with": "pip install ffnkit; import ffnkit before from_pretrained"}


def is_compact(stored: Any) -> bool:
    """Whether a ``quantization_config``, as data, is of a compact checkpoint."""
    return isinstance(stored, dict) and QUANT_METHOD in (stored.get("compact"), stored.get("quant_method"))
