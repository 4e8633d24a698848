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
    """The data of a method that measures activations: a task's training rows, or a file of text."""

    task: str | None
    data_dir: Path | None
    text: Path | None
    tokens: int
    tokenizer: str | None
    seed: int

    @property
    def given(self) -> bool:
        """Whether there are data."""
        return self.task is not None or self.text is not None

    def check(self, method: Any | None, budget: Budget | None = None) -> None:
        """Raises FfnkitError where data are missing, given twice, or of no use to the method."""
        if self.task is not None and self.text is not None:
            raise FfnkitError(f"--text {self.text}", f"--task {self.task} is given too", "Give one of the two")
        needed, used = getattr(method, "needs_data", False), budget is not None and budget.measures
        if needed and not self.given:
            found = "it measures activations, and no data are given"
            raise FfnkitError(f"--method {method.name}", found, "Add --task NAME or --text FILE")  # type: ignore[union-attr]
        if self.given and not needed and not used and not _scored(method):
            name = getattr(method, "name", "the saved plan")
            raise FfnkitError(f"--{'task' if self.task else 'text'}", f"{name} uses no data", "Leave it out")
        if self.text is not None and not self.text.is_file():
            raise FfnkitError(f"--text {self.text}", "there is no such file", "Name a text file")
        if self.task is not None:
            from ffnkit import tasks

            tasks.get(self.task)

    def scored(self, method: Any, source: str) -> Any:
        """The method with its ``score``, where it names a metric of the task, on rows held out of train."""
        if not _scored(method):
            return method
        from ffnkit import tasks
        from ffnkit.tune import with_score

        task = tasks.get(self.task) if self.task is not None else None
        tokenizer = task.load_tokenizer(self.tokenizer or source) if task is not None else None
        return with_score(method, task, tokenizer, self._splits.dev if task is not None else None)

    def batches(self, model: Any, source: str) -> list[dict[str, Any]]:
        """Padded batches for the model."""
        from ffnkit import tasks
        from ffnkit.tune import CalibrationSettings, calibration_batches

        settings = CalibrationSettings(tokens=self.tokens, text=str(self.text) if self.text else None)
        if self.task is None:
            from ffnkit.tasks.models import load_tokenizer

            return calibration_batches(model, load_tokenizer(self.tokenizer or source), settings, seed=self.seed)
        task = tasks.get(self.task)
        tokenizer = task.load_tokenizer(self.tokenizer or source)
        return calibration_batches(model, tokenizer, settings, task=task, rows=self._splits.train, seed=self.seed)

    @cached_property
    def _splits(self) -> Any:
        """The task's rows, split once: what scores a search is out of what calibrates, whatever the seed."""
        from ffnkit import tasks

        return tasks.get(str(self.task)).splits(self.data_dir, seed=self.seed)


def _scored(method: Any) -> bool:
    """Whether a metric of a task, by its name, chooses something in the method."""
    return isinstance(getattr(method, "score", None), str) or any(map(_scored, getattr(method, "methods", ())))
