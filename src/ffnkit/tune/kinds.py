"""The kinds of tuners: the whole model, its FFNs and task head, low-rank adapters, small updates. Light to import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic_core import PydanticCustomError

from ffnkit.errors import FfnkitError
from ffnkit.tune.base import KEEP_ZEROS, ROUTERS, Adapting, Beside, Part, Routers, Tuner, Updating

if TYPE_CHECKING:
    from torch import nn

    from ffnkit.tune.lifecycle import Preparation


class Full(Tuner):
    """Train every parameter of the model, or all but the routers."""

    name: ClassVar[str] = "full"
    description: ClassVar[str] = "every parameter"

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.model.trainable import train_only

        found = self.routers_of(model)
        if self.routers == "frozen":
            fixed = {id(p) for module in found.values() for p in module.parameters()}
            train_only(model, lambda parameter: id(parameter) not in fixed)
        return model

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.model.trainable import train_as_before

        return train_as_before(model)


class Head(Beside):
    """Train the task head only, and further parts that are named; the least that a task can do."""

    name: ClassVar[str] = "head"
    description: ClassVar[str] = "the task head alone"

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.model.trainable import train_only

        chosen = self.beside(model)
        train_only(model, lambda parameter: id(parameter) in chosen)
        return model


class Ffn(Beside):
    """Train the FFNs and the task head only; embeddings, attention, norms and routers stay as they are."""

    name: ClassVar[str] = "ffn"
    description: ClassVar[str] = "the FFNs and the task head"

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
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

    routers: Routers = Field("frozen", description=f"{ROUTERS}; trained: whole, without adapters")
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
    keep_zeros: bool = Field(False, description=KEEP_ZEROS)

    @model_serializer(mode="wrap")
    def _told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Later settings are told where they are not the default, so that facts about runs without them stay so."""
        told: dict[str, Any] = handler(self)
        plain: dict[str, Any] = {"tied": "shared", "quantize": "none", "also": (), "keep_zeros": False}
        return {k: v for k, v in told.items() if k not in plain or plain[k] != (tuple(v) if k == "also" else v)}

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.tune import lora

        return lora.put_on(model, self, preparation)

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import lora

        return lora.take_off(model, self)


class SparseGrad(Adapting):
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


class Dsee(Adapting):
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


class SparseMask(Adapting):
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


class MeProp(Adapting):
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

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.tune import meprop

        return super().put_on(model, preparation) if self.of == "weights" else meprop.put_on(model, self, preparation)

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import meprop

        return super().take_off(model) if self.of == "weights" else meprop.take_off(model, self)


class Combined(Updating):
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
        from ffnkit.tune.tuners import get

        for part in parts:
            try:
                tuner = get(part)
            except FfnkitError as error:
                raise _wrong(f"{error.asked}: {error.found}; {error.do}") from None
            if not isinstance(tuner, Adapting) or tuner.method is None:
                raise _wrong(f"{tuner.name} puts no updates beside weights; name sparsegrad, dsee or mask")
            if twice := sorted(set(part) & set(Updating.model_fields)):
                raise _wrong(f"{twice[0]} is about the whole model; write it beside parts")
        return parts

    @property
    def method(self) -> Any:
        from ffnkit.methods.combined import Combined as Method
        from ffnkit.tune.tuners import get

        tuners = [cast(Adapting, get({**part, "head": self.head, "also": self.also})) for part in self.parts]
        return Method([tuner.method for tuner in tuners])


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})
