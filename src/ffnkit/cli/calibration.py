"""The calibration data of ``ffnkit compress`` and ``calibrate``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ffnkit.cli.budgets import Budget
from ffnkit.cli.data_options import CalibrationData, check_there
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import phase


@dataclass(frozen=True)
class Calibration(CalibrationData):
    """The data of a method that measures activations: a task's training rows, or texts and text of many kinds.

    Attributes:
        text: files, each with its share or not. mix: the share of the tokens that is ffnkit's text of many kinds,
            beside these; None for the usual one. Where neither task nor text is given, all of them are.
        seed: of the draw. statistics: a file of a pass over data, in the place of data.
    """

    seed: int = 0
    statistics: Path | None = None

    @property
    def given(self) -> bool:
        """Whether data are named."""
        return self.task is not None or bool(self.text) or self.statistics is not None

    @property
    def named(self) -> str:
        """The option that names the data."""
        return "--statistics" if self.statistics is not None else "--task" if self.task is not None else "--text"

    def check(self, method: Any | None, budget: Budget | None = None, *, read: bool = False) -> None:
        """Raises FfnkitError where data are missing, given twice, or of no use to the method.

        Args:
            read: whether healing or what is measured around the method reads them too.
        """
        self.check_data()
        used = (budget is not None and budget.measures) or (read and self.statistics is None)
        needed = getattr(method, "needs_data", False)
        if self.given and not needed and not used and not _scored(method):
            name = getattr(method, "name", "the saved plan")
            raise FfnkitError(self.named, f"{name} uses no data", "Leave it out")
        if self.statistics is not None and method is not None:
            from ffnkit.methods.common import check_statistics

            check_statistics(method)

    def check_data(self) -> None:
        """Raises FfnkitError where options contradict each other, or name what is not there."""
        text = (self.text or [""])[0]
        beside = {"--task": self.task, "--text": text, "--mix": self.mix, "--text-column": self.text_column}
        beside |= {"--calibration-tokens": self.tokens}
        if self.statistics is not None:
            if other := next((name for name, value in beside.items() if value not in (None, "")), None):
                found = f"{other} is given too, and the statistics are of the data that they were made from"
                raise FfnkitError(f"--statistics {self.statistics}", found, "Give one of the two")
            do = "Make it with ffnkit calibrate MODEL --text FILE --out FILE"
            check_there(f"--statistics {self.statistics}", self.statistics, do)
        if self.task is not None and text:
            raise FfnkitError(f"--text {text}", f"--task {self.task} is given too", "Give one of the two")
        for option, value in (("--mix", self.mix), ("--text-column", self.text_column)):
            if value is not None and not text:
                word = f"{value:g}" if isinstance(value, float) else value
                do = "Add --text FILE, or leave it out"
                raise FfnkitError(f"{option} {word}", f"there is no --text to {HOW[option]}", do)
        for file in self.texts:
            check_there(f"--text {file}", Path(file).expanduser(), "Name a text file")
        if self.task is not None:
            from ffnkit import tasks

            tasks.get(self.task)

    @cached_property
    def texts(self) -> dict[str, float]:
        """The files and their shares of the tokens beside the text of many kinds."""
        if not self.text:
            return {}
        from ffnkit.tune.calibration_text import shares

        return dict(shares(self.text))

    def check_model(self, model: Any, method: Any) -> None:
        """Raises FfnkitError where a method needs data, no task is named, and the model does not read text."""
        if getattr(method, "needs_data", False) and self.statistics is None:
            self.check_reads(model, f"--method {method.name}: it measures activations")

    def check_reads(self, model: Any, asked: str) -> None:
        """Raises FfnkitError where no task is named and the model does not read text."""
        if self.task is None and model.main_input_name != "input_ids":
            found = f"{type(model).__name__} does not read text"
            if self.text:
                raise FfnkitError(f"--text {self.text[0]}", found, "Give --task NAME in its place")
            asked, _, what = asked.partition(": ")
            raise FfnkitError(asked, f"{what}, no data are given, and {found}", "Add --task NAME")

    def scored(self, method: Any, source: str) -> Any:
        """The method with its ``score``, where it names a metric of the task, on rows held out of train."""
        if not _scored(method):
            return method
        from ffnkit.tune import with_score

        if self.chosen is None:
            return with_score(method, None, None, None)
        return with_score(method, self.chosen, self.tokenizer_of(source), self.splits.dev)

    @cached_property
    def chosen(self) -> Any:
        """The task; None where none is named."""
        from ffnkit import tasks

        return tasks.get(self.task) if self.task is not None else None

    def tokenizer_of(self, source: str) -> Any:
        """The tokenizer of the task, or of text. Raises FfnkitError where there is none."""
        from ffnkit.tasks.models import load_tokenizer

        return (self.chosen.load_tokenizer if self.chosen else load_tokenizer)(self.tokenizer or source)

    @property
    def settings(self) -> Any:
        """The same as settings of Python and recipes."""
        from ffnkit.tune import CalibrationSettings

        given = {"tokens": self.tokens, "text": self.texts, "mix": self.mix, "text_column": self.text_column}
        return CalibrationSettings.model_validate(
            {key: value for key, value in given.items() if value not in (None, {})}
        )

    def batches(self, model: Any, source: str, seed: int | None = None) -> Any:
        """Padded batches for the model, drawn with ``seed`` or its own; or the statistics in their place."""
        from ffnkit.tune import calibration_batches

        if self.statistics is not None:
            from ffnkit.calibration.stored import StatisticsFile

            return StatisticsFile.load(self.statistics, model)
        return self._drawn(calibration_batches, model, source, seed)

    def deciding(self, model: Any, source: str) -> tuple[list[Any], list[Any]]:
        """Batches to fit to, and batches of other text to decide on."""
        from ffnkit.tune import deciding_batches

        found: tuple[list[Any], list[Any]] = self._drawn(deciding_batches, model, source, None)
        return found

    def _drawn(self, draw: Any, model: Any, source: str, seed: int | None) -> Any:
        seed = self.seed if seed is None else seed
        rows = self.splits.train if self.chosen else None
        with phase("reading calibration data"):
            return draw(model, self.tokenizer_of(source), self.settings, task=self.chosen, rows=rows, seed=seed)

    @cached_property
    def splits(self) -> Any:
        """The task's rows, split once: what scores a search is out of what calibrates, whatever the seed."""
        return self.chosen.splits(self.data_dir, seed=self.seed)


HOW = {"--mix": "mix with", "--text-column": "read it from"}


def _scored(method: Any) -> bool:
    """Whether a metric of a task, by its name, chooses something in the method."""
    return isinstance(getattr(method, "score", None), str) or any(map(_scored, getattr(method, "methods", ())))
