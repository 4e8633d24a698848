"""What ``ffnkit compress`` measures around a compression, and how it mends the model: ``--cost-tokens``, ``--heal``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ffnkit.cli import console, describe
from ffnkit.cli.calibration import Calibration
from ffnkit.cli.data_options import check_there
from ffnkit.cli.history import History
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import EVERY

if TYPE_CHECKING:
    from ffnkit.report.costing import Before
    from ffnkit.tune.healing.heal import Healed
    from ffnkit.tune.healing.settings import HealSettings

PANEL = "After it"
ROWS = 256  # of a task that are measured
SHORT = 64  # of a task whose answers are generated


@dataclass(frozen=True)
class After:
    """What the options say; its fields are the options, in their order."""

    heal: Annotated[
        str | None,
        typer.Option(
            "--heal",
            metavar="TOKENS",
            help="Then learn from the uncompressed model on the same texts: 200k, 1m.",
            rich_help_panel=PANEL,
        ),
    ] = None
    heal_set: Annotated[
        list[str] | None,
        typer.Option("--heal-set", metavar="NAME=VALUE", help="A setting of it; repeatable.", rich_help_panel=PANEL),
    ] = None
    cost_tokens: Annotated[
        int,
        typer.Option(
            "--cost-tokens",
            min=0,
            help="Kept apart to measure what was lost, of each text; 0: not.",
            rich_help_panel=PANEL,
        ),
    ] = 2048
    cost_text: Annotated[
        Path | None,
        typer.Option(
            "--cost-text",
            metavar="FILE",
            help="Text of another kind, in place of ffnkit's own that no fit sees.",
            rich_help_panel=PANEL,
        ),
    ] = None

    @property
    def settings(self) -> HealSettings | None:
        """How the model is healed; None: it is not.

        Raises:
            FfnkitError: a setting that there is not, or of a wrong value; settings without ``--heal``.
        """
        from ffnkit.tune.healing.settings import HealSettings

        given = describe.parse_settings(self.heal_set or [], "--heal-set")
        if self.heal is None:
            if given:
                raise FfnkitError(f"--heal-set {next(iter(given))}", "there is no --heal", "Add --heal 200k")
            return None
        if "tokens" in given:
            raise FfnkitError("--heal-set tokens", f"--heal {self.heal} is given too", "Give one of the two")
        flags = {"tokens": "--heal"}
        built = describe.build(HealSettings, {"tokens": self.heal, **given}, "healing", "--heal-set", flags)
        return cast("HealSettings", built)

    @property
    def reads(self) -> bool:
        """Whether data are read: to heal on, or to measure what it costs."""
        return self.heal is not None or self.cost_tokens > 0

    def check(self, dry_run: bool, method: Any = None, calibration: Calibration | None = None) -> None:
        """Raises FfnkitError where options do not go together, or with the method, or a file cannot be read."""
        wanted = self.settings
        if wanted is not None:
            wanted.check_beside(method)
        if self.cost_text is not None:
            check_there(f"--cost-text {self.cost_text}", self.cost_text, "Name a text file")
        if self.cost_text is not None and not self.cost_tokens:
            raise FfnkitError(f"--cost-text {self.cost_text}", "--cost-tokens is 0", "Leave one of the two out")
        if self.cost_text is not None and calibration is not None:
            self._check_text(self.cost_text, calibration)
        if wanted is not None and dry_run:
            raise FfnkitError(f"--heal {self.heal}", "--dry-run applies nothing", "Leave one of the two out")

    @staticmethod
    def _check_text(file: Path, calibration: Calibration) -> None:
        from ffnkit.tasks.language_modelling.sets import read_texts
        from ffnkit.tune.calibration_text import has_dialogues

        if any(file.samefile(each) for each in calibration.texts if Path(each).exists()):
            found = "--text names it too: a part of it is fitted, and the rest is reported anyway"
            raise FfnkitError(f"--cost-text {file}", found, "Leave it out, or name a text of another kind")
        column = calibration.settings.text_column
        if not has_dialogues(str(file), column):
            read_texts(file, column)

    def before(self, model: Any, source: str, calibration: Calibration) -> Before | None:
        """What the uncompressed model says, of text that no fit sees; None, and a line why, where it says nothing."""
        if not self.cost_tokens:
            return None
        from ffnkit.report.costing import Before
        from ffnkit.tune.answers import kind_of

        try:
            tokenizer = calibration.tokenizer_of(source)
            places, names = self._places(model, tokenizer, calibration)
            metric, rows = None, 0
            first = next((batches[0] for batches in places.values()), None)
            if calibration.task is not None and first is not None:
                metric, rows = _metric(model, kind_of(model, first), tokenizer, calibration)
                names |= {"task": f"rows of {calibration.task}"}
            if not places:
                return None
            with _timed("measuring"):
                return Before(model, places, names=names, metric=metric, rows=rows)
        except FfnkitError as error:
            console.say(f"what it costs is not measured: {error.asked}: {error.found}")
            return None

    def _places(self, model: Any, tokenizer: Any, calibration: Calibration) -> tuple[dict[str, Any], dict[str, str]]:
        from ffnkit.tune import calibration_batches
        from ffnkit.tune.apart import kept_apart

        settings, names = calibration.settings, {}
        places: dict[str, Any] = {}
        if calibration.task is not None:
            few = settings.model_copy(update={"tokens": self.cost_tokens})
            task, rows = calibration.chosen, calibration.splits.report
            places["in"] = calibration_batches(model, tokenizer, few, task=task, rows=rows, seed=calibration.seed)
            names["in"] = f"rows of {calibration.task}"
        if model.main_input_name == "input_ids":
            apart = kept_apart(model, tokenizer, settings, "report", self.cost_tokens, other=self.cost_text)
            places = apart | places
        if own := ", ".join(Path(file).name for file in calibration.texts):
            names["in"] = f"{own}, kept apart"
            if "in" not in places:
                console.say(f"{own} is too short, or too much alike, to keep rows of it apart")
        if self.cost_text is not None:
            names["out"] = self.cost_text.name
        return {name: places[name] for name in ("in", "out") if name in places}, names

    def carry_out(
        self, model: Any, plan: Any, source: str, dtype: str, calibration: Calibration, report: dict[str, Any]
    ) -> History:
        """Apply the plan, heal, measure around both. The report takes the figures; the model's history comes back."""
        import ffnkit

        inventory, said = ffnkit.inspect(model), self.before(model, source, calibration)
        ffnkit.apply(model, plan)
        history = History.of(source).compressed(plan, inventory, ffnkit.inspect(model))
        cost = said.compare(model) if said is not None else None
        if (settings := self.settings) is not None:
            result = self._healed(model, settings, source, dtype, calibration)
            report["healing"] = result.to_dict()
            given = {name: value for name, value in settings.model_dump().items() if value is not None}
            chosen = {"learning_rate": result.learning_rate, "steps": result.steps}
            told = {**given, **chosen, "kept after tokens": result.kept_at}
            history = replace(history, healing=told)
            cost = said.compare(model, "healed") if said is not None else None
        if cost is not None:
            report["cost"] = cost.to_dict()
            history = replace(history, cost=report["cost"])
        return history

    def _healed(self, model: Any, settings: HealSettings, source: str, dtype: str, calibration: Calibration) -> Healed:
        """Heal the model, in place; what was done comes back. The uncompressed one is opened for it."""
        from ffnkit.io.architectures import load_any
        from ffnkit.tune.healing.data import healing_data
        from ffnkit.tune.healing.heal import heal, memory_of

        tokenizer, seed, more = calibration.tokenizer_of(source), calibration.seed, {}
        if calibration.task is not None:
            more = {"task": calibration.chosen, "rows": calibration.splits.train, "dev": calibration.splits.dev}
        parts, held = healing_data(model, tokenizer, settings, calibration.settings, seed=seed, **more)
        original = load_any(source, dtype=dtype).to(next(model.parameters()).device)
        memory = memory_of(model, original, settings) / 1e9
        console.say(f"healing on {settings.tokens:,} tokens; about {memory:.1f} GB beside the compressed model")
        with console.progress("healing") as step:
            result = heal(model, original, parts, settings, held=held, seed=seed, progress=step)
        console.say(str(result))
        return result


