"""What all tuners have in common: settings, and the way onto a model and off it. Light to import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from ffnkit.errors import FfnkitError
from ffnkit.settings import Setting, settings_of
from ffnkit.settings.checked import Checked
from ffnkit.settings.presets import Preset, presets_of
from ffnkit.settings.updates import Part

if TYPE_CHECKING:
    from torch import nn

    from ffnkit.tune.lifecycle import Preparation

Routers = Literal["trained", "frozen"]
KEEP_ZEROS = "weights that are zero before (pruned) are zero after it; without it merging fills them"
ROUTERS = "routers of a mixture of experts: trained or frozen"
_COEFFICIENTS = "l1 weight of coefficients learnt on heads and neurons, which structured pruning reads; 0: none"


class Tuner(Checked):
    """Base of all tuners: fields are settings. A kind of tuner defines :meth:`put_on` and :meth:`take_off`."""

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    stays: ClassVar[bool] = False  # whether what it adds stays on the finished model, since no weight can hold it
    old_names: ClassVar[Mapping[str, str]] = {"also": "modules_to_train", "share": "density"}

    routers: Routers = Field("trained", description=ROUTERS)

    @field_validator("layers", mode="before", check_fields=False)
    @classmethod
    def _one_layer(cls, value: Any) -> Any:
        """A number alone is a layer, as it is to methods (YAML reads ``layers: 4`` as one)."""
        return str(value) if type(value) is int else value

    def prepare(
        self,
        model: nn.Module,
        data: Iterable[Mapping[str, Any]] | None = None,
        keep: Path | None = None,
        progress: bool = False,
    ) -> nn.Module:
        """Set what trains, in place; the model to train comes back.

        A tuner that was prepared on the model and never finished is undone first (``lifecycle.undone``). Where this
        fails, for whatever reason, the model is as it was.

        Args:
            data: batches with labels, for tuners that read gradients.
            keep: a file that holds the plan of a run that goes on: read where it is there, else written.
            progress: tell on stderr where long work is.

        Raises:
            FfnkitError: settings that do not fit the model: routers that it has not, targets that match nothing;
                gradients are needed and there are no data.
        """
        from ffnkit.model.linear import added_to
        from ffnkit.tune import lifecycle

        model = lifecycle.undone(model)
        if added := added_to(model):
            what, do = f"it carries a {added} that no weight can hold", "take it off (tune.remove_added)"
            raise FfnkitError(f"tuner {self.name} on {type(model).__name__}", what, f"Edit before it comes, or {do}")
        with lifecycle.preparing(model, data, keep, progress) as preparation:
            return self.put_on(model, preparation)

    def finish(self, model: nn.Module) -> nn.Module:
        """A plain transformers model with the trained weights; what ``stays`` stays on it.

        Where this fails it can be called again.
        """
        from ffnkit.tune import lifecycle

        with lifecycle.finishing(model):
            return self.take_off(model)

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        """Set what trains, in place; the model to train comes back."""
        return model

    def take_off(self, model: nn.Module) -> nn.Module:
        """A plain transformers model with the trained weights."""
        return model

    @model_validator(mode="after")
    def _head_said_once(self) -> Self:
        if "head" in getattr(self, "modules_to_train", ()) and not getattr(self, "head", True):
            raise ValueError("modules_to_train names the head, and head is false; leave one of the two out")
        return self

    @property
    def method(self) -> Any | None:
        """The method whose plan sets what trains, for tuners that have one: it may want batches with labels."""
        return None

    def routers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's routers by name; FfnkitError where the setting asks for something and there are none."""
        from ffnkit.model.experts import routers

        found = routers(model)
        if not found and self.routers != type(self).model_fields["routers"].default:
            asked = f"tuner {self.name}: routers {self.routers}"
            raise FfnkitError(asked, f"{type(model).__name__} has no router", "Leave the setting out")
        return found


