"""The work behind ``ffnkit analyze --energy``: where the energy of a model's gradients lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnkit.cli import console
from ffnkit.cli.analyze_job import Texts, hand_over
from ffnkit.errors import FfnkitError
from ffnkit.settings.calibration import ROW_LENGTH


@dataclass(frozen=True)
class EnergyJob:
    """One run: batches for bases and choices, fresh ones to measure on, and more for steps of training."""

    model: str
    texts: Texts
    targets: str
    layers: str
    shares: str
    steps: str
    batches: int
    fresh: int
    batch_size: int
    learning_rate: float
    reach: float
    memory: int
    device: Any

    def run(self, out: Path | None, as_json: bool) -> None:
        """Measure, print the table and the advice, write energy.json and the pictures."""
        from ffnkit.analysis.energy import gradient_energy

        shares = _numbers("--shares", self.shares, float)
        steps = _numbers("--steps", self.steps, int)
        console.quieten()
        models, tokenizer = self.texts.open([self.model])
        model = models[0].to(self.device)
        drawn = self._drawn(model, tokenizer, max(steps))
        with console.progress("measuring") as step:
            found = gradient_energy(
                model,
                drawn[: self.batches],
                drawn[self.batches : self.batches + self.fresh],
                targets=self.targets,
                layers=self.layers,
                shares=shares,
                reach=self.reach,
                steps=steps,
                training=drawn[: self.batches] + drawn[self.batches + self.fresh :],
                learning_rate=self.learning_rate,
                memory=self.memory,
                seed=self.texts.seed,
                progress=step,
            )
        report = {"name": self.model, **console.plain(found.to_dict())}
        pictures = dict.fromkeys(("gradients.png", "gradients.svg"), found.plot_gradients)
        hand_over("energy", found, report, out, as_json, pictures=pictures)

    def _drawn(self, model: Any, tokenizer: Any, steps: int) -> list[Any]:
        """Batches with labels, no row twice: of the task's train split, or of all the text."""
        from ffnkit import tasks
        from ffnkit.tune import text_examples
        from ffnkit.tune.calibration import first_batches

        length = self.texts.max_length or ROW_LENGTH  # as in tuning
        wanted = self.batches + self.fresh + max(0, steps - self.batches)
        if self.texts.task is not None:
            task = tasks.get(self.texts.task)
            rows = task.splits(
                self.texts.data_dir, seed=self.texts.seed, train_limit=wanted * self.batch_size, report_limit=1
            ).train
            examples = task.encode(rows, tokenizer, max_length=length, model=model)
            collate = task.collator(tokenizer, model)
        else:
            examples, collate = text_examples(self.texts.read(tokenizer), tokenizer, model, length)
        drawn = first_batches(examples, collate, self.batch_size, wanted, seed=self.texts.seed)
        if len(drawn) < self.batches + self.fresh:
            found = f"the data make {len(drawn)} batches of {self.batch_size}"
            do = "Lower --batches, --fresh or --batch-size"
            raise FfnkitError(f"{self.batches} batches and {self.fresh} fresh ones", found, do)
        return drawn


def _numbers(option: str, words: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(word) for word in words.split(",")]
    except ValueError:
        example = "0.001,0.01,0.1" if kind is float else "0,50,100"
        raise FfnkitError(f"{option} {words}", "not numbers parted by commas", f"Give such as {example}") from None
