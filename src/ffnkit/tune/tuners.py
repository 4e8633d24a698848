"""What trains: the whole model, its FFNs and task head, or low-rank adapters. Light to import.

A tuner is a frozen class of settings with ``prepare(model) -> model``, which sets what trains, and ``finish(model) ->
model``, which gives back a plain transformers model. Every tuner has the setting ``routers``: whether the routers of a
mixture of experts train (``ffnkit.model.experts`` finds them).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Routers = Literal["trained", "frozen"]
Part = Literal["biases", "norms", "attention", "embeddings", "rest"]
_KEEP_ZEROS = "weights that are zero before (pruned) are zero after it; without it merging fills them"
_COEFFICIENTS = "l1 weight of coefficients learnt on heads and neurons, which structured pruning reads; 0: none"
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

    @property
    def method(self) -> Any | None:
        """The method whose plan sets what trains, for tuners that have one: it may want batches with labels."""
        return None

    def finish(self, model: nn.Module) -> nn.Module:
        """A plain transformers model with the trained weights."""
        return model

    def routers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's routers by name; FfnkitError where the setting asks for something and there are none."""
        from ffnkit.model.experts import routers

        found = routers(model)
        if not found and self.routers != type(self).model_fields["routers"].default:
            asked = f"tuner {self.name}: routers {self.routers}"
            raise FfnkitError(asked, f"{type(model).__name__} has no router", "Leave the setting out")
        return found


class _Beside(Tuner):
    """What tuners have in common that train a part of the model: which other parts train too."""

    routers: Routers = Field("frozen", description=_ROUTERS)
    head: bool = Field(True, description="train the task head too")
    also: tuple[Part, ...] = Field((), description="further parts that train: biases, norms, attention, ...")

    @property
    def with_head(self) -> list[str]:
        """``also``, and the head where it trains."""
        return list(dict.fromkeys([*(["head"] if self.head else []), *self.also]))

    def beside(self, model: nn.Module) -> set[int]:
        """The ids of the parameters of those parts, routers included where they train."""
        from ffnkit.model.trainable import parts_of

        found = self.routers_of(model)
        chosen = {id(p) for p in parts_of(model, self.with_head)}
        routed = {id(p) for module in found.values() for p in module.parameters()}
        return chosen | routed if self.routers == "trained" else chosen - routed

    def finish(self, model: nn.Module) -> nn.Module:
        from ffnkit.model.trainable import train_as_before

        return train_as_before(model)


class Full(Tuner):
    """Train every parameter of the model, or all but the routers."""

    name: ClassVar[str] = "full"
    description: ClassVar[str] = "every parameter"

    def prepare(self, model: nn.Module) -> nn.Module:
        from ffnkit.model.trainable import train_only

        found = self.routers_of(model)
        if self.routers == "frozen":
            fixed = {id(p) for module in found.values() for p in module.parameters()}
            train_only(model, lambda parameter: id(parameter) not in fixed)
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        from ffnkit.model.trainable import train_as_before

        return train_as_before(model)


class Head(_Beside):
    """Train the task head only, and further parts that are named; the least that a task can do."""

    name: ClassVar[str] = "head"
    description: ClassVar[str] = "the task head alone"

    def prepare(self, model: nn.Module) -> nn.Module:
        from ffnkit.model.trainable import train_only

        chosen = self.beside(model)
        train_only(model, lambda parameter: id(parameter) in chosen)
        return model


