"""The calibration data of ``ffnkit compress``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ffnkit.cli.budgets import Budget
from ffnkit.errors import FfnkitError


@dataclass(frozen=True)
class Calibration:
    """The data of a method that measures activations: a task's training rows, or a file of text and text of many kinds.

    Attributes:
        mix: the share of the tokens that is ffnkit's text of many kinds, beside ``text``; None for the usual one. Where
            neither task nor text is given, all of them are.
    """

    task: str | None = None
    data_dir: Path | None = None
    text: Path | None = None
    mix: float | None = None
    tokens: int = 6400
    tokenizer: str | None = None
    seed: int = 0

    @property
    def given(self) -> bool:
        """Whether data are named."""
        return self.task is not None or self.text is not None

    def check(self, method: Any | None, budget: Budget | None = None) -> None:
        """Raises FfnkitError where data are missing, given twice, or of no use to the method."""
        if self.task is not None and self.text is not None:
            raise FfnkitError(f"--text {self.text}", f"--task {self.task} is given too", "Give one of the two")
        if self.mix is not None and self.text is None:
            raise FfnkitError(
                f"--mix {self.mix:g}", "there is no --text to mix with", "Add --text FILE, or leave it out"
            )
        needed, used = getattr(method, "needs_data", False), budget is not None and budget.measures
        if self.given and not needed and not used and not _scored(method):
            name = getattr(method, "name", "the saved plan")
            raise FfnkitError(f"--{'task' if self.task else 'text'}", f"{name} uses no data", "Leave it out")
        if self.text is not None and not self.text.is_file():
            raise FfnkitError(f"--text {self.text}", "there is no such file", "Name a text file")
        if self.task is not None:
            from ffnkit import tasks

            tasks.get(self.task)

    def check_model(self, model: Any, method: Any) -> None:
        """Raises FfnkitError where a method needs data, none are named, and the model does not read text."""
        if getattr(method, "needs_data", False) and not self.given and model.main_input_name != "input_ids":
            found = f"it measures activations, no data are given, and {type(model).__name__} does not read text"
            raise FfnkitError(f"--method {method.name}", found, "Add --task NAME")

    def scored(self, method: Any, source: str) -> Any:
        """The method with its ``score``, where it names a metric of the task, on rows held out of train."""
        if not _scored(method):
            return method
        from ffnkit.tune import with_score

        if self.chosen is None:
            return with_score(method, None, None, None)
        return with_score(method, self.chosen, self.tokenizer_of(source), self.splits.dev)

    @property
    def settings(self) -> Any:
        """Which data, in the words of recipes."""
        from ffnkit.tune import CalibrationSettings

        given = {"tokens": self.tokens, "text": str(self.text) if self.text else None, "mix": self.mix}
        return CalibrationSettings.model_validate({k: v for k, v in given.items() if v is not None})

    @cached_property
    def chosen(self) -> Any:
        """The task; None where none is named."""
        from ffnkit import tasks

        return tasks.get(self.task) if self.task is not None else None

    def tokenizer_of(self, source: str) -> Any:
        """The tokenizer of the task, or of text. Raises FfnkitError where there is none."""
        from ffnkit.tasks.models import load_tokenizer

        return (self.chosen.load_tokenizer if self.chosen else load_tokenizer)(self.tokenizer or source)

    def batches(self, model: Any, source: str) -> list[dict[str, Any]]:
        """Padded batches for the model."""
        from ffnkit.tune import calibration_batches

        rows = self.splits.train if self.chosen else None
        tokenizer = self.tokenizer_of(source)
        return calibration_batches(model, tokenizer, self.settings, task=self.chosen, rows=rows, seed=self.seed)

    @cached_property
    def splits(self) -> Any:
        """The task's rows, split once: what scores a search is out of what calibrates, whatever the seed."""
        return self.chosen.splits(self.data_dir, seed=self.seed)


def _scored(method: Any) -> bool:
    """Whether a metric of a task, by its name, chooses something in the method."""
    return isinstance(getattr(method, "score", None), str) or any(map(_scored, getattr(method, "methods", ())))
