"""The kinds of tuners: the whole model, its FFNs and task head, low-rank adapters, small updates. Light to import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic_core import PydanticCustomError

from ffnkit.errors import FfnkitError
from ffnkit.settings import WhichLayers
from ffnkit.settings.updates import DseeSettings, Part, SparseGradSettings
from ffnkit.tune.base import KEEP_ZEROS, ROUTERS, Adapting, Beside, Routers, Tuner, Updating, declared

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


class BitFit(Head):
    """Train every bias and the task head; nothing is added, and all the rest stays as it is.

    Source: Ben Zaken et al., BitFit (arXiv 2106.10199): the biases of linears and norms, query and key included.
    """

    name: ClassVar[str] = "bitfit"
    description: ClassVar[str] = "every bias and the task head"

    @property
    def with_head(self) -> list[str]:
        return [*super().with_head, "biases"]

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.model.trainable import parts_of

        head = {id(p) for p in parts_of(model, ["head"])}
        if not any(id(p) not in head for p in parts_of(model, ["biases"])):
            what = f"{type(model).__name__} has no bias outside its task head"
            raise FfnkitError("tuner bitfit", what, "Choose a tuner that adds something, such as lora")
        return super().put_on(model, preparation)


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
    modules_to_train: tuple[Part, ...] = Field(
        (), description="further parts that train: biases, norms, attention, ..."
    )
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
        plain: dict[str, Any] = {"tied": "shared", "quantize": "none", "modules_to_train": (), "keep_zeros": False}
        return {
            k: v for k, v in told.items() if k not in plain or plain[k] != (tuple(v) if k == "modules_to_train" else v)
        }

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.tune import lora

        return lora.put_on(model, self, preparation)

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import lora

        return lora.take_off(model, self)


class SparseGrad(declared(SparseGradSettings)):  # type: ignore[misc]  # mypy reads no class made by a call
    """Train about one percent of the entries of each FFN weight's update, in a basis where gradients are sparse.

    Source: SparseGrad (arXiv 2410.07383).
    """

    name: ClassVar[str] = "sparsegrad"
    plans: ClassVar[str] = "sparsegrad"
    description: ClassVar[str] = "few entries of each update, in a basis where gradients are sparse"


class Dsee(declared(DseeSettings)):  # type: ignore[misc]
    """Train a low-rank update and single entries of each weight, of query and value by default.

    Source: DSEE (arXiv 2111.00160).
    """

    name: ClassVar[str] = "dsee"
    plans: ClassVar[str] = "dsee"
    description: ClassVar[str] = "a low-rank update and single entries of each weight"


class SparseMask(
    declared(  # type: ignore[misc]
        SparseGradSettings,
        *("targets", "layers", "choose", "density", "count", "seed"),
        choose=(Literal["random", "magnitude"], "random"),
    )
):
    """Train single entries of each FFN weight: drawn at random, or the largest ones.

    Source: the sparse masks of SHiRA (arXiv 2406.13175); baselines of SparseGrad.
    """

    name: ClassVar[str] = "mask"
    plans: ClassVar[str] = "sparsegrad"
    fixed: ClassVar[Mapping[str, Any]] = {"basis": "none"}
    description: ClassVar[str] = "single entries of each FFN weight: random ones, or the largest"


class MeProp(declared(SparseGradSettings, "targets", "layers", "density")):  # type: ignore[misc]
    """Train FFN weights by the largest part of their gradients only, chosen at every step.

    Source: "weights": the baseline of SparseGrad (arXiv 2410.07383), the largest entries of each weight's gradient.
        "outputs": meProp (arXiv 1706.06197), the largest entries of each token's gradient of a linear's outputs.
    """

    name: ClassVar[str] = "meprop"
    plans: ClassVar[str] = "sparsegrad"
    fixed: ClassVar[Mapping[str, Any]] = {"basis": "none", "selection": "masked-gradient"}
    description: ClassVar[str] = "FFN weights, by the largest part of their gradients at every step"

    of: Literal["weights", "outputs"] = Field("weights", description="what is cut to its largest entries")

    @property
    def method(self) -> Any | None:
        return super().method if self.of == "weights" else None

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.tune import meprop

        return super().put_on(model, preparation) if self.of == "weights" else meprop.put_on(model, self, preparation)

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import meprop

        return super().take_off(model) if self.of == "weights" else meprop.take_off(model, self)


class Bottleneck(Beside):
    """Train bottleneck adapters behind attentions and FFNs, and the task head; the adapters stay on the model.

    Source: Houlsby et al. (arXiv 1902.00751), behind both; Pfeiffer et al. (arXiv 2005.00247), behind the FFN alone.
    """

    name: ClassVar[str] = "bottleneck"
    description: ClassVar[str] = "bottleneck adapters and the task head; they stay on the model"
    stays: ClassVar[bool] = True

    size: Annotated[int, Field(gt=0)] = Field(64, description="width of the adapters")
    behind: Literal["both", "ffn"] = Field("both", description="both: attentions and FFNs (Houlsby); ffn (Pfeiffer)")
    activation: str = Field("gelu", description="between the two linears, as transformers knows it")
    layers: WhichLayers = Field("all", description="of which layers, as of every method")

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.tune import bottleneck

        return bottleneck.put_on(model, self, preparation)


class Prefix(Beside):
    """Train keys and values of virtual tokens (peft's prefix tuning) and the task head; they stay on the model.

    Source: Li and Liang, prefix tuning (arXiv 2101.00190); as numbers of their own, as P-tuning v2 (arXiv 2110.07602).
    """

    name: ClassVar[str] = "prefix"
    description: ClassVar[str] = "keys and values of virtual tokens and the task head, through peft; they stay"
    stays: ClassVar[bool] = True

    tokens: Annotated[int, Field(gt=0)] = Field(20, description="number of virtual tokens")

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.tune import prefix

        return prefix.put_on(model, self, preparation)

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import prefix

        return prefix.take_off(model)


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

        tuners = [
            cast(Adapting, get({**part, "head": self.head, "modules_to_train": self.modules_to_train}))
            for part in self.parts
        ]
        return Method([tuner.method for tuner in tuners])


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})
