"""One unit: an arm with a seed, stage by stage, each taken up from what the last one left on disk."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ffnkit
from ffnkit.checkpoint.adapters import is_adapted
from ffnkit.io.files import write_text
from ffnkit.io.processes import is_first
from ffnkit.io.progress import phase
from ffnkit.model.linear import added_to
from ffnkit.nn.coefficients import set_l1
from ffnkit.recipe import launching, searching, sources, tickets, tracked
from ffnkit.recipe.cards import card_of
from ffnkit.recipe.reference import await_reference
from ffnkit.recipe.schema import Recipe
from ffnkit.recipe.state import TRAINED, Unit, digest, measures, stages_of
from ffnkit.recipe.stored import read_weights, write_weights
from ffnkit.report import environment, measure
from ffnkit.report.card import Form
from ffnkit.report.curves import curve_of
from ffnkit.report.sparsity import merge_costs, shares_of, sparsity, units_removed
from ffnkit.surgery.apply import SAVING
from ffnkit.surgery.compressed import compressed_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnkit.tune import TrainSettings

Say = Callable[[str], None]
HEALED, PLAN, DISTILLED, TUNED = "healed.safetensors", "plan", "distilled.safetensors", "tuned.safetensors"
ADAPTER, PRUNED, RECOVERED = "adapter", "pruned-{}", "recovered.safetensors"
APART: Literal["apart"] = "apart"


def run_unit(recipe: Recipe, unit: Unit, facts: dict[str, Any], say: Say, bars: bool = False) -> None:
    """Bring a unit to its end, from wherever it stands.

    Args:
        facts: what its figures depend on; stored with it.
        say: takes one line of progress.
        bars: whether trainings tell where they are.
    """
    if unit.marker("unit") is None:
        shutil.rmtree(unit.folder, ignore_errors=True)
        tracked.clear(recipe, unit)
        unit.mark("unit", {"arm": unit.arm, "seed": unit.seed, "fingerprint": digest(facts), "facts": facts})
    unit.unmark("failed")
    unit.work.mkdir(parents=True, exist_ok=True)
    job = _Job(recipe, unit, bars)
    for stage in stages_of(recipe, unit.arm):
        if unit.marker(stage) is not None:
            continue
        if stage == "export":
            await_reference(recipe, unit)
        began = unit.work / f"began-{stage}"
        attempts = int(began.read_text() or 0) + 1 if began.exists() else 1
        write_text(began, str(attempts))
        say(f"  {stage} ..." + (" (taken up again)" if attempts > 1 else ""))
        start = time.perf_counter()
        with phase(stage):
            figures = _launched(job, stage) if stage in launching.STAGES and recipe.launch else job.stage(stage)
        seconds = time.perf_counter() - start
        seconds = max(seconds, figures.pop("train_seconds", 0.0))  # those of attempts that were killed count too
        unit.mark(stage, {"seconds": seconds, "attempts": attempts, **figures})
        say(f"  {stage} {seconds:.1f} s{_told(figures)}")
    job.forget()
    tracked.tell(recipe, unit, unit.work / PLAN)
    unit.mark("end", {"versions": environment.versions(), "machine": environment.machine()})
    shutil.rmtree(unit.work, ignore_errors=True)
    unit.mark("done", {})


def run_stage(recipe: Recipe, unit: Unit, stage: str, bars: bool) -> dict[str, Any]:
    """The figures of one stage of a unit whose earlier ones are finished; the stage is not marked."""
    return _Job(recipe, unit, bars).stage(stage)


def _launched(job: _Job, stage: str) -> dict[str, Any]:
    """The figures of a stage, trained in several processes; the model is then on disk."""
    job.forget()
    assert job.recipe.launch is not None
    return launching.run(job.recipe.launch, job.unit.out, job.unit, stage, progress=job.bars)


def _told(figures: dict[str, Any]) -> str:
    metrics = figures.get("metrics") or figures.get("dev_metrics") or {}
    return "".join(f", {name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))


class _Job:
    """The model of a unit while it is being worked on; the stages are its methods."""

    def __init__(self, recipe: Recipe, unit: Unit, bars: bool) -> None:
        self.recipe, self.unit, self.bars = recipe, unit, bars
        self.arm = recipe.arms[unit.arm]
        self.source = sources.Source(recipe)
        self._model: PreTrainedModel | None = None

    @property
    def training(self) -> TrainSettings:
        """How the arm is tuned, at the rate that was found for it where one was searched."""
        return self.recipe.tune_of(self.unit.arm, searching.rate_of(self.unit))

    # ------------------------------------------------------------------------------------------ the model
    @property
    def model(self) -> PreTrainedModel:
        """The model as the last finished stage left it."""
        if self._model is None:
            self._model = self._restored()
        return self._model

    def forget(self) -> None:
        """Free the model."""
        self._model = None
        gc.collect()

    def _restored(self) -> PreTrainedModel:
        """Built again from what is on disk: the source, the plan, the newest weights."""
        model = self.source.model(self.unit.seed)
        if self.unit.marker("compress"):
            ffnkit.apply(model, ffnkit.Plan.load(self.unit.work / PLAN))
        work = self.unit.work
        if self.unit.marker("tickets"):
            assert self.arm.tickets is not None
            tickets.rewound(model, self.arm.tickets, work / "tickets")
        if self.unit.marker("tune"):
            model = self._as_tuned(model)
            read_weights(model, work / TUNED)
            if (work / ADAPTER).exists():
                ffnkit.apply(model, ffnkit.Plan.load(work / ADAPTER))
        elif self.unit.marker("distil") or self.unit.marker("heal"):
            read_weights(model, work / (DISTILLED if self.unit.marker("distil") else HEALED))
        if self.unit.marker("prune"):
            for number in range(len(self.arm.prune)):
                ffnkit.apply(model, ffnkit.Plan.load(work / PRUNED.format(number)))
        if self.unit.marker("recover"):
            self._merged(model)
            read_weights(model, work / RECOVERED)
        return model

    def _as_tuned(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model in the form that the tuning leaves, its numbers yet to be read."""
        tuner = sources.tuner_of(self.recipe, self.unit.arm)
        parts = tuner.name == "lora" and not self.arm.prune  # adapters may part layers that shared an FFN
        made = tuner.finish(tuner.prepare(model)) if tuner.stays or parts else model
        return made if tuner.stays else ffnkit.fold(made, keep=SAVING)

    # ----------------------------------------------------------------------------------------- the stages
    def stage(self, name: str) -> dict[str, Any]:
        """Do a stage; its figures come back."""
        return dict(getattr(self, name)())

    def compress(self) -> dict[str, Any]:
        """Plan and apply the arm's method; the plan stays on disk until the unit is finished."""
        model = self.source.model(self.unit.seed)
        data = self.source.calibration(model, self.unit.seed) if measures(self.arm) else None
        model.to(self.source.device)  # type: ignore[arg-type]
        widths = sources.widths_of(self.arm, model, data)
        method = sources.method_of(self.arm, self.unit.seed, widths)
        plan = ffnkit.plan(model, self._scored(method), data=data)
        plan.save(self.unit.work / PLAN)
        self._model = ffnkit.apply(model, plan)
        facts: dict[str, Any] = {"widths": dict(widths)} if widths is not None else {}
        masked = all(edit.zeros is not None for edit in plan.edits)  # beside other edits they cannot be counted yet
        zeros = sparsity(self.model).share() if masked and not plan.shapes else 0.0
        return facts | ({"plan": plan.report} if plan.report else {}) | ({"zeros": zeros} if zeros else {})

    def _scored(self, method: Any) -> Any:
        """The method with its score, where it has one, on dev: never on rows that calibrate."""
        from ffnkit.tune import with_score

        sizes = {"batch_size": self.training.eval_batch_size, "max_length": self.training.max_length}
        return with_score(method, self.source.task, self.source.tokenizer, self.source.splits.dev, **sizes)

    def heal(self) -> dict[str, Any]:
        """Let the compressed model learn from the uncompressed one, before it is tuned."""
        figures = self.source.healed(self.model, self.unit.seed)
        write_weights(self.model, self.unit.work / HEALED)
        return figures

    def distil(self) -> dict[str, Any]:
        """Fit the narrow model to the uncompressed one, or to a tuned teacher, which is freed afterwards."""
        from ffnkit.tune import distil, distil_examples

        settings, source = self.recipe.distil, self.source
        teacher = source.teacher(self.unit.seed).to(source.device)  # type: ignore[arg-type]
        if settings.text is not None:
            settings = settings.model_copy(update={"text": sources.expand(settings.text)})
        data, collate = distil_examples(self.model, source.tokenizer, settings, source.task, source.splits.train)
        result = distil(
            self.model.to(source.device),  # type: ignore[arg-type]
            teacher,
            data,
            settings,
            seed=self.unit.seed,
            collate=collate,
            out_dir=self.unit.work / "distil",
            progress=self.bars,
        )
        del teacher
        write_weights(self.model, self.unit.work / DISTILLED)
        gc.collect()
        ends = {name: [values[0], values[-1]] for name, values in result.parts.items()}
        return {
            "steps": result.steps,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
            "parts": ends,
        }

    def search(self) -> dict[str, Any]:
        """Find the arm's learning rate, unless another of its seeds has."""
        self.forget()
        return searching.search(self.recipe, self.unit, self.source, self._restored, self.bars)

    def tickets(self) -> dict[str, Any]:
        """Draw the arm's ticket; the tuning that follows starts from it."""
        assert self.arm.tickets is not None

        def train(model: PreTrainedModel, out: Path, snapshot: tuple[int, Path] | None) -> PreTrainedModel:
            self._model = model
            trained = self._trained("tickets", self.training, out, snapshot=snapshot)[1]
            self.forget()
            return trained

        folder = self.unit.work / "tickets"
        self.forget()
        figures = tickets.find(self.arm.tickets, folder, self._restored, train)
        self._model = tickets.rewound(self._restored(), self.arm.tickets, folder)
        return figures | {"zeros": sparsity(self.model).share()}

    def before(self) -> dict[str, Any]:
        """The metrics before tuning, for a model whose head is trained already."""
        return self._metrics(keep=False)

    def tune(self) -> dict[str, Any]:
        """Fine-tune, going on from the Trainer's newest checkpoint, then fold."""
        if not self.arm.prune:
            figures, model = self._trained("tune", self.training, apart=True)
            self._model = model if added_to(model) else ffnkit.fold(model, keep=SAVING)
            write_weights(self.model, self.unit.work / TUNED)
            masked = any("zeros" in (self.unit.marker(stage) or {}) for stage in ("compress", "tickets"))
            left = sparsity(self.model).share() if masked else None
            return figures | ({} if left is None else {"zeros": left})
        figures, model = self._trained("tune", self.training, merge=False)
        updates = ffnkit.adapter(model) if is_adapted(model) else None
        if updates is not None:  # they stay apart from the weights: pruning tells the two from each other
            if is_first():
                updates.save(self.unit.work / ADAPTER)
            ffnkit.remove_adapter(model)
        self._model = ffnkit.fold(model, keep=SAVING)
        write_weights(self.model, self.unit.work / TUNED)
        if updates is not None:
            ffnkit.apply(self.model, updates)
        return figures

    def prune(self) -> dict[str, Any]:
        """Plan and apply the arm's pruning, one method after the other; the plans stay on disk."""
        from ffnkit import methods

        before, seed = measure.figures(self.model), self.unit.seed
        self.model.to(self.source.device)  # type: ignore[arg-type]
        plans = []
        for number, spec in enumerate(self.arm.prune):
            method = methods.build(spec.method, **sources.seeded(spec.method, spec.settings, seed))
            data = self.source.calibration(self.model, seed) if getattr(method, "needs_data", False) else None
            plan = ffnkit.plan(self.model, self._scored(method), data=data)
            plan.save(self.unit.work / PRUNED.format(number))
            ffnkit.apply(self.model, plan)
            plans.append(str(plan))
        after = measure.figures(self.model)
        kept = {name: after[name] / before[name] for name in ("parameters", "flops_per_token")}
        return {"plans": plans, "kept": kept, "sparsity": shares_of(self.model)}

    def recover(self) -> dict[str, Any]:
        """Tune again, what trained before trains on, then merge."""
        settings = self.recipe.recover_of(self.unit.arm, searching.rate_of(self.unit))
        set_l1(self.model, 0.0)  # coefficients have chosen; drawn on, those that stay would shrink for nothing
        figures, model = self._trained("recover", settings, apart=True, go_on=True, merge=False)
        figures["sparsity"] = shares_of(model)
        if is_adapted(model) and figures["sparsity"]["zeros"]:
            figures["merging"] = merge_costs(model, self.source.dev_batches(model, self.training)).to_dict()
        self._model = self._merged(model)
        write_weights(self.model, self.unit.work / RECOVERED)
        return figures

    def _merged(self, model: PreTrainedModel) -> PreTrainedModel:
        """Plain linears, updates and masks in their weights."""
        tuner = sources.tuner_of(self.recipe, self.unit.arm)
        return ffnkit.fold(model, masked=getattr(tuner, "keep_zeros", False), keep=SAVING)

    def _trained(
        self, stage: str, settings: TrainSettings, out: Path | None = None, *, apart: bool = False, **how: Any
    ) -> tuple[dict[str, Any], PreTrainedModel]:
        """The figures of a training, taken up where it was killed, and its model.

        Args:
            out: the folder of the training, the stage's unless it is named.
            apart: whether the model goes to disk with its updates apart, where it has some: before they are merged.
        """
        from ffnkit.tune import train

        if settings.compressed_rate_factor != 1 and not self.arm.compressed and not compressed_parameters(self.model):
            settings = settings.model_copy(update={"compressed_rate_factor": 1.0})  # nobody is there to learn at it
        tuner = sources.tuner_of(self.recipe, self.unit.arm)
        if apart and "apart_dir" in type(tuner).model_fields and tuner.method is not None:
            tuner = tuner.model_copy(update={"apart_dir": self.unit.work / APART})
        with measure.peak_memory(self.source.device) as peak:
            result = train(
                self.model,
                self.source.tokenizer,
                self.source.task,
                self.source.splits,
                settings,
                tuner=tuner,
                seed=self.unit.seed,
                out_dir=out or self.unit.work / stage,
                progress=self.bars,
                generation=self.recipe.generation,
                run=tracked.run_of(self.recipe, self.unit, stage, out),
                **how,
            )
        figures = {
            "train_seconds": result.seconds,
            "steps": result.steps,
            "best_step": getattr(result, "best_step", None),
            "dev_metric": result.best_metric,
            "curve": curve_of(result.losses, result.history, result.best_metric_name),
            **{name: getattr(result, name) for name in TRAINED},
            "peak_memory_bytes": result.peak_tensors,
            "process_memory_bytes": peak.peak_bytes,
        }
        return figures, result.model

    def evaluate(self) -> dict[str, Any]:
        """The metrics on the split that is only reported, and the counts of the model."""
        counts = {name: value for name, value in measure.figures(self.model).items() if name != "trainable_parameters"}
        before = self.source.empty()
        found = {**self._metrics(keep=True), **counts, **units_removed(self.model, before)}
        splits = self.source.splits
        found["rows"] = {name: len(getattr(splits, name)) for name in ("train", "dev", "report")}
        found["parameters_removed"] = 1 - counts["parameters"] / sum(p.numel() for p in before.parameters())
        if (text := self.recipe.forgetting) is not None:
            from ffnkit.report.forgetting import forgetting

            found["neutral_loss"] = forgetting(
                self.source.model_name, self.model, self.source.tokenizer, sources.neutral_texts(text)
            )
        self.source.add_harness(found, self.model, self.bars)
        return found

    def _metrics(self, keep: bool) -> dict[str, Any]:
        """Metrics, losses and speeds on every reported split; with ``keep``, what was written goes into files."""
        from ffnkit.tune import assess_all, write_predictions

        settings, source = self.training, self.source
        self.model.to(source.device)  # type: ignore[arg-type]
        metrics: dict[str, float] = {}
        losses: dict[str, float] = {}
        speed: dict[str, dict[str, float]] = {}
        sizes = {"batch_size": settings.eval_batch_size, "max_length": settings.max_length}
        how = {**sizes, "generation": self.recipe.generation}
        for name, found in assess_all(self.model, source.tokenizer, source.task, source.splits, **how).items():
            losses[name] = found.loss
            speed |= {name: found.speed} if found.speed else {}
            other = "" if name == "report" else f" ({name})"
            metrics |= {f"{key}{other}": value for key, value in found.metrics.items()}
            if keep and found.predictions:
                write_predictions(self.unit.folder / f"predictions-{name}.jsonl", found, source.task)
        return {"metrics": metrics, "losses": losses, **({"speed": speed} if speed else {})}

    def export(self) -> dict[str, Any]:
        """All checkpoint forms are written and weighed; those that the recipe asks for are kept."""
        recipe = self.recipe
        first = self.unit.seed == recipe.seeds[0] or recipe.export_seeds == "all"
        sizes: dict[str, Any] = {}
        before = self.source.widths()
        writers: dict[Form, Callable[..., Any]] = {"compact": ffnkit.save, "standard": ffnkit.export}
        if added_to(self.model):
            del writers["standard"]  # no plain model computes what an adapter does
        if (self.unit.work / APART).is_dir():
            writers[APART] = ffnkit.save_apart
        for form, write in writers.items():
            model = ffnkit.load(self.unit.work / APART) if form == APART else self.model
            keep = first and (recipe.export in (form, "all") or (recipe.export == "both" and form != APART))
            folder = (self.unit.folder if keep else self.unit.work) / form
            card = card_of(recipe, self.unit, self.model, self.source.task, before, form)
            write(model, folder, tokenizer=self.source.tokenizer, card=card)
            sizes[f"bytes_on_disk_{form}"] = measure.bytes_on_disk(folder).weights
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return sizes
