"""Configs as their files hold them: what a plain class is built from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FLOAT = "__float__"  # how transformers writes infinity


def read(kind: type[PreTrainedConfig], text: str) -> Any:
    """A config from the text of its file, without what quantizers or ffnkit wrote there.

    Raises:
        Exception: whatever its class raises where it does not bear the values.
    """
    return kind.from_dict(json.loads(text, object_hook=_row))


def _row(data: dict[str, Any]) -> Any:
    data.pop("quantization_config", None)  # of the config, and of its parts
    return float(data[_FLOAT]) if set(data) == {_FLOAT} else data


def written(config: PreTrainedConfig) -> Any:
    """A config as it is read back from its file; raises as :func:`read`."""
    return read(type(config), config.to_json_string())
