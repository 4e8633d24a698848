"""What a search is told, from the command line or a recipe; light to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ffnkit.errors import FfnkitError
from ffnkit.io.yaml_text import read_yaml
from ffnkit.recipe import shipped
from ffnkit.recipe.loading import read_text
from ffnkit.recipe.parts import Count, Limits, Measure, Part
from ffnkit.recipe.schema import TaskSpec
from ffnkit.recipe.validation import explain
from ffnkit.tune.healing.settings import HealSettings, Tokens
from ffnkit.tune.settings import CalibrationSettings, TrainSettings

Objective = Literal["params", "flops", "bytes", "latency"]
How = Literal["width", "widths", "fit", "layers", "ffns", "shared", "heads"]
HOWS: tuple[How, ...] = get_args(How)
COUNTED: dict[Objective, str] = {
    "params": "parameters",
    "flops": "FLOPs a token",
    "bytes": "bytes",
    "latency": "FLOPs a token",  # which foresee it; the clock decides among the last
}
KEEP = 0.99
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]


class SearchSettings(Part):
    """What is to be kept, what to make small, what is proposed and how much of it is tuned.

    ``keep`` is the share of the metric that stays, of one where less is better the original's over the model's;
    ``within`` says instead how much worse it may be: 0.15 lets accuracy fall to 0.85 of the original's, perplexity rise
    to 1.15 times it. ``candidates`` are measured before tuning, ``tuned`` of them heal on ``tokens`` tokens; in each of
    the further ``rungs`` one of ``factor`` goes on, with ``factor`` times as many.
    """

    keep: Share | None = None
    within: Annotated[float, Field(strict=True, gt=0)] | None = None
    objective: Objective = "params"
    methods: Annotated[tuple[How, ...], Field(min_length=1)] = HOWS
    candidates: Count = 24
    tuned: Count = 9
    rungs: Count = 3
    factor: Annotated[int, Field(strict=True, ge=2)] = 3
    tokens: Tokens = 20_000
    least: Share = 0.2
    seed: Annotated[int, Field(strict=True, ge=0)] = 0

    @model_validator(mode="after")
    def _one_of_two(self) -> SearchSettings:
        if self.keep is not None and self.within is not None:
            raise PydanticCustomError("recipe", "has keep and within; give one of the two")
        return self

    def floor(self, more: bool) -> float:
        """The share of the metric that has to stay: the model's over the original's, where less is better the other
        way round."""
        if self.within is None:
            return self.keep or KEEP
        return max(1 - self.within, 0.0) if more else 1 / (1 + self.within)


class SearchRecipe(Part):
    """A search: model, task or text, and settings as in a recipe of arms."""

    name: str = "search"
    notes: str = ""
    model: str
    tokenizer: str | None = None
    task: TaskSpec | None = None
    data_dir: str | None = None
    limits: Limits = Limits(dev=2000)
    calibration: CalibrationSettings = Field(default_factory=lambda: CalibrationSettings.model_validate({}))
    tune: TrainSettings = Field(default_factory=lambda: TrainSettings.model_validate({}))
    heal: HealSettings = Field(default_factory=lambda: HealSettings.model_validate({}))
    measure: Measure = Measure()
    search: SearchSettings = SearchSettings()

    @model_validator(mode="after")
    def _data(self) -> SearchRecipe:
        if self.task is not None and self.calibration.text is not None:
            raise PydanticCustomError("recipe", "names a task and calibration.text; a search is by one of the two")
        return self


def is_search(data: Any) -> bool:
    """Whether what a recipe's file holds is a search of models: its ``search`` says nothing of learning rates."""
    found = data.get("search") if isinstance(data, dict) else None
    return isinstance(found, dict) and "learning_rate" not in found and "arms" not in data


def read_search(path: str | Path) -> SearchRecipe | None:
    """The search in a YAML file; None where it holds another recipe.

    Raises:
        FfnkitError: the file cannot be read, or a field is wrong.
    """
    if str(path) in shipped.names() and not Path(path).exists():
        return None  # a recipe that comes with ffnkit
    data = read_yaml(read_text(path), str(path))
    return search_from(data, str(path)) if is_search(data) else None


def search_from(data: dict[str, Any], where: str) -> SearchRecipe:
    """Check plain data. Raises FfnkitError: one line that names the wrong fields."""
    try:
        return SearchRecipe.model_validate(data)
    except ValidationError as error:
        raise explain(error, data, where) from None


def check_optuna() -> None:
    """Raises FfnkitError where Optuna is not installed."""
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise FfnkitError("ffnkit search", "Optuna is not installed", "pip install 'ffnkit[search]'")