class Ffn(_Beside):
    """Train the FFNs and the task head only; embeddings, attention, norms and routers stay as they are."""

    name: ClassVar[str] = "ffn"
    description: ClassVar[str] = "the FFNs and the task head"

    def prepare(self, model: nn.Module) -> nn.Module:
        from ffnkit.model.finding import ffns
        from ffnkit.model.trainable import train_only

        trained = self.beside(model) | {id(p) for ffn in ffns(model) for p in ffn.parameters()}
        train_only(model, lambda parameter: id(parameter) in trained)
        return model


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
    targets: str = Field("ffn", description="ffn, attention, qv, all, or a regular expression over module names")
    head: bool = Field(True, description="train the task head too")
    also: tuple[Part, ...] = Field((), description="further parts that train: biases, norms, attention, ...")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that train, as in peft")
    adapter_dir: Path | None = Field(None, description="also save the adapter there, in peft's form")
    tied: Literal["shared", "each"] = Field(
        "shared", description="on FFNs that layers share: one adapter that they share, or each layer its own"
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="while tuning, hold the frozen linears in 4 bits or in int8, through bitsandbytes"
    )
    keep_zeros: bool = Field(False, description=_KEEP_ZEROS)

    @model_serializer(mode="wrap")
    def _told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Later settings are told where they are not the default, so that facts about runs without them stay so."""
        told: dict[str, Any] = handler(self)
        plain: dict[str, Any] = {"tied": "shared", "quantize": "none", "also": (), "keep_zeros": False}
        return {k: v for k, v in told.items() if k not in plain or plain[k] != (tuple(v) if k == "also" else v)}

    def prepare(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import lora

        return lora.prepare(model, self)

    def finish(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import lora

        return lora.finish(model, self)


class _Updating(_Beside):
    """What tuners have in common that put small updates beside frozen weights, wherever they do."""

    adapter_dir: Path | None = Field(None, description="also save the updates there, as a small adapter")
    keep_zeros: bool = Field(False, description=_KEEP_ZEROS)
    coefficients: Annotated[float, Field(ge=0)] = Field(0.0, description=_COEFFICIENTS)

    @model_serializer(mode="wrap")
    def _later_told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Later settings are told where they are not the default, so that facts about runs without them stay so."""
        told: dict[str, Any] = handler(self)
        return {k: v for k, v in told.items() if k not in ("keep_zeros", "coefficients") or v}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Plan without data and apply; ``tune.train`` gives batches to methods that want some.

        Raises:
            FfnkitError: the method wants gradients and there are no data here.
        """
        from ffnkit.tune import planned

        return planned.prepare(model, self, None)

    def finish(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import planned

        return planned.finish(model, self)


class _Adapting(_Updating):
    """What tuners have in common that put updates of one kind on linears that they name."""

    targets: str = Field("ffn", description="ffn, attention, qv, all, or a regular expression over module names")
    layers: str = Field("all", description="of which layers the FFNs are taken: all, last:8, 4-11, 4,5,9")


class SparseGrad(_Adapting):
    """Train about one percent of the entries of each FFN weight's update, in a basis where gradients are sparse.

    Source: SparseGrad (arXiv 2410.07383).
    """

    name: ClassVar[str] = "sparsegrad"
    description: ClassVar[str] = "few entries of each update, in a basis where gradients are sparse"

    share: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="of each weight's entries that train")
    count: Annotated[int, Field(gt=0)] | None = Field(None, description="so many a weight instead")
    selection: Literal["fixed", "refresh", "step"] = Field("fixed", description="when entries are chosen")
    basis: Literal["shared", "layer", "none"] = Field("shared", description="one a layer type, one a weight, or none")
    core: Annotated[float, Field(gt=0, le=1)] = Field(0.97, description="energy that a leading core has to keep")
    by: Literal["layer", "all"] = Field("layer", description="the count is one of each layer, or of all together")
    every: Annotated[int, Field(gt=0)] = Field(100, description="steps between refreshes")
    batches: Annotated[int, Field(gt=0)] = Field(30, description="batches of gradients that the choice is made from")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of random choices")

    @property
    def method(self) -> Any:
        from ffnkit.methods.update.sparsegrad import SparseGrad as Method

        own = {key: getattr(self, key) for key in ("share", "count", "selection", "basis", "core", "by", "every")}
        return Method(
            **own, batches=self.batches, seed=self.seed, sites=self.targets, layers=self.layers, also=self.with_head
        )


class Dsee(_Adapting):
    """Train a low-rank update and single entries of each weight, of query and value by default.

    Source: DSEE (arXiv 2111.00160).
    """

    name: ClassVar[str] = "dsee"
    description: ClassVar[str] = "a low-rank update and single entries of each weight"

    targets: str = Field("qv", description="qv, ffn, attention, all, or a regular expression over module names")
    layers: str = Field("all", description="of which layers query and value, and FFNs, are taken: all, last:8, 4-11")
    rank: Annotated[int, Field(ge=0)] = Field(16, description="of the low-rank update; 0: entries alone")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="the update is scaled by alpha / rank")
    nonzeros: Annotated[int, Field(ge=0)] = Field(64, description="entries of each weight that train; 0: none")
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="of each weight's entries instead")
    support: Literal["svd", "grebsmo", "gradient", "magnitude", "random"] = Field(
        "svd", description="how entries are chosen: svd, grebsmo, gradient, magnitude or random"
    )
    lora: Path | None = Field(None, description="folder of a peft LoRA adapter that the low-rank update starts from")
    batches: Annotated[int, Field(gt=0)] = Field(30, description="batches that support gradient reads")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the start and of random choices")

    @property
    def method(self) -> Any:
        from ffnkit.methods.update.dsee import DSEE as Method

        keys = ("rank", "alpha", "nonzeros", "share", "support", "layers", "batches", "seed")
        lora = None if self.lora is None else str(self.lora)
        return Method(**{key: getattr(self, key) for key in keys}, lora=lora, sites=self.targets, also=self.with_head)


class SparseMask(_Adapting):
    """Train single entries of each FFN weight: drawn at random, or the largest ones.

    Source: the sparse masks of SHiRA (arXiv 2406.13175); baselines of SparseGrad.
    """

    name: ClassVar[str] = "mask"
    description: ClassVar[str] = "single entries of each FFN weight: random ones, or the largest"

    choose: Literal["random", "magnitude"] = Field("random", description="how entries are chosen")
    share: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="of each weight's entries that train")
    count: Annotated[int, Field(gt=0)] | None = Field(None, description="so many a weight instead")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the draw")

    @property
    def method(self) -> Any:
        from ffnkit.methods.update.sparsegrad import SparseGrad as Method

        own = {key: getattr(self, key) for key in ("share", "count", "choose", "seed", "layers")}
        return Method(**own, basis="none", sites=self.targets, also=self.with_head)


class MeProp(_Adapting):
    """Train FFN weights by the largest part of their gradients only, chosen at every step.

    Source: "weights": the baseline of SparseGrad (arXiv 2410.07383), the largest entries of each weight's gradient.
        "outputs": meProp (arXiv 1706.06197), the largest entries of each token's gradient of a linear's outputs.
    """

    name: ClassVar[str] = "meprop"
    description: ClassVar[str] = "FFN weights, by the largest part of their gradients at every step"

    of: Literal["weights", "outputs"] = Field("weights", description="what is cut to its largest entries")
    share: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="of the entries that are kept")

    @property
    def method(self) -> Any | None:
        from ffnkit.methods.update.sparsegrad import SparseGrad as Method

        if self.of == "outputs":
            return None
        return Method(
            share=self.share,
            basis="none",
            selection="step",
            sites=self.targets,
            layers=self.layers,
            also=self.with_head,
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import meprop

        return super().prepare(model) if self.of == "weights" else meprop.prepare(model, self)

    def finish(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import meprop

        return super().finish(model) if self.of == "weights" else meprop.finish(model, self)


class Combined(_Updating):
    """Train updates of several kinds at once, each on linears of its own."""

    name: ClassVar[str] = "combined"
    description: ClassVar[str] = "updates of several tuners at once, each on linears of its own"

    parts: tuple[dict[str, Any], ...] = Field(
        description="tuners with their settings: [{name: sparsegrad, targets: ffn}, {name: dsee, targets: qv}]"
    )

    @field_validator("parts")
    @classmethod
    def _known(cls, parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        if len(parts) < 2:
            raise _wrong("two tuners or more are needed; write [{name: sparsegrad}, {name: dsee}]")
        for part in parts:
            try:
                tuner = get(part)
            except FfnkitError as error:
                raise _wrong(f"{error.asked}: {error.found}; {error.do}") from None
            if not isinstance(tuner, _Adapting) or tuner.method is None:
                raise _wrong(f"{tuner.name} puts no updates beside weights; name sparsegrad, dsee or mask")
            if twice := sorted(set(part) & set(_Updating.model_fields)):
                raise _wrong(f"{twice[0]} is about the whole model; write it beside parts")
        return parts

    @property
    def method(self) -> Any:
        from ffnkit.methods.combined import Combined as Method

        tuners = [cast(_Adapting, get({**part, "head": self.head, "also": self.also})) for part in self.parts]
        return Method([tuner.method for tuner in tuners])


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})


TUNERS: tuple[type[Tuner], ...] = (Full, Ffn, Lora, SparseGrad, Dsee, SparseMask, MeProp, Combined, Head)


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


def finish(model: nn.Module, tuner: str | Mapping[str, Any] | Tuner | None = None, *, merge: bool = True) -> nn.Module:
    """The plain transformers model after training; adapters are merged.

    Args:
        tuner: the one given to :func:`prepare`; None: told from the model.
        merge: with False, updates of ``fk.adapter``'s kinds stay on the model.
    """
    from ffnkit.checkpoint.adapters import is_adapted
    from ffnkit.model.trainable import is_limited

    if not merge and is_adapted(model):
        folder = getattr(get(tuner), "adapter_dir", None) if tuner is not None else None
        if folder is not None:
            from ffnkit.checkpoint.adapters import save_adapter

            save_adapter(cast("PreTrainedModel", model), folder)
        return model
    if tuner is None:
        if model.__dict__.get("_ffnkit_meprop"):
            tuner = MeProp(of="outputs")
        elif is_adapted(model):
            tuner = "sparsegrad"
        else:
            tuner = "lora" if hasattr(model, "merge_and_unload") else "ffn" if is_limited(model) else "full"
    return get(tuner).finish(model)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train (``requires_grad``), each once however often it is shared."""
    return list({id(p): p for p in model.parameters() if p.requires_grad}.values())
