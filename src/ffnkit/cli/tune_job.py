"""The work behind ``ffnkit tune``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ffnkit.cli import console, describe, forms, options
from ffnkit.cli.eval_job import Measured, generation_built, load_tokenizer, tell
from ffnkit.cli.history import History, public_name
from ffnkit.errors import FfnkitError
from ffnkit.io import processes, workspace
from ffnkit.io.apart import is_apart
from ffnkit.io.files import read_json, write_text
from ffnkit.io.folders import staging

SETTINGS, LOGS = "settings.json", "logs"
HIDDEN = ("task", "files", "teacher_files", "distil_files")  # parts of the fingerprint that no reader wants


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
    generation_settings: dict[str, Any] = field(default_factory=dict)
    restart: bool = False
    form: Literal["auto", "compact", "standard", "apart"] = "auto"
    flags: dict[str, str] = field(default_factory=dict)  # the options that gave settings of the training
    last: str = field(default="", init=False)  # how the result is used elsewhere

    def __post_init__(self) -> None:
        from ffnkit.tune import tracking, tuners
        from ffnkit.tune.settings import DistilSettings, TrainSettings

        kind, own = tuners.kind(self.tuner), ("routers", "tied", "quantize")
        flags = {name: f"--{name}" for name in own if name in self.tuner_settings}
        self.tuner_built = describe.build(kind, self.tuner_settings, f"tuner {self.tuner}", "--tuner-set", flags)
        self.train_settings = describe.build(TrainSettings, self.settings, "the training", "--set", self.flags)
        tracking.trackers(self.train_settings.report_to)
        self.generation = generation_built(self.generation_settings)
        if self.form == "apart" and self.tuner_built.method is None:
            asked, what = "--form apart", f"the tuner {self.tuner} puts no updates beside weights"
            raise FfnkitError(asked, what, "Take --tuner dsee or sparsegrad, or another --form")
        self.distil_built = describe.build(DistilSettings, self.distil_settings, "the distillation", "--distil-set")
        if self.distil_settings and self.teacher is None:
            asked = "--distil-text" if set(self.distil_settings) == {"text"} else "--distil-set"
            raise FfnkitError(asked, "there is no teacher", "Add --distil-from MODEL")
        if self.distil_built.teacher is not None:
            raise FfnkitError("--distil-set teacher", "it is a setting of recipes", "Use --distil-from MODEL")
        files_of_text(self.distil_built.text)

    @cached_property
    def works(self) -> Path:
        """Where checkpoints live until the result is whole: a folder for each set of settings."""
        target = Path(os.path.realpath(self.out))
        return target.with_name(f".{target.name}.tuning")

    @cached_property
    def work(self) -> Path:
        """The folder of this run in :attr:`works`."""
        return self.works / digest(self.plain_facts)

    @cached_property
    def plain_facts(self) -> dict[str, Any]:
        """:meth:`facts` as they lie in a file."""
        return dict(json.loads(json.dumps(self.facts(), default=str)))

    def run(self) -> dict[str, Any]:
        """Tune, report, save; returns what metrics.json holds, {} in all processes of one training but the first."""
        if processes.is_first():
            self.check_others()
        if self.teacher is not None:
            from ffnkit.io.architectures import read_config

            read_config(self.teacher)  # a name that leads nowhere is told before the data are read
        if not processes.is_first():
            with describe.typed(self.flags):
                return self._run()
        with workspace.made(self.work):
            asked = f"--out {self.out}"
            held = workspace.held(self.work, asked, "the same command is at work there")
            with held, self.kept_checkpoints(), describe.typed(self.flags):
                return self._run()

    def _run(self) -> dict[str, Any]:
        import ffnkit
        from ffnkit import tune
        from ffnkit.checkpoint.adapters import is_adapted
        from ffnkit.io.architectures import widened
        from ffnkit.surgery.apply import SAVING
        from ffnkit.surgery.compressed import mark

        start = time.perf_counter()
        tokenizer = load_tokenizer(self.task, self.model, self.tokenizer)
        splits = self.task.splits(self.data_dir, seed=self.seed, train_limit=self.limit)
        tell(self.task, splits)
        if (told := widened(self.model)) is not None:
            console.say(told)
        if processes.is_first():
            self.open_work()
        tune.seed_everything(self.seed)  # the new head is drawn at random
        model = self.task.load_model(self.model, tokenizer=tokenizer)
        mark(model, History.of(self.model).narrowed)  # one width for all does not show in the model
        adapted = is_adapted(model)
        if adapted and self.tuner_built.method is None:
            asked, what = f"--tuner {self.tuner}", f"{self.model} holds updates apart from its weights"
            raise FfnkitError(asked, what, "Take the tuner that they are of, or merge them first: ffnkit export")
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
            generation=self.generation,
            go_on=adapted,
            merge=self.form != "apart",
            run=self.tracked,
        )
        processes.leave()
        if not processes.is_first():
            return {}
        found = Measured.of(
            result.model, tokenizer, self.task, splits, self.train_settings.max_length, generation=self.generation
        )
        if self.fold and self.form != "apart" and not self.tuner_built.stays:
            ffnkit.fold(result.model, keep=SAVING)
        report = self.report(result, found.to_dict(), splits, time.perf_counter() - start)
        self.tell(result.model, report)
        self.save(result.model, tokenizer, report, found)
        return report

    @property
    def tracked(self) -> Any:
        """The run as trackers know it."""
        from ffnkit.tune.tracking import Run

        return Run(f"{self.out.resolve().name}/seed-{self.seed}", self.work / LOGS)

    def tell(self, model: Any, report: dict[str, Any]) -> None:
        """Log settings, sizes, FLOPs and the report's figures with the trackers that are named."""
        from ffnkit.report import measure
        from ffnkit.tune import tracking

        if not tracking.trackers(self.train_settings.report_to):
            return
        history = History.of(self.model)
        figures = tracking.numbers({"report": {**report["metrics"], **report.get("extra", {})}})
        figures |= tracking.numbers({"size": measure.figures(model)})
        chosen = {"model": self.model, "task": self.task.name, "tuner": self.tuner, "seed": self.seed}
        chosen |= {"tuner settings": self.tuner_settings, "training": self.train_settings.model_dump(mode="json")}
        chosen |= {"method": history.method or "none", "method settings": history.settings}
        plan = "\n".join(f"{name}: {before} -> {after} neurons" for name, before, after in history.layers)
        record = tracking.Record(chosen, figures, {"plan": plan} if plan else {})
        tracking.tell(self.tracked, self.train_settings.report_to, record)

    def distil(self, model: Any, tokenizer: Any, splits: Any) -> None:
        """Match the teacher's hidden states, its answers, or both; the teacher is freed afterwards."""
        from ffnkit import tune

        settings = self.distil_built
        console.say(f"distilling from {self.teacher} ({settings.objective})")
        answers = settings.objective != "layers"  # those of a head drawn at random mean nothing
        teacher = self.task.load_model(self.teacher, tokenizer=tokenizer, trained_head=answers)
        data, collate = tune.distil_examples(model, tokenizer, settings, self.task, splits.train)
        place = options.pick_device(self.train_settings.device)
        result = tune.distil(
            model.to(place),
            teacher.to(place),
            data,
            settings,
            seed=self.seed,
            collate=collate,
            out_dir=self.work / "distil" if processes.is_first() else None,
            progress=not console.state.quiet,
        )
        if result.head:
            console.say("  the new head starts as the teacher's")
        parts = {name: (values[0], values[-1]) for name, values in result.parts.items()}
        told = "".join(f", {name} {first:.4g} -> {last:.4g}" for name, (first, last) in parts.items())
        console.say(f"  {result.steps} steps in {result.seconds:.0f} s{told}")

    def check_others(self) -> None:
        """Raises FfnkitError where a run with other settings was interrupted, whose checkpoints are not to be lost."""
        if self.restart or not self.works.is_dir():
            return
        for other in sorted(self.works.iterdir()):
            if other == self.work or not has_files(other):
                continue
            facts = read_json(other / SETTINGS)
            differing = [name for name, own in self.plain_facts.items() if facts and facts.get(name) != own]
            what = f"a run that differs in {', '.join(differing) or 'its settings'} was interrupted there"
            do = "Run that command again to go on with it, give another --out, or add --restart to give it up"
            raise FfnkitError(f"--out {self.out}", what, do)

    @contextmanager
    def kept_checkpoints(self) -> Iterator[None]:
        """What a run that is stopped leaves: checkpoints to go on from, and nothing where there are none yet."""
        try:
            yield
        except BaseException:
            if not has_files(self.work):
                shutil.rmtree(self.work, ignore_errors=True)
            raise

    def open_work(self) -> None:
        """Take up what a run with the same settings left; with ``restart``, begin anew."""
        if self.parts():
            if self.restart:
                for part in self.parts():
                    shutil.rmtree(part)
            else:
                console.say("resuming the run that was interrupted")
        if self.restart or not self.parts():
            shutil.rmtree(self.work / LOGS, ignore_errors=True)
        write_text(self.work / SETTINGS, json.dumps(self.plain_facts, indent=2))

    def parts(self) -> list[Path]:
        """What earlier runs with these settings left: folders of checkpoints, and of a distillation."""
        return [path for path in self.work.iterdir() if path.is_dir() and path.name != LOGS]

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
            "generation": self.generation.model_dump(mode="json"),
            "tuner": {"name": self.tuner, **self.tuner_built.model_dump(mode="json")},
            "teacher": self.teacher,
            "distil": self.distil_built.model_dump(mode="json"),
            "distil_files": files_of_text(self.distil_built.text),
            "seed": self.seed,
            "limit": self.limit,
            **({"processes": processes.count()} if processes.count() > 1 else {}),
        }

    def report(self, result: Any, metrics: dict[str, Any], splits: Any, seconds: float) -> dict[str, Any]:
        """What metrics.json holds."""
        from ffnkit.report.sparsity import sparsity

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
            "updated_parameters": result.updated_parameters,
            "trainable_share": result.trainable_share,
            "samples_per_second": result.samples_per_second,
            "steps_per_second": result.steps_per_second,
            "peak_memory_bytes": result.peak_tensors,
            "train_seconds": result.seconds,
            "seconds": seconds,
            "folded": self.fold and self.form != "apart",
            **({"zeros": sparsity(result.model).share()} if self.form == "apart" else {}),
        }

    def save(self, model: Any, tokenizer: Any, report: dict[str, Any], found: Measured) -> None:
        """Build the whole result and put it in place in one step; then the checkpoints go, those given up as well."""
        import ffnkit
        from ffnkit.tune import tuners

        training = {"tuner": self.tuner, **tuners.told(self.tuner, self.tuner_settings), "seed": self.seed}
        training |= {"distilled from": public_name(self.teacher)} if self.teacher else {}
        training |= {key: value for key, value in self.train_settings.model_dump(mode="json").items()}
        history = History.of(self.model).tuned(training, self.task.name, report["metrics"], self.task.pipeline_tag)
        # what was to stay unfolded only the compact form holds
        form = forms.settled(self.form, model) if self.fold or self.form != "auto" else "compact"
        write = {"apart": ffnkit.save_apart, "standard": ffnkit.export}.get(form, ffnkit.save)
        with staging(self.out) as temporary:
            write(model, temporary, tokenizer=tokenizer, card=history.card(model, form))  # type: ignore[operator, arg-type]
            history.write(temporary)
            found.write(temporary, self.task)
            if (self.work / LOGS).is_dir():
                shutil.copytree(self.work / LOGS, temporary / LOGS, symlinks=True)
            write_text(temporary / "metrics.json", json.dumps(console.plain(report), indent=2) + "\n")
        shutil.rmtree(self.works, ignore_errors=True)
        self.last = forms.elsewhere(form, self.out, model)


def has_files(work: Path) -> bool:
    """Whether a run left something to go on from, a checkpoint or the state of a distillation."""
    inner = (path for path in work.glob("*/*/*") if path.relative_to(work).parts[0] != LOGS)
    return any(path.is_file() for path in inner) or any(work.glob("distil/*.safetensors"))


def digest(facts: dict[str, Any]) -> str:
    """A name for the folder of a run with these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def files_of(model: str) -> list[list[Any]]:
    """Name, size and time of a local model's files, to tell whether it is the same as before."""
    folder = Path(model).expanduser()
    every = folder.rglob("*") if is_apart(folder) else folder.glob("*")
    found = [path for path in sorted(every) if path.suffix in (".json", ".safetensors")]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def files_of_text(path: str | None) -> list[Any]:
    """Size and time of a file of text, if one is named.

    Raises:
        FfnkitError: it is not there.
    """
    if path is None:
        return []
    try:
        stat = Path(path).expanduser().stat()
    except OSError as error:
        found = f"it cannot be read ({error.strerror or error})"
        raise FfnkitError(f"--distil-text {path}", found, "Check the path") from error
    return [stat.st_size, stat.st_mtime_ns]