class Beside(Tuner):
    """What tuners have in common that train a part of the model: which other parts train too."""

    routers: Routers = Field("frozen", description=ROUTERS)
    head: bool = Field(True, description="train the task head too")
    modules_to_train: tuple[Part, ...] = Field(
        (), description="further parts that train: biases, norms, attention, ..."
    )

    @property
    def with_head(self) -> list[str]:
        """``modules_to_train``, and the head where it trains."""
        return list(dict.fromkeys([*(["head"] if self.head else []), *self.modules_to_train]))

    def beside(self, model: nn.Module) -> set[int]:
        """The ids of the parameters of those parts, routers included where they train."""
        from ffnkit.model.trainable import parts_of

        found = self.routers_of(model)
        chosen = {id(p) for p in parts_of(model, self.with_head)}
        routed = {id(p) for module in found.values() for p in module.parameters()}
        return chosen | routed if self.routers == "trained" else chosen - routed

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.model.trainable import train_as_before

        return train_as_before(model)


class Updating(Beside):
    """What tuners have in common that put small updates beside frozen weights, wherever they do."""

    adapter_dir: Path | None = Field(None, description="also save the updates there, as a small adapter")
    apart_dir: Path | None = Field(
        None, description="also save the model there with its updates apart from it, zeros below them as they are"
    )
    keep_zeros: bool = Field(False, description=KEEP_ZEROS)
    coefficients: Annotated[float, Field(ge=0)] = Field(0.0, description=_COEFFICIENTS)

    @model_serializer(mode="wrap")
    def _later_told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Later settings are told where they are not the default, so that facts about runs without them stay so."""
        told: dict[str, Any] = handler(self)
        return {k: v for k, v in told.items() if k not in ("keep_zeros", "coefficients", "preset", "apart_dir") or v}

    def put_on(self, model: nn.Module, preparation: Preparation) -> nn.Module:
        from ffnkit.tune import planned

        return planned.put_on(model, self, preparation)

    def take_off(self, model: nn.Module) -> nn.Module:
        from ffnkit.tune import planned

        return planned.take_off(model, self)


class Adapting(Updating):
    """What tuners have in common whose updates a method plans: its settings, but for what trains beside."""

    plans: ClassVar[str] = ""
    fixed: ClassVar[Mapping[str, Any]] = {}

    @property
    def method(self) -> Any | None:
        from ffnkit import methods

        kind = methods.get(self.plans)
        names = {each.name for each in settings_of(kind)} & set(type(self).model_fields) - {"modules_to_train"}
        own = {name: getattr(self, name) for name in names}
        return kind(**own, **self.fixed, modules_to_train=self.with_head)


def declared(settings: type, *names: str, **others: Any) -> type[Adapting]:
    """A base for tuners that has settings of a method as they are declared there: types, defaults, bounds, meaning.

    Args:
        settings: the declaration. names: of the settings; all but ``modules_to_train`` where none is given.
        others: settings whose type or default is another here: (type, default).
    """
    chosen = [each for each in settings_of(settings) if each.name in names or not names]
    fields: dict[str, Any] = {each.name: _field(each) for each in chosen if each.name != "modules_to_train"}
    for name, (kind, default) in others.items():
        fields[name] = (kind, Field(default, description=fields[name][1].description))
    made = create_model(f"Of{settings.__name__}", __base__=Adapting, **fields)
    if "preset" in fields:
        made.presets = {name: _of_tuner(preset) for name, preset in presets_of(settings).items()}  # type: ignore[attr-defined]
    return made


def _of_tuner(preset: Preset) -> Preset:
    """A preset of a method for its tuner, which has the task head apart."""
    values = dict(preset.values)
    if "modules_to_train" in values:
        values["head"] = "head" in values["modules_to_train"]
        values["modules_to_train"] = tuple(part for part in values["modules_to_train"] if part != "head")
    return Preset(preset.source, values)


def _field(setting: Setting) -> tuple[Any, Any]:
    doc, bounds = setting.doc, []
    for kind, value in ((Ge, doc.at_least), (Gt, doc.above), (Le, doc.at_most), (Lt, doc.below)):
        bounds += [] if value is None else [kind(value)]
    kinds: list[Any] = [Annotated[each, *bounds] if bounds and each in (int, float) else each for each in setting.kinds]
    union = reduce(or_, kinds)
    return union | None if setting.optional else union, Field(setting.default, description=doc.text.rstrip("."))
