"""The work behind ``ffnkit tune`` and ``eval``."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffnkit import files
from ffnkit.cli import console, describe
from ffnkit.cli.history import History, public_name
from ffnkit.errors import FfnkitError

HIDDEN = ("task", "files", "teacher_files")  # parts of the fingerprint that no reader wants


@dataclass(frozen=True)
class Sources:
    """Where texts and labels come from: a task by name, or files with the names of their columns."""

    name: str | None
    data_dir: Path | None
    train: Path | None
    validation: Path | None
    text: tuple[str, ...]
    label: str | None
    metric: str | None

    def task(self) -> Any:
        """The task.

        Raises:
            FfnkitError: neither or both are given, a file or column is missing, no such task.
        """
        from ffnkit import tasks

        files = (self.train, self.validation, self.text or None, self.label, self.metric)
        if self.name is not None:
            if any(value is not None for value in files):
                do = "Give --task, or --train-file with its columns"
                raise FfnkitError(f"--task {self.name}", "files or columns are given too", do)
            return tasks.get(self.name)
        if self.train is None:
            do = f"Choose a --task among {', '.join(tasks.names())}, or give --train-file with its columns"
            raise FfnkitError("the data", "neither --task nor --train-file is given", do)
        if not self.text:
            raise FfnkitError(f"--train-file {self.train}", "no column of text is named", "Add --text-column NAME")
        if self.label is None:
            raise FfnkitError(f"--train-file {self.train}", "no column of labels is named", "Add --label-column NAME")
        return tasks.file_task(self.train, self.validation, text=self.text, label=self.label, metric=self.metric)


@dataclass
class TuneJob:
    """One run of ``ffnkit tune``: settings are checked when it is made, before anything is loaded."""

    model: str
    out: Path
    task: Any
    data_dir: Path | None
    settings: dict[str, Any]
    tuner: str
    tuner_settings: dict[str, Any]
    teacher: str | None
    distil_settings: dict[str, Any]
    seed: int
    limit: int | None
    fold: bool
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        from ffnkit.tune import tuners
        from ffnkit.tune.settings import DistilSettings, TrainSettings

        self.tuner_built = tuners.get({"name": self.tuner, **self.tuner_settings})
        self.train_settings = describe.build(TrainSettings, self.settings, "the training")
        self.distil_built = describe.build(DistilSettings, self.distil_settings, "the distillation")
        if self.distil_settings and self.teacher is None:
            raise FfnkitError("--distil-set", "there is no teacher", "Add --distil-from MODEL")

    @property
    def work(self) -> Path:
        """Where checkpoints live until the result is whole."""
        target = self.out.absolute()
        return target.with_name(f".{target.name}.tuning")

    def run(self) -> dict[str, Any]:
        """Tune, report, save; returns what metrics.json holds."""
        import ffnkit
        from ffnkit import tune

        start = time.perf_counter()
        tokenizer = load_tokenizer(self.task, self.model, self.tokenizer)
        splits = self.task.splits(self.data_dir, seed=self.seed, train_limit=self.limit)
        tell(self.task, splits)
        self.open_work()
        tune.seed_everything(self.seed)  # the new head is drawn at random
        model = self.task.load_model(self.model, tokenizer=tokenizer)
        if self.teacher is not None:
            self.distil(model, tokenizer, splits)
        result = tune.train(
            model,
            tokenizer,
            self.task,
            splits,
            self.train_settings,
            tuner=self.tuner_built,
            seed=self.seed,
            out_dir=self.work / "checkpoints",
            progress=not console.state.quiet,
        )
        metrics = measured(result.model, tokenizer, self.task, splits, self.train_settings.max_length)
        if self.fold:
            ffnkit.fold(result.model)
        report = self.report(result, metrics, splits, time.perf_counter() - start)
        self.save(result.model, tokenizer, report)
        return report

    def distil(self, model: Any, tokenizer: Any, splits: Any) -> None:
        """Match the hidden states of the teacher, layer by layer; the teacher is freed afterwards."""
        from ffnkit import tune

        console.say(f"distilling from {self.teacher}")
        teacher, out = self.task.load_model(self.teacher, tokenizer=tokenizer), self.work / "distil"
        tune.distil(model, teacher, self.batches(splits, tokenizer), self.distil_built, seed=self.seed, out_dir=out)

    def batches(self, splits: Any, tokenizer: Any) -> Any:
        """Padded batches of the training split, in an order that the seed fixes."""
        import torch
        from torch.utils.data import DataLoader
        from transformers import DataCollatorWithPadding

        return DataLoader(
            self.task.encode(splits.train, tokenizer, max_length=self.distil_built.max_length),
            batch_size=self.distil_built.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=DataCollatorWithPadding(tokenizer),
        )

    def open_work(self) -> None:
        """Make the work folder, or take up one that a run with the same settings left."""
        facts = json.loads(json.dumps(self.facts(), default=str))
        marker = self.work / "settings.json"
        if self.work.exists():
            try:
                known = json.loads(marker.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                known = None
            if known == facts:
                console.say("resuming the run that was interrupted")
                return
            console.say("an interrupted run with other settings is discarded")
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        files.write_text(marker, json.dumps(facts, indent=2))

    def facts(self) -> dict[str, Any]:
        """What the tuned weights depend on."""
        return {
            "model": self.model,
            "files": files_of(self.model),
            "teacher_files": files_of(self.teacher) if self.teacher else [],
            "tokenizer": self.tokenizer,
            "task": str(self.task),
            "data_dir": self.data_dir,
            "settings": self.train_settings.model_dump(mode="json"),
            "tuner": {"name": self.tuner, **self.tuner_built.model_dump(mode="json")},
            "teacher": self.teacher,
            "distil": self.distil_built.model_dump(mode="json"),
            "seed": self.seed,
            "limit": self.limit,
        }

    def report(self, result: Any, metrics: dict[str, Any], splits: Any, seconds: float) -> dict[str, Any]:
        """What metrics.json holds."""
        return {
            **{key: value for key, value in self.facts().items() if key not in HIDDEN},
            "task": self.task.name,
            "split": "report",
            "rows": len(splits.report),
            **metrics,
            "main_metric": self.task.main_metric,
            "notes": list(splits.notes),
            "steps": result.steps,
            "best_metric_on_dev": result.best_metric,
            "trainable_parameters": result.trainable_parameters,
            "train_seconds": result.seconds,
            "seconds": seconds,
            "folded": self.fold,
        }

    def save(self, model: Any, tokenizer: Any, report: dict[str, Any]) -> None:
        """Build the whole result and put it in place in one step; then the checkpoints go."""
        import ffnkit

        training = {"tuner": self.tuner, **self.tuner_settings, "seed": self.seed}
        training |= {"distilled from": public_name(self.teacher)} if self.teacher else {}
        training |= {key: value for key, value in self.train_settings.model_dump(mode="json").items()}
        history = History.of(self.model).tuned(training, self.task.name, report["metrics"])
        with files.staging(self.out, keep_others=True) as temporary:
            ffnkit.save(model, temporary, tokenizer=tokenizer, card=history.card(model, "compact"))
            history.write(temporary)
            files.write_text(temporary / "metrics.json", json.dumps(console.plain(report), indent=2) + "\n")
        shutil.rmtree(self.work, ignore_errors=True)


def files_of(model: str) -> list[list[Any]]:
    """Name, size and time of a local model's files, to tell whether it is the same as before."""
    folder = Path(model).expanduser()
    found = [path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors")]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def load_tokenizer(task: Any, model: str, other: str | None) -> Any:
    """The tokenizer of ``model``, or the one that --tokenizer names. A model that does not open is said first."""
    from ffnkit.architectures import read_config

    read_config(model)
    return task.load_tokenizer(other or model)


def tell(task: Any, splits: Any) -> None:
    """Say what the splits are made of, on stderr."""
    console.say(f"{task.name}: {len(splits.train)} train, {len(splits.dev)} dev, {len(splits.report)} report rows")
    for note in splits.notes:
        console.say(f"  {note}")


def measured(
    model: Any, tokenizer: Any, task: Any, splits: Any, max_length: int, batch_size: int = 64
) -> dict[str, Any]:
    """``metrics`` on the report split, and on each further one ("mismatched", "test") under ``extra``."""
    from ffnkit import tune

    def of(rows: Any) -> dict[str, float]:
        return tune.evaluate(model, tokenizer, task, rows, batch_size=batch_size, max_length=max_length)

    extra = {name: of(rows) for name, rows in splits.extra.items()}
    return {"metrics": of(splits.report), **({"extra": extra} if extra else {})}


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

    def run(self) -> dict[str, Any]:
        """Metrics of a saved model on one split, as ``--json`` prints them."""
        tokenizer = load_tokenizer(self.task, self.model, self.tokenizer)
        splits = self.task.splits(self.data_dir, seed=self.seed, dev_limit=self.limit, report_limit=self.limit)
        if self.split == "dev":
            splits = replace(splits, report=splits.dev, extra={})
        model = self.task.load_model(self.model, tokenizer=tokenizer, trained_head=True).to(self.device)
        start = time.perf_counter()
        metrics = measured(model, tokenizer, self.task, splits, self.max_length, self.batch_size)
        return {
            "model": self.model,
            "task": self.task.name,
            "split": self.split,
            "rows": len(splits.report),
            **metrics,
            "main_metric": self.task.main_metric,
            "seconds": time.perf_counter() - start,
        }
