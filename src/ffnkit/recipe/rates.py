"""The search of learning rates in a recipe: what is tried for each arm, and the rules of it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ffnkit.recipe.parts import Count, Part
from ffnkit.recipe.validation import fail
from ffnkit.settings.words import in_words
from ffnkit.tune.settings import Positive

Share = Annotated[float, Field(strict=True, gt=0, lt=1)]


class Rates(Part):
    """Which learning rates an arm is tried with: those of a list, or ``trials`` of a range, by Optuna."""

    values: tuple[Positive, ...] = ()
    low: Positive | None = None
    high: Positive | None = None
    trials: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, Rates | dict):
            return value
        if not isinstance(value, list | tuple):
            fail(
                (),
                "is neither a list of rates nor a range; write [1e-5, 1e-4] or {low: 1e-6, high: 1e-3, trials: 8}",
                value,
            )
        return {"values": value}

    @model_validator(mode="after")
    def _one_of_two(self) -> Rates:
        own = (self.low, self.high, self.trials)
        if self.values and any(each is not None for each in own):
            raise PydanticCustomError("recipe", "has values and a range; give one of the two")
        if not self.values and (self.low is None or self.high is None or self.trials is None):
            raise PydanticCustomError("recipe", "needs a list of rates, or low, high and trials")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise PydanticCustomError("recipe", "has a low that is not below its high")
        if len(set(self.values)) < len(self.values):
            raise PydanticCustomError("recipe", "names a rate twice")
        return self

    @property
    def budget(self) -> int:
        """How many rates are tried."""
        return self.trials or len(self.values)

    def to_plain(self) -> Any:
        """As it stands in a recipe."""
        return list(self.values) if self.values else {"low": self.low, "high": self.high, "trials": self.trials}


class ArmSearch(Part):
    """What an arm says of the search: rates of its own, as many as the others try."""

    learning_rate: Rates


class Search(Part):
    """Search of the learning rate, for each arm by itself, scored on rows of train that nothing else sees.

    ``rows`` of train are kept apart, a count or a share: they choose the checkpoint and give the score of a trial, and
    trials train on the others. ``tune`` holds settings of the tuning that differ in trials. ``seed`` draws the rows
    and, in a range, the rates.
    """

    learning_rate: Rates
    rows: Count | Share = 0.1
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    tune: dict[str, Any] = Field(default_factory=dict)

    @field_validator("tune")
    @classmethod
    def _no_rate(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "learning_rate" in value:
            fail(("learning_rate",), "is what is searched; leave it out", value["learning_rate"])
        return value


def wrong_search(recipe: Any, name: str) -> tuple[tuple[str, ...], str, Any] | None:
    """What is wrong with an arm beside the recipe's search: the field below the arm, why, and its value; or None."""
    arm = recipe.arms[name]
    if recipe.search is None:
        return None if arm.search is None else (("search",), "needs a search of the whole recipe beside it", None)
    if "learning_rate" in (arm.tune or {}):
        return ("tune", "learning_rate"), "is given beside a search; leave one out", (arm.tune or {})["learning_rate"]
    first = next(iter(recipe.arms))
    tried, wanted = recipe.rates_of(name).budget, recipe.rates_of(first).budget
    if tried != wanted:
        return ("search",), f"tries {tried} rates where {first} tries {wanted}; give every arm as many trials", tried
    return None


def check_trials(recipe: Any) -> None:
    """Raises pydantic's error where trials cannot be: without tuning, or by settings that are none."""
    if "tune" not in recipe.stages:
        fail(("stages",), "a search of rates needs the stage tune", list(recipe.stages))
    for arm in recipe.arms:
        try:
            recipe.trial_of(arm, 1e-5)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            why = f"{in_words(first['msg'])} (arm {arm})"
            fail(("search", "tune", *(str(each) for each in first["loc"])), why, first["input"])
