"""Bottleneck adapters behind FFNs and attentions; they stay on the model, for no weight can hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ffnkit.checkpoint.added import insert
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attentions
from ffnkit.model.finding import ffns, has_ffns
from ffnkit.model.linear import check_untouched
from ffnkit.model.targets import select
from ffnkit.model.trainable import train_only
from ffnkit.nn.bottleneck import bottlenecks
from ffnkit.tune.ties import share_modules

if TYPE_CHECKING:
    from ffnkit.tune.kinds import Bottleneck
    from ffnkit.tune.lifecycle import Preparation


def put_on(model: nn.Module, tuner: Bottleneck, preparation: Preparation) -> nn.Module:
    """The model with adapters behind its linears, in place; factors, thin pairs and masks stay below them.

    Raises:
        FfnkitError: there is nothing to put them behind, or the experts of a layer are one 3-D parameter.
    """
    asked = f"bottleneck adapters on {type(model).__name__}"
    check_untouched(model, asked)
    names = linears_of(model, tuner, asked)
    share_modules(model)
    insert(model, names, tuner.size, tuner.activation)
    own = {id(p) for each in bottlenecks(model).values() for m in (each.down, each.up) for p in m.parameters()}
    chosen = tuner.beside(model) | own
    train_only(model, lambda parameter: id(parameter) in chosen)
    return model


def linears_of(model: nn.Module, tuner: Bottleneck, asked: str) -> tuple[str, ...]:
    """The linears that a layer's FFN, and its attentions, end in: behind them comes the residual connection."""
    found = select(ffns(model), tuner.layers) if has_ffns(model) else []
    names = []
    for ffn in found:
        if ffn.layout.experts:
            what = f"the experts of {ffn.name} are one 3-D parameter, and an adapter stands behind a linear"
            raise FfnkitError(asked, what, "Choose lora, or name layers without experts")
        names.append(f"{ffn.name}.{ffn.path('down')}".strip("."))
    if tuner.behind == "both" and (every := attentions(model)):
        names += [f"{each.name}.{each.layout.o}" for each in select(every, tuner.layers)]
    if not names:
        raise FfnkitError(asked, "it has no FFN that is known", "Add the family's row (docs/adding.md)")
    return tuple(dict.fromkeys(names))
