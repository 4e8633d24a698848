"""Whether the tensors of a checkpoint's files are those of the model that was opened from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.config_text import written

SHOWN = 3  # names in an error
FITS = "Use a checkpoint whose config.json fits its weights"


def is_head(model: Any, key: str) -> bool:
    """Whether the tensor ``key`` lies outside the body of ``model``."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and hasattr(model, prefix) and not key.startswith(f"{prefix}.")


def check_fits(model: Any, info: dict[str, Any], name: str, architectures: list[str], *, redraw: bool) -> None:
    """Raises FfnkitError where what was newly initialized is more than a new task head.

    Args:
        info: of ``from_pretrained``: missing and mismatched keys.
        architectures: the classes that the checkpoint names: what they have has to be in its files.
        redraw: whether a head of another shape may be drawn anew.
    """
    asked = f"model {name}"
    mismatched = [row for row in sorted(info.get("mismatched_keys", ())) if not (redraw and is_head(model, row[0]))]
    if mismatched:
        (key, stored, wanted), more = mismatched[0], len(mismatched) - 1
        found = f"{key} is {tuple(stored)} in the file and {tuple(wanted)} by its config{_and(more)}"
        anew = all(is_head(model, row[0]) for row in mismatched)
        raise FfnkitError(asked, found, "Pass ignore_mismatched_sizes=True to draw the head anew" if anew else FITS)
    missing = sorted(info.get("missing_keys", ()))
    is_new = _newness(model, architectures) if missing else lambda key: True
    lost = [key for key in missing if not is_new(key)]
    if lost:
        strange = sorted(info.get("unexpected_keys", ()))
        found = f"its files lack {', '.join(lost[:SHOWN])}{_and(len(lost) - SHOWN)}"
        if strange:
            found += f", and hold {strange[0]}{_and(len(strange) - 1)}, which {type(model).__name__} has not"
        raise FfnkitError(asked, found, FITS)


def _and(more: int) -> str:
    return f" (and {more} more)" if more > 0 else ""


def _newness(model: Any, architectures: list[str]) -> Callable[[str], bool]:
    """Tells of a tensor of ``model`` whether the class that the checkpoint was saved from has nothing in its place."""
    if type(model).__name__ in architectures:
        # a body may have been saved without its pooler, which no output before it hangs on
        return lambda key: model.base_model is model and key.partition(".")[0] == "pooler"
    names = _tensors(model, architectures)
    if names is None:
        return lambda key: is_head(model, key) or "pooler" in key.split(".")
    known = names | {key.rpartition(".")[0] for key in names} - {""}
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""

    def is_new(key: str) -> bool:
        places = (key, key.rpartition(".")[0])
        return known.isdisjoint({own for p in places for own in (p, p.removeprefix(prefix), prefix + p)} - {"", prefix})

    return is_new


def _tensors(model: Any, architectures: list[str]) -> set[str] | None:
    """The names of the tensors of the class that a checkpoint names, None where it cannot be built."""
    import torch
    import transformers

    cls = getattr(transformers, architectures[0], None) if architectures else None
    if cls is None:
        return None
    try:
        with torch.device("meta"):
            return set(cls(written(model.config)).state_dict())
    except Exception:  # whatever a class makes of a config that is not its own
        return None
