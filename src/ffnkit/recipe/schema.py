"""What a recipe may hold: the fields, their types, and the rules between them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StrictBool, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ffnkit.errors import FfnkitError, RenamedWarning
from ffnkit.recipe.parts import (
    Calibration,
    Count,
    Launch,
    Limits,
    Measure,
    Part,
    Pruning,
    Tickets,
    TunerSpec,
    settings_today,
    wrong_tickets,
)
from ffnkit.recipe.rates import ArmSearch, Rates, Search, check_trials, wrong_search
from ffnkit.recipe.settings import (
    check_budget,
    check_method,
    check_target,
    check_task,
    method_today,
    tuner_stays,
    tuner_today,
    widened,
)
from ffnkit.recipe.validation import details, explain, fail
from ffnkit.settings import settings_of
from ffnkit.settings.presets import filled
from ffnkit.settings.words import in_words
from ffnkit.tasks.fields import Head, Kind, LabelKind, TaskFields
from ffnkit.tasks.settings import GenerationSettings, HarnessSettings, JudgeSettings
from ffnkit.tune.healing.settings import HealSettings
from ffnkit.tune.settings import DistilSettings, TrainSettings

Stage = Literal["compress", "heal", "distil", "tune", "prune", "recover", "evaluate", "export"]
STAGES: tuple[Stage, ...] = get_args(Stage)
NAMES = {"inputs": "input"}  # fields of a task whose name in a recipe is another
NONE = "none"  # the method of an arm that is left uncompressed


def task_today(task: dict[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """A task with ``label_kind`` in the place of ``regression``, its name before."""
    if "regression" not in task:
        return task
    old = task["regression"]
    if not quiet:
        line = "task.regression is called task.label_kind now (class or number); the old name will go"
        warnings.warn(line, RenamedWarning, stacklevel=2)
    kind = {True: "number", False: "class"}.get(old, old)
    return {**{name: value for name, value in task.items() if name != "regression"}, "label_kind": kind}


class TaskSpec(Part):
    """A task known by name, or files of one's own with the names of their columns.

    ``text`` and ``label`` make a classification or regression, ``input`` and ``target`` a generation task; a .txt file,
    or ``kind: language-modelling`` with ``text``, is for language modelling; a folder or archive of images in folders
    of their classes is for image classification; dialogues (``kind: instruction``, or by their columns) are for
    instruction tuning, with a chat ``template``.
    """

    name: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    input: tuple[str, ...] = ()
    target: str | None = None
    template: str | None = None
    metric: str | None = None
    label_kind: LabelKind | None = None
    kind: Kind | None = None
    stride: Count | None = None
    head: Head | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, dict):
            single = {name: [value[name]] for name in ("text", "input") if isinstance(value.get(name), str)}
            return task_today({**value, **single})
        return {"name": value}

    @model_validator(mode="after")
    def _one_of_two(self) -> TaskSpec:
        from ffnkit.tasks.choosing import Choice

        complaint = check_task(self.name) if self.name is not None else None
        if complaint:
            fail(("name",), complaint, self.name)
        problem = Choice(**self.choice()).problem()
        if problem:
            field, found, do = problem
            fail((NAMES.get(field, field),), f"{found}; {do}", getattr(self, NAMES.get(field, field)))
        return self

    def choice(self) -> dict[str, Any]:
        """The fields as :class:`ffnkit.tasks.choosing.Choice` calls them."""
        known = {name: field for field, name in NAMES.items()}
        return {known.get(name, name): value for name, value in self}

    @property
    def where(self) -> str:
        """The task in words."""
        from ffnkit.tasks.choosing import Choice

        return Choice(**self.choice()).where


for _each in settings_of(TaskFields):  # what each field of a task means is said there
    TaskSpec.model_fields[NAMES.get(_each.name, _each.name)].description = _each.doc.text
TaskSpec.model_rebuild(force=True)


class Arm(Part):
    """One way to treat the model; the method's own settings stand beside ``method`` in the file.

    ``budget`` takes the place of the setting ``width``: widths by layer that keep to it, multiples of ``multiple``, or
    one width for all with ``uniform``. ``target`` takes the place of a method: the settings of ``fit-to``, such as
    ``{params: 0.8}``. ``tune`` holds the settings of the tuning that differ for this arm, such as its
    learning rate; ``search`` the rates that are tried for it. ``tickets`` prunes round by round before the tuning.
    ``prune`` names what the stage prune does between tuning and recovery, one method or several in turn; ``recover``
    the settings of the recovery that differ.
    """

    method: str = NONE
    budget: Annotated[float, Field(strict=True, gt=0, lt=1)] | Count | None = None
    multiple: Count | None = None
    uniform: StrictBool | None = None
    target: dict[str, Any] | None = None
    tuner: TunerSpec | None = None
    tune: dict[str, Any] | None = None
    prune: tuple[Pruning, ...] = ()
    recover: dict[str, Any] | None = None
    search: ArmSearch | None = None
    tickets: Tickets | None = None
    distil: StrictBool = True
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        value = {} if value is None else value
        if not isinstance(value, dict):
            return value
        own = {key: value[key] for key in cls.model_fields if key in value and key != "settings"}
        settings = {key: item for key, item in value.items() if key not in own}
        method = own.get("method", NONE)
        if own.get("target") is not None and (wrong := check_target(str(method), own)):
            fail(("target",), wrong, own["target"])
        if isinstance(method, str):
            settings = settings_today(method_today, method, settings)
            complaint = check_budget(method, settings, own) or check_method(method, widened(settings, own))
            if complaint:
                fail((complaint[0],), complaint[1], settings.get(complaint[0], method))
        return {**own, "settings": settings}

    @field_validator("prune", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @property
    def compressed(self) -> bool:
        """Whether a method is applied."""
        return self.method != NONE or self.target is not None

    @property
    def placed(self) -> dict[str, Any]:
        """The settings with a width that stands in for the ones that the budget will give."""
        return widened(self.settings, {"budget": self.budget})


class Recipe(Part):
    """A run: every arm with every seed on one task."""

    name: str
    notes: str = ""
    model: str
    tokenizer: str | None = None
    task: TaskSpec
    data_dir: str | None = None
    limits: Limits = Limits()
    calibration: Calibration = Field(default_factory=lambda: Calibration.model_validate({}))
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**32)], ...] = (0,)
    stages: tuple[Stage, ...] = ("compress", "tune", "evaluate", "export")
    tuner: TunerSpec = TunerSpec()
    arms: dict[str, Arm]
    tune: TrainSettings = Field(default_factory=lambda: TrainSettings.model_validate({}))
    recover: dict[str, Any] = Field(default_factory=dict)
    search: Search | None = None
    launch: Launch | None = None
    heal: HealSettings = Field(default_factory=lambda: HealSettings.model_validate({}))
    distil: DistilSettings = Field(default_factory=lambda: DistilSettings.model_validate({}))
    generation: GenerationSettings = Field(default_factory=lambda: GenerationSettings.model_validate({}))
    evaluate_before: StrictBool = False
    forgetting: str | None = None
    judge: JudgeSettings | None = None
    lm_eval: HarnessSettings | None = None
    export: Literal["none", "compact", "standard", "both", "apart", "all"] = "both"
    export_seeds: Literal["first", "all"] = "first"
    measure: Measure = Measure()

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise PydanticCustomError("recipe", "is empty; give at least one seed")
        twice = [seed for seed, count in Counter(seeds).items() if count > 1]
        if twice:
            raise PydanticCustomError("recipe", "seed {seed} is given twice", {"seed": twice[0]})
        return seeds

    @field_validator("stages")
    @classmethod
    def _stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if not stages:
            raise PydanticCustomError("recipe", "is empty; give at least one of {all}", {"all": ", ".join(STAGES)})
        right = [stage for stage in STAGES if stage in stages]
        if list(stages) != right:
            what = "a stage is given twice" if len(set(stages)) < len(stages) else "is out of order"
            raise PydanticCustomError("recipe", what + "; write [{right}]", {"right": ", ".join(right)})
        return stages

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        if not arms:
            raise PydanticCustomError("recipe", "is empty; give at least one arm, such as `uncompressed: {{}}`")
        for name in arms:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                fail((name,), "an arm's name becomes a folder: letters, digits, dot, dash and underscore only", name)
        return arms

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        wrong: list[InitErrorDetails] = []
        for name, arm in self.arms.items():
            if arm.compressed and "compress" not in self.stages:
                fail(("stages",), f"arm {name} has a method, so the stage compress is needed", list(self.stages))
            if arm.tickets is not None and (odd := wrong_tickets(arm, self.tuner_of(name).name, self.stages)):
                fail(("arms", name, "tickets"), odd, None)
            if arm.prune and tuner_stays(self.tuner_of(name).name):
                what = f"{self.tuner_of(name).name} stays on the model, and nothing is pruned below it"
                fail(("arms", name, "prune"), what, [spec.method for spec in arm.prune])
            if arm.prune and "prune" not in self.stages:
                fail(("stages",), f"arm {name} has pruning, so the stage prune is needed", list(self.stages))
            if complaint := wrong_search(self, name):
                fail(("arms", name, *complaint[0]), complaint[1], complaint[2])
            wrong += self._check_training(name, "tune", self.tune_of)
            if self.recovers(name) or arm.recover is not None:
                wrong += self._check_training(name, "recover", self.recover_of)
        if wrong:
            raise ValidationError.from_exception_data("recipe", wrong)
        for first, then in (("tune", "prune"), ("prune", "recover")):
            if then in self.stages and first not in self.stages:
                fail(("stages",), f"{then} needs {first} before it", list(self.stages))
        if self.search is not None:
            check_trials(self)
        alone = "search" if self.search is not None else "tickets" if any(a.tickets for a in self.arms.values()) else ""
        if self.launch is not None and alone:
            fail(("launch",), f"{alone} trains in one process, on other batches; leave one of the two out", None)
        if self.forgetting is not None and "evaluate" not in self.stages:
            fail(("stages",), "forgetting is measured in the stage evaluate", list(self.stages))
        if self.lm_eval is not None and "evaluate" not in self.stages:
            fail(("stages",), "lm_eval is measured in the stage evaluate", list(self.stages))
        if self.judge is not None and ("evaluate" not in self.stages or len(self.arms) < 2):
            fail(("judge",), "answers of two arms or more, of the stage evaluate, are compared", None)
        for then in ("heal", "distil"):
            if then in self.stages and "compress" not in self.stages:
                fail(("stages",), f"{then} needs compress before it", list(self.stages))
        return self

    def _check_training(self, name: str, stage: str, read: Callable[[str], TrainSettings]) -> list[InitErrorDetails]:
        """What is wrong with the settings of an arm's stage."""
        given, wrong = getattr(self.arms[name], stage) or {}, []
        try:
            read(name)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                path = [str(part) for part in each["loc"]] or [next(iter(given), "")]
                where = ("arms", name, stage) if path[0] in given else (stage,)
                wrong.append(details((*where, *path), in_words(each["msg"]), each["input"]))
        return wrong

    def tune_of(self, arm: str, rate: float | None = None) -> TrainSettings:
        """The settings of an arm's tuning: the recipe's with the arm's own in their place, and a rate found."""
        own = filled(TrainSettings, self.arms[arm].tune or {}) | ({} if rate is None else {"learning_rate": rate})
        return TrainSettings.model_validate({**self.tune.model_dump(), **own}) if own else self.tune

    def trial_of(self, arm: str, rate: float) -> TrainSettings:
        """The settings of a trial: those of the arm's tuning, with what the search says in their place."""
        assert self.search is not None
        own = filled(TrainSettings, self.search.tune)
        return TrainSettings.model_validate({**self.tune_of(arm, rate).model_dump(), **own})

    def rates_of(self, arm: str) -> Rates:
        """Which rates are tried for an arm."""
        assert self.search is not None
        own = self.arms[arm].search
        return self.search.learning_rate if own is None else own.learning_rate

    def recover_of(self, arm: str, rate: float | None = None) -> TrainSettings:
        """The settings of an arm's recovery: those of its tuning, with what ``recover`` says in their place."""
        own = filled(TrainSettings, {**self.recover, **(self.arms[arm].recover or {})})
        return TrainSettings.model_validate({**self.tune_of(arm, rate).model_dump(), **own})

    def recovers(self, arm: str) -> bool:
        """Whether an arm is tuned again after it was pruned."""
        return bool(self.arms[arm].prune) and "recover" in self.stages

    def units(self) -> list[tuple[str, int]]:
        """Every (arm, seed), seed by seed, so that a first whole comparison is there early."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def tuner_of(self, arm: str) -> TunerSpec:
        """The tuner of an arm: its own, or the recipe's."""
        return self.arms[arm].tuner or self.tuner

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in the file, defaults filled in."""
        later = ("forgetting", "judge", "lm_eval", "search", "launch")  # of runs without them nothing is said
        data = {k: v for k, v in self.model_dump(mode="json").items() if v is not None or k not in later}
        if "heal" not in self.stages:
            del data["heal"]
        if self.search is not None:
            data["search"]["learning_rate"] = self.search.learning_rate.to_plain()
        for name, arm in self.arms.items():
            data["arms"][name] = arm_dict(arm)
        return data


def arm_dict(arm: Arm) -> dict[str, Any]:
    """An arm as it stands in the file: the method's settings beside ``method``."""
    data = arm.model_dump(mode="json", exclude={"settings"}, exclude_none=True)
    if not arm.prune:
        del data["prune"]
    if arm.search is not None:
        data["search"] = {"learning_rate": arm.search.learning_rate.to_plain()}
    return {**data, **arm.settings}


def facts_today(facts: dict[str, Any]) -> dict[str, Any]:
    """What a run stored of a unit, with its settings under the names of today."""
    tuner, arm = facts.get("tuner") or {}, facts.get("arm") or {}
    prune = [method_today(each.get("method"), each, quiet=True) for each in arm.get("prune", ())]
    arm = method_today(arm.get("method"), arm, quiet=True) | ({"prune": prune} if prune else {})
    found = {**facts, "arm": arm, "tuner": tuner_today(tuner.get("name"), tuner, quiet=True)}
    return found | ({"task": task_today(facts["task"], quiet=True)} if isinstance(facts.get("task"), dict) else {})


def recipe_from(data: Any, where: str = "recipe") -> Recipe:
    """Check plain data and return the recipe.

    Raises:
        FfnkitError: one line that names the wrong fields.
    """
    if not isinstance(data, dict):
        found = f"holds a {type(data).__name__}, not fields"
        raise FfnkitError(where, found, "Write `name:`, `model:`, `task:`, `arms:`")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise explain(error, data, where) from None
