"""The dropout of a model while it trains, whatever its config says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ffnkit.errors import FfnkitError

LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
OTHER = ("layer", "path")  # of whole layers or branches


@contextmanager
def dropout_at(model: nn.Module, share: float | None) -> Iterator[None]:
    """Every dropout of ``model`` at ``share`` inside the block; None leaves all as they are.

    Dropout modules, and the numbers that modules hand to torch's function under names such as ``attention_dropout``.
    Of adapters that are put on inside the block, none is touched. Outputs in evaluation do not change.

    Raises:
        FfnkitError: the model has no dropout.
    """
    found = [] if share is None else [(m, name) for m in model.modules() for name in _names(m)]
    if share is not None and not found:
        what = f"{type(model).__name__} has no dropout"
        raise FfnkitError(f"dropout {share:g}", what, "Leave it out for this model")
    before = [(module, name, getattr(module, name)) for module, name in found]
    try:
        for module, name in found:
            setattr(module, name, share)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _names(module: nn.Module) -> list[str]:
    """The attributes of a module that are a share of dropout."""
    if isinstance(module, LAYERS):
        return ["p"]
    if any(word in type(module).__name__.lower() for word in ("droppath", "stochasticdepth")):
        return []
    named = [name for name, value in vars(module).items() if isinstance(value, int | float) and "drop" in name]
    return [n for n in named if not isinstance(getattr(module, n), bool) and not any(word in n for word in OTHER)]
