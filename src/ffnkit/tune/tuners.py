"""What trains: the tuners by name, and the way of one onto a model and off it. Light to import.

A tuner is a frozen class of settings with ``prepare(model) -> model``, which sets what trains, and ``finish(model) ->
model``, which gives back a plain transformers model. Every tuner has the setting ``routers``: whether the routers of a
mixture of experts train (``ffnkit.model.experts`` finds them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from ffnkit.errors import FfnkitError
from ffnkit.settings.presets import filled, unlike
from ffnkit.settings.words import in_words
from ffnkit.tune.base import Tuner, Updating
from ffnkit.tune.kinds import (
    BitFit,
    Bottleneck,
    Combined,
    Dsee,
    Ffn,
    Full,
    Head,
    Lora,
    MeProp,
    Prefix,
    SparseGrad,
    SparseMask,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TUNERS: tuple[type[Tuner], ...] = (
    *(Full, Ffn, Lora, SparseGrad, Dsee, SparseMask, MeProp, Combined),
    *(Bottleneck, Prefix, BitFit, Head),
)


def names() -> list[str]:
    """The names of all tuners."""
    return [tuner.name for tuner in TUNERS]


def get(tuner: str | Mapping[str, Any] | Tuner) -> Tuner:
    """A tuner from its name, from a mapping of ``name`` and settings, or from itself.

    Raises:
        FfnkitError: an unknown name (the known ones are listed), an unknown setting or a wrong value.
    """
    if isinstance(tuner, Tuner):
        return tuner
    settings = dict(tuner) if isinstance(tuner, Mapping) else {"name": tuner}
    name = settings.pop("name", None)
    found = kind(name)
    try:
        return found(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        known = ", ".join(found.model_fields) or "none"
        raise FfnkitError(f"tuner {name}: {field}", in_words(first["msg"]), f"Its settings: {known}") from None


def kind(name: Any) -> type[Tuner]:
    """The class of a tuner. Raises FfnkitError, listing the known names, where there is none of this name."""
    found = next((each for each in TUNERS if each.name == name), None)
    if found is None:
        raise FfnkitError(f"tuner {name!r}", "it is not known", f"Choose one of {', '.join(names())}")
    return found


def told(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a card tells of a tuner: the settings that were given, what their preset says, and what is not the paper's.

    Args:
        name: of the tuner. settings: as a user gave them.
    """
    found = filled(kind(name), settings)
    if other := unlike_papers(name, settings):
        found["differs"] = "; ".join(other)
    return found


def unlike_papers(name: str, settings: Mapping[str, Any]) -> list[str]:
    """In words, how a tuner's settings differ from those of its paper, where it has a preset of these."""
    if "parts" in settings:
        parts = ({**each} for each in settings["parts"])
        return [line for each in parts for line in unlike_papers(each.pop("name"), each)]
    found = unlike(kind(name), settings)
    return [] if found is None else [f"{name}: {found}"]


def prepare(
    model: nn.Module,
    tuner: str | Mapping[str, Any] | Tuner = "full",
    data: Iterable[Mapping[str, Any]] | None = None,
) -> nn.Module:
    """Set what trains; the model to train comes back (with "lora" a peft model around ``model``).

    A tuner that was prepared on the model and never finished is undone first; where preparing fails the model is as it
    was before (:class:`Tuner`).

    Args:
        data: batches with labels for ``model(**batch)``, for tuners that read gradients ("sparsegrad", "dsee" by some
            of its supports, "combined" with them).
    """
    return get(tuner).prepare(model, data)


def finish(model: nn.Module, tuner: str | Mapping[str, Any] | Tuner | None = None, *, merge: bool = True) -> nn.Module:
    """The plain transformers model after training; adapters are merged, but for bottlenecks and prefixes, which stay.
    Where this fails it can be called again.

    Args:
        tuner: the one given to :func:`prepare`; None: told from the model.
        merge: with False, updates of ``fk.adapter``'s kinds stay on the model.
    """
    from ffnkit.checkpoint.adapters import is_adapted
    from ffnkit.model.linear import added_to
    from ffnkit.model.trainable import is_limited

    if not merge and is_adapted(model):
        from ffnkit.tune import masks, planned, sparing

        if tuner is not None and isinstance(own := get(tuner), Updating):
            planned.save_updates(cast("PreTrainedModel", model), own)
        from ffnkit.tune.lifecycle import forget

        masks.taken(model)
        sparing.spare_nothing(model)
        forget(model)
        return model
    if tuner is None:
        if kind := added_to(model):
            tuner = kind.partition(" ")[0]
        elif model.__dict__.get("_ffnkit_meprop"):
            tuner = MeProp(of="outputs")
        elif is_adapted(model):
            tuner = "sparsegrad"
        else:
            tuner = "lora" if hasattr(model, "merge_and_unload") else "ffn" if is_limited(model) else "full"
    return get(tuner).finish(model)


def remove_added(model: Any) -> Any:
    """The plain model without the bottleneck adapters or the prefix that a tuner left on it; changed in place.

    Raises:
        FfnkitError: there is nothing of the kind on it.
    """
    from ffnkit.checkpoint.added import remove_added as removed

    return removed(model)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train (``requires_grad``), each once however often it is shared."""
    return list({id(p): p for p in model.parameters() if p.requires_grad}.values())
