"""Which task ``ffnkit tune`` and ``eval`` work on, what is measured, and the work behind ``eval``."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffnkit.cli import console, describe
from ffnkit.errors import FfnkitError
from ffnkit.io.placing import moved


def load_tokenizer(task: Any, model: str, other: str | None) -> Any:
    """The tokenizer of ``model``, or the one that --tokenizer names. A model that does not open is said first."""
    from ffnkit.io.architectures import read_config

    read_config(model)
    return task.load_tokenizer(other or model)


def tell(task: Any, splits: Any) -> None:
    """Say what the splits are made of, on stderr."""
    console.say(f"{task.name}: {len(splits.train)} train, {len(splits.dev)} dev, {len(splits.report)} report rows")
    for note in splits.notes:
        console.say(f"  {note}")


def generation_built(settings: dict[str, Any]) -> Any:
    """How text is decoded; FfnkitError for settings that there are not."""
    from ffnkit.tasks import GenerationSettings

    return describe.build(GenerationSettings, settings, "the decoding", "--generation-set")


@dataclass(frozen=True)
class Measured:
    """Evaluations of the report split and of each further one ("mismatched", "test")."""

    report: Any
    extra: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        task: Any,
        splits: Any,
        max_length: int,
        batch_size: int = 64,
        generation: Any = None,
    ) -> Measured:
        """Measure a model."""
        from ffnkit import tune

        settings = {"batch_size": batch_size, "max_length": max_length, "generation": generation}
        extra = tune.assess_all(model, tokenizer, task, splits, **settings)
        return cls(extra.pop("report"), extra)

    def to_dict(self) -> dict[str, Any]:
        """``metrics``, those of further splits under ``extra``, and ``speed`` where text was generated."""
        extra = {name: each.to_dict() for name, each in self.extra.items()}
        speed = {"speed": self.report.speed} if self.report.speed else {}
        return {"metrics": self.report.to_dict(), **({"extra": extra} if extra else {}), **speed}

    def write(self, folder: Path, task: Any) -> None:
        """What a generation task wrote, a file a split."""
        from ffnkit import tune

        for name, each in {"": self.report, **self.extra}.items():
            if each.predictions:
                tune.write_predictions(folder / f"predictions{name and f'-{name}'}.jsonl", each, task)


@dataclass(frozen=True)
class EvalJob:
    """One run of ``ffnkit eval``."""

    model: str
    task: Any
    data_dir: Path | None
    split: str
    batch_size: int
    max_length: int
    limit: int | None
    seed: int
    device: Any
    tokenizer: str | None = None
    generation: Any = None
    predictions: Path | None = None

    def run(self) -> dict[str, Any]:
        """Metrics of a saved model on one split, as ``--json`` prints them."""
        from ffnkit import tune

        tokenizer = load_tokenizer(self.task, self.model, self.tokenizer)
        splits = self.task.splits(self.data_dir, seed=self.seed, dev_limit=self.limit, report_limit=self.limit)
        if self.split == "dev":
            splits = replace(splits, report=splits.dev, extra={})
        console.say(f"{self.task.name}: {len(splits.report)} rows of {splits.source}, split {self.split}")
        for note in splits.notes:
            console.say(f"  {note}")
        model = moved(self.task.load_model(self.model, tokenizer=tokenizer, trained_head=True), self.device)
        start = time.perf_counter()
        found = Measured.of(
            model, tokenizer, self.task, splits, self.max_length, self.batch_size, generation=self.generation
        )
        if self.predictions is not None:
            tune.write_predictions(self.predictions, found.report, self.task)
        return {
            "model": self.model,
            "task": self.task.name,
            "split": self.split,
            "rows": len(splits.report),
            "notes": list(splits.notes),
            **found.to_dict(),
            "main_metric": self.task.main_metric,
            "seconds": time.perf_counter() - start,
        }


def submit(job: EvalJob, out: Path | None) -> dict[str, Any]:
    """Write a model's answers on the test rows of a GLUE task as its server wants them.

    Raises:
        FfnkitError: another task, no folder for the files, rows left out, or no test rows within reach.
    """
    from ffnkit.tasks.classification import glue_server

    glue_server.check(job.task)
    if out is None or out.is_file():
        found = "no folder is named for them" if out is None else f"{out} is a file"
        raise FfnkitError("--split test", found, "Add --predictions FOLDER")
    if job.limit is not None:
        raise FfnkitError(f"--limit {job.limit}", "GLUE's server wants every row", "Leave it out")
    tokenizer = load_tokenizer(job.task, job.model, job.tokenizer)
    model = moved(job.task.load_model(job.model, tokenizer=tokenizer, trained_head=True), job.device)
    sizes = {"batch_size": job.batch_size, "max_length": job.max_length}
    files = glue_server.write_predictions(model, tokenizer, job.task, out, data_dir=job.data_dir, **sizes)
    return {"model": job.model, "task": job.task.name, "split": "test", "folder": str(out), "files": files}
