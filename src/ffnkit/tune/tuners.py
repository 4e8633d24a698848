"""What trains: the whole model, its FFNs and task head, or low-rank adapters. Light to import.

A tuner is a frozen class of settings with ``prepare(model) -> model``, which sets what trains, and ``finish(model) ->
model``, which gives back a plain transformers model. Every tuner has the setting ``routers``: whether the routers of a
mixture of experts train (``ffnkit.routers`` finds them).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from torch import nn

Routers = Literal["trained", "frozen"]
_ROUTERS = "routers of a mixture of experts: trained or frozen"


class Tuner(BaseModel):
    """Base of all tuners: fields are settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str] = ""
    description: ClassVar[str] = ""

    routers: Routers = Field("trained", description=_ROUTERS)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Set what trains, in place; the model to train comes back.

        Raises:
            FfnkitError: a setting ``routers`` other than the tuner's default, for a model that has none.
        """
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """A plain transformers model with the trained weights."""
        return model

    def routers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's routers by name; FfnkitError where the setting asks for something and there are none."""
        from ffnkit.routers import routers

        found = routers(model)
        if not found and self.routers != type(self).model_fields["routers"].default:
            asked = f"tuner {self.name}: routers {self.routers}"
            raise FfnkitError(asked, f"{type(model).__name__} has no router", "Leave the setting out")
        return found


class Full(Tuner):
    """Train every parameter of the model, or all but the routers."""

    name: ClassVar[str] = "full"
    description: ClassVar[str] = "every parameter"

    def prepare(self, model: nn.Module) -> nn.Module:
        from ffnkit.parts import train_only

        found = self.routers_of(model)
        if self.routers == "frozen":
            fixed = {id(p) for module in found.values() for p in module.parameters()}
            train_only(model, lambda parameter: id(parameter) not in fixed)
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        from ffnkit.parts import train_as_before

        return train_as_before(model)


class Ffn(Tuner):
    """Train the FFNs and the task head only; embeddings, attention, norms and routers stay as they are."""

    name: ClassVar[str] = "ffn"
    description: ClassVar[str] = "the FFNs and the task head"

    routers: Routers = Field("frozen", description=_ROUTERS)

    def prepare(self, model: nn.Module) -> nn.Module:
        from ffnkit.blocks import ffns
        from ffnkit.parts import head_parameters, train_only

        trained = {id(p) for ffn in ffns(model) for p in ffn.parameters()} | {id(p) for p in head_parameters(model)}
        found = self.routers_of(model)
        if self.routers == "trained":
            trained |= {id(p) for module in found.values() for p in module.parameters()}
        train_only(model, lambda parameter: id(parameter) in trained)
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        from ffnkit.parts import train_as_before

        return train_as_before(model)


class Lora(Tuner):
    """Train low-rank adapters (peft's LoRA) and the task head; the adapters are merged at the end.

    Source: Hu et al., LoRA (arXiv 2106.09685): W + (alpha / rank) B A.
    """

    name: ClassVar[str] = "lora"
    description: ClassVar[str] = "low-rank adapters and the task head, through peft"

    routers: Routers = Field("frozen", description=f"{_ROUTERS}; trained: whole, without adapters")
    rank: Annotated[int, Field(gt=0)] = Field(8, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(16, description="the adapters' output is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="on the adapters' input")
    targets: str = Field("ffn", description="ffn, attention, all, or a regular expression over module names")
    head: bool = Field(True, description="train the task head too")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that train, as in peft")
    adapter_dir: Path | None = Field(None, description="also save the adapter there, in peft's form")
    tied: Literal["shared", "each"] = Field(
        "shared", description="on FFNs that layers share: one adapter that they share, or each layer its own"
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="while tuning, hold the frozen linears in 4 bits or in int8, through bitsandbytes"
    )

    @model_serializer(mode="wrap")
    def _told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """``tied`` and ``quantize`` are told where they are not the default, so that facts about others stay so."""
        told: dict[str, Any] = handler(self)
        plain = {"tied": "shared", "quantize": "none"}
        return {key: value for key, value in told.items() if plain.get(key) != value}

    def prepare(self, model: nn.Module) -> nn.Module:
        from . import lora

        return lora.prepare(model, self)

    def finish(self, model: nn.Module) -> nn.Module:
        from . import lora

        return lora.finish(model, self)


TUNERS: tuple[type[Tuner], ...] = (Full, Ffn, Lora)


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
    kind = next((kind for kind in TUNERS if kind.name == name), None)
    if kind is None:
        raise FfnkitError(f"tuner {name!r}", "it is not known", f"Choose one of {', '.join(names())}")
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        known = ", ".join(kind.model_fields) or "none"
        raise FfnkitError(f"tuner {name}: {field}", first["msg"], f"Its settings: {known}") from None


def prepare(model: nn.Module, tuner: str | Mapping[str, Any] | Tuner = "full") -> nn.Module:
    """Set what trains; the model to train comes back (with "lora" a peft model around ``model``)."""
    return get(tuner).prepare(model)


def finish(model: nn.Module, tuner: str | Mapping[str, Any] | Tuner | None = None) -> nn.Module:
    """The plain transformers model after training; adapters are merged.

    Args:
        tuner: the one given to :func:`prepare`; None: told from the model.
    """
    from ffnkit.parts import is_limited

    if tuner is None:
        tuner = "lora" if hasattr(model, "merge_and_unload") else "ffn" if is_limited(model) else "full"
    return get(tuner).finish(model)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train (``requires_grad``), each once however often it is shared."""
    return list({id(p): p for p in model.parameters() if p.requires_grad}.values())
