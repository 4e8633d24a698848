"""Smaller pieces of a recipe: limits, measuring, tuners and methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from ffnkit.errors import FfnkitError
from ffnkit.recipe.settings import check_method, check_tuner, method_today, tuner_today
from ffnkit.recipe.validation import fail
from ffnkit.tune.settings import CalibrationSettings

Count = Annotated[int, Field(strict=True, gt=0)]


class Part(BaseModel):
    """A piece of a recipe: unknown fields are refused, nothing changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Part):
    """How many rows of each split are used; null takes all, of dev the task's usual share of train."""

    train: Count | None = None
    dev: Count | None = None
    report: Count | None = None


class Calibration(CalibrationSettings):
    """What methods that measure activations see, or statistics of a pass over it (``ffnkit calibrate``)."""

    statistics: Annotated[
        str | None, Field(description="a file of statistics, in the place of data; of this model with these weights")
    ] = None

    @model_validator(mode="after")
    def _one(self) -> Calibration:
        if self.statistics is not None and self.text is not None:
            raise PydanticCustomError("recipe", "text and statistics are both given; leave one of them out")
        return self


class Measure(Part):
    """How latency is measured, once, at the end of the run."""

    latency: StrictBool = True
    batch_size: Count = 32
    length: Count = 128
    repeats: Count = 20


class Launch(Part):
    """In how many processes a unit is trained, each with batches and a GPU of its own, and how they share the model.

    ddp: each holds the whole model. fsdp: each holds a part of every weight, through FSDP2.
    """

    processes: Count
    strategy: Literal["ddp", "fsdp"] = "ddp"


class Tickets(Part):
    """Iterative magnitude pruning with rewinding before an arm is tuned.

    ``rounds`` times the arm is tuned and ``share`` of the weights that are left, the smallest, are masked; then what is
    left is rewound: to the weights from before, or to those of the first tuning after ``rewind`` steps. ``targets`` are
    those of the method prune.
    """

    rounds: Count
    share: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    rewind: Annotated[int, Field(strict=True, ge=0)] = 0
    targets: str = "all"

    def sparsity(self, number: int) -> float:
        """The share of zeros after a round, counted from 0."""
        return 1 - (1 - self.share) ** (number + 1)


def wrong_tickets(arm: Any, tuner: str, stages: tuple[str, ...]) -> str:
    """What is wrong with an arm that has tickets, or ""."""
    if arm.compressed or arm.prune:
        return "are drawn from the whole model; leave method and prune out of the arm"
    if tuner not in ("full", "ffn"):
        return f"need a tuner that trains the weights themselves, full or ffn, not {tuner}"
    return "" if "tune" in stages else "need the stage tune"


def settings_today(read: Callable[..., dict[str, Any]], name: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under the names of today, by what reads those of a kind; pydantic's error where both are given."""
    try:
        return read(name, settings)
    except FfnkitError as error:
        fail((), f"{error.asked}: {error.found}; {error.do}", name)


class TunerSpec(BaseModel):
    """A tuner by name; further fields are the tuner's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "full"

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, TunerSpec):
            return value
        return settings_today(tuner_today, value.get("name"), value) if isinstance(value, dict) else {"name": value}

    @model_validator(mode="after")
    def _known(self) -> TunerSpec:
        complaint = check_tuner(self.name, self.settings)
        if complaint:
            fail(("name",), complaint, self.name)
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The tuner's own settings."""
        return dict(self.model_extra or {})


class Pruning(BaseModel):
    """A method that takes something away after tuning; further fields are the method's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: str

    @model_validator(mode="before")
    @classmethod
    def _of_today(cls, value: Any) -> Any:
        return settings_today(method_today, value.get("method"), value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _known(self) -> Pruning:
        complaint = check_method(self.method, self.settings)
        if complaint:
            fail((complaint[0],), complaint[1], self.settings.get(complaint[0], self.method))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings."""
        return dict(self.model_extra or {})