def show_cost(data: dict[str, Any]) -> None:
    """The table on stdout."""
    from ffnkit.report.cost import Cost

    columns, rows = Cost.from_dict(data).table()
    console.table("", columns, rows, right=range(2, len(columns)))


def _metric(
    model: Any, kind: str, tokenizer: Any, calibration: Calibration
) -> tuple[Callable[[Any], dict[str, float]] | None, int]:
    """What gives the task's metrics of a model, and on how many rows; None where the model has not the task's head."""
    from ffnkit import tune
    from ffnkit.tasks.models import other_labels

    task = calibration.chosen
    labelled = task.kind in ("classification", "regression", "image-classification")
    wanted = {"regression": "numbers"}.get(task.kind, "classes") if labelled else "words"
    if kind != wanted:
        return None, 0
    if why := other_labels(task, model.config):  # 1,000 classes of pictures and a task of ten
        console.say(f"the metrics of {calibration.task} are not measured: {why}")
        return None, 0
    rows = calibration.splits.report
    count = min(len(rows), ROWS if labelled or task.kind == "language-modelling" else SHORT)
    rows = rows.select(_drawn(len(rows), count))

    def metric(model: Any) -> dict[str, float]:
        found = tune.evaluate(model, tokenizer, task, rows, max_length=calibration.settings.row_length)
        return {name: value for name, value in found.items() if name != "loss"}

    return metric, count


def _drawn(rows: int, count: int) -> list[int]:
    """So many of the rows, spread over all of them: files may be sorted by class. The same ones for every seed."""
    import numpy as np

    return sorted(np.random.default_rng(0).permutation(rows)[:count].tolist())


class _timed:
    """Says that something is going on, where it takes more than a moment."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        if (took := time.monotonic() - self.start) > EVERY:
            console.say(f"{self.what} took {took:.0f} s")
