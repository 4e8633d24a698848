"""Fine-tuning on a task by transformers' Trainer, resumable at any moment with the same outcome."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ffnkit.checkpoint.adapters import is_adapted
from ffnkit.errors import FfnkitError
from ffnkit.io import processes
from ffnkit.io.progress import counted, phase, shown
from ffnkit.surgery.compressed import compressed_parameters
from ffnkit.tasks.encoding.packing import pack
from ffnkit.tasks.running import encoded_rows, lengths
from ffnkit.tasks.settings import GenerationSettings
from ffnkit.tune import checkpoints, masks, sparing, tracking
from ffnkit.tune.allocations import Allocations
from ffnkit.tune.arguments import chosen_metric, training_arguments
from ffnkit.tune.dropout import dropout_at
from ffnkit.tune.lifecycle import training_run, undone
from ffnkit.tune.loop import Clock, Epochs, Loop, Saving, Snapshot, Telling
from ffnkit.tune.outcome import TrainResult, body_size, counts_of, on_device, result_of
from ffnkit.tune.settings import HARMLESS, TrainSettings
from ffnkit.tune.sharding import in_shards
from ffnkit.tune.tuners import Tuner, finish, get, prepare

log = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; call it before loading a model whose head is drawn at random."""
    set_seed(seed)


def train(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    splits: Any,
    settings: TrainSettings | None = None,
    *,
    tuner: str | Mapping[str, Any] | Tuner = "full",
    seed: int = 0,
    out_dir: str | Path,
    progress: bool = True,
    generation: GenerationSettings | None = None,
    go_on: bool = False,
    merge: bool = True,
    snapshot: tuple[int, str | Path] | None = None,
    run: tracking.Run | None = None,
) -> TrainResult:
    """Fine-tune ``model`` on ``splits.train``; ``splits.dev`` picks the checkpoint. ``splits.report`` is not read.

    Called again with the same ``out_dir`` after a kill, it goes on from the last whole checkpoint and ends with the
    weights that an uninterrupted run has. Equal seeds see the same batches in the same order, whatever the model.

    Where it stops on the way, for whatever reason, the model is without the tuner's layers, and everything trains and
    runs as before; parameters that trained in place have the values that they came to (``lifecycle.undone``).

    Args:
        model: a model with the task's head; it is changed in place (with "lora", folded and adapted).
        tokenizer: the model's tokenizer.
        task: a :class:`ffnkit.tasks.Task`.
        splits: what :meth:`Task.splits` gives.
        tuner: what trains: a name, a mapping of name and settings, or a tuner.
        seed: order of the data, dropout, adapters. The head is drawn when the model is loaded, by the caller.
        out_dir: folder for checkpoints, of this run only.
        progress: tell on stderr where it is: bars in a terminal, lines in a log.
        generation: how texts are decoded where ``best_metric`` is a metric of generated text.
        go_on: updates that are on the model (of "sparsegrad", "dsee", ...) train on, with what trained beside them;
            without them, or without this, the tuner begins anew.
        snapshot: a step and a file (safetensors) that gets the weights after it.
        run: name and folder of the run for the trackers that ``report_to`` names; by default those of ``out_dir``,
            whose ``logs`` they write to.
        merge: put such updates into the weights at the end; else they stay on the model.

    Raises:
        FfnkitError: a metric that the task has not, fp16 without a GPU, an empty split, nothing to train, packing
            where it cannot be, or checkpoints of another run in ``out_dir``.
    """
    settings = settings or TrainSettings()
    tuner = get(tuner)
    metric = chosen_metric(task, settings)
    if settings.augment != "none" and not hasattr(task, "augmented"):
        raise FfnkitError(f"augment {settings.augment}", f"task {task.name} has no images", "Leave it out")
    if settings.label_smoothing and task.kind == "regression":
        asked = f"label_smoothing {settings.label_smoothing:g}"
        raise FfnkitError(asked, f"task {task.name} asks for a number, not for a class", "Leave it out")
    data = encoded_rows(task, splits.train, tokenizer, settings.max_length, model)
    data = pack(model, task, data, settings.max_length) if settings.packing else data
    dev = encoded_rows(task, splits.dev, tokenizer, settings.max_length, model)
    for name, split in (("train", data), ("dev", dev)):
        if len(split) == 0:
            raise FfnkitError(f"training on {task.name}", f"the {name} split is empty", "Give more rows")
    run = run or tracking.Run(Path(out_dir).name, Path(out_dir) / tracking.LOGS)
    arguments = training_arguments(settings, metric, out_dir, seed, run.name)
    go_on = go_on and is_adapted(model)
    model = model if go_on else undone(model)
    if settings.compressed_rate_factor != 1 and not compressed_parameters(model):
        asked = f"compressed_rate_factor {settings.compressed_rate_factor:g}"
        found = f"nothing in the {type(model).__name__} is known to be compressed"
        raise FfnkitError(asked, found, "Leave it out, or compress the model in the same recipe or process")
    facts = _run(model, task, data, dev, settings, tuner, seed) | ({"go_on": True} if go_on else {})
    # each has batches of its own: others, by another number
    several = {checkpoints.PROCESSES: arguments.world_size, "GPUs": arguments.n_gpu}
    facts |= {name: number for name, number in several.items() if number > 1}
    if metric in task.metrics and generation is not None:
        facts["generation"] = generation.model_dump(mode="json")
    if not merge and tuner.method is not None:
        masks.say_lost(model)
    dropped = dropout_at(model, settings.dropout)
    display, logged = shown("tuning", quiet=not progress), tracking.tracked(run, settings.report_to)
    with display, checkpoints.claimed(out_dir, facts), dropped, training_run(model, undo=not go_on), logged:
        seed_everything(seed)
        plain = body_size(model)
        tuned = model if go_on else _prepared(model, tuner, task, tokenizer, data, settings, seed, out_dir, progress)
        if merge:
            sparing.spare_noted(tuned)
        trained = counts_of(tuned, plain)
        if not trained.trainable:
            raise FfnkitError(f"tuner {tuner.name}", "no parameter of the model trains", "Choose another tuner")
        use_cache, own_forward = getattr(tuned.config, "use_cache", None), "forward" in vars(tuned)

        def scores(model: nn.Module) -> dict[str, float]:
            found = task.evaluate(
                model,
                tokenizer,
                splits.dev,
                batch_size=arguments.eval_batch_size,
                max_length=settings.max_length,
                generation=generation,
                encoded=dev,
                loss_only=metric == "loss",
            )
            return dict(processes.of_first(found.to_dict()))  # rounding must not part them

        with in_shards(tuned, arguments), _checkpointing(tuned, settings.gradient_checkpointing):
            collate = task.collator(tokenizer, tuned)
            if settings.augment != "none":
                collate = task.augmented(collate, settings.augment, seed)
            loop = _loop(tuned, collate, data, dev, scores, arguments, settings)
            if snapshot is not None:
                loop.add_callback(Snapshot(*snapshot))
            on_device(torch.cuda.reset_peak_memory_stats)
            with phase("training") as step:
                loop.add_callback(Telling(step))
                state = _run_or_resume(loop, out_dir, settings)
            _leave(loop, use_cache, own_forward)
        done = cast(PreTrainedModel, finish(tuned, tuner, merge=merge).eval())
        result = result_of(loop, state, done, settings, metric, trained)
    processes.wait()
    if not settings.keep_checkpoints and processes.is_first():
        checkpoints.clean(out_dir)
    return result


def _prepared(
    model: nn.Module,
    tuner: Tuner,
    task: Any,
    tokenizer: Any,
    data: Any,
    s: TrainSettings,
    seed: int,
    out: str | Path,
    progress: bool,
) -> nn.Module:
    """What trains; gradients that choose it come from training rows, and a run that goes on keeps the choice."""
    if tuner.method is None:
        return prepare(model, tuner)
    from ffnkit.tune.calibration import first_batches

    wanted = tuner.method
    batches, kept = None, Path(out) / checkpoints.PLAN
    if checkpoints.newest(Path(out)) is None and processes.is_first():
        kept.unlink(missing_ok=True)
    if wanted.needs_data and not processes.of_first(kept.is_file()):
        size = s.batch_size * processes.count()  # as one process sees them that trains on as much a step
        batches = first_batches(data, task.collator(tokenizer, model), size, wanted.batches, seed=seed)
    on_device(lambda: model.to("cuda"))
    result = tuner.prepare(model, batches, kept, progress)
    seed_everything(seed)
    return result


def _run(
    model: nn.Module, task: Any, data: Any, dev: Any, settings: TrainSettings, tuner: Tuner, seed: int
) -> dict[str, Any]:
    """What decides the outcome of a run, as JSON data."""
    shapes = [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    return {
        "settings": settings.model_dump(mode="json", exclude=set(HARMLESS)),
        "tuner": {"name": tuner.name, **tuner.model_dump(mode="json", exclude={"adapter_dir", "apart_dir"})},
        "seed": seed,
        "task": str(task.name),
        "train": _digest(data),
        "dev": _digest(dev),
        "model": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest(),
        "weights": checkpoints.weights_sample(model),
    }


def _digest(dataset: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for batch in counted(dataset.iter(batch_size=4096), "reading rows", -(-len(dataset) // 4096)):
        labels = batch["labels"] if "labels" in batch else batch.get("label")
        ids = batch["digest" if "digest" in batch else "input_ids"]
        plain = [label if isinstance(label, list) else float(label) for label in labels]
        digest.update(json.dumps([ids, plain]).encode())
    return f"{len(dataset)}:{digest.hexdigest()}"


def _loop(
    model: nn.Module, collate: Any, data: Any, dev: Any, scores: Any, arguments: TrainingArguments, s: TrainSettings
) -> Loop:
    callbacks: list[Any] = [Saving(s.save_every), Clock(), Allocations()]
    if s.augment != "none":
        callbacks.append(Epochs(collate))
    if s.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(s.early_stopping))
    try:
        loop = Loop(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=data,
            eval_dataset=dev,
            scores=scores,
            callbacks=callbacks,
            group_lengths=lengths(data) if s.group_by_length else None,
            label_smoothing=s.label_smoothing,
            compressed_rate=s.compressed_rate_factor,
        )
    except (ValueError, ImportError) as error:
        raise FfnkitError("training", str(error), "Change the settings or the model") from error
    loop.remove_callback(PrinterCallback)
    return loop


def _run_or_resume(loop: Loop, out_dir: str | Path, settings: TrainSettings) -> dict[str, Any]:
    """Train; from the last whole checkpoint where there is one. The state of the run comes back."""
    last = checkpoints.newest(out_dir)
    if last is not None:
        state = checkpoints.state_of(last)
        if _over(state):
            _load_final(loop, Path(out_dir), last, state, settings)
            return state
        log.info("resuming from %s", last)
    try:
        loop.train(resume_from_checkpoint=None if last is None else str(last))
    except BaseException:
        for callback in loop.callback_handler.callbacks:
            if isinstance(callback, Allocations):
                callback.close()
        raise
    kept = [c for c in loop.callback_handler.callbacks if isinstance(c, Clock | Allocations)]
    return {**vars(loop.state), "stateful_callbacks": {type(c).__name__: c.state() for c in kept}}


def _over(state: dict[str, Any]) -> bool:
    """Whether the run that saved this state had come to its end; the Trainer itself would go on for a step."""
    control = state["stateful_callbacks"].get("TrainerControl", {})
    stopped = isinstance(control, dict) and control.get("args", {}).get("should_training_stop", False)
    return bool(stopped) or state["global_step"] >= state["max_steps"]


def _load_final(loop: Loop, out_dir: Path, last: Path, state: dict[str, Any], settings: TrainSettings) -> None:
    best = out_dir / f"checkpoint-{state.get('best_global_step')}"
    chosen = best if settings.keep_best and checkpoints.is_whole(best) else last
    loop._load_from_checkpoint(str(chosen))


def _leave(loop: Loop, use_cache: bool | None, own_forward: bool) -> None:
    """Undo what the Trainer did to the model (``use_cache``, the wrapper of mixed precision); free the optimizer."""
    model: Any = loop.accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False)
    if not own_forward:
        vars(model).pop("forward", None)  # unwrapping leaves a bound method, which a copy of the model would share
    vars(model).pop("_is_accelerate_prepared", None)  # with it the next run has no mixed precision
    if use_cache is not None:
        model.config.use_cache = use_cache
    for holder in (loop, loop.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    loop.accelerator.free_memory()


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block; the name of the method depends on the release of transformers."""
    if not wanted:
        yield
        return
    on = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else None
    off = on.replace("enable", "disable") if on else "gradient_checkpointing_disable"
    try:
        getattr(model, on or "gradient_checkpointing_enable")()
    except ValueError as error:
        raise FfnkitError("gradient_checkpointing", str(error), "Leave it out for this model") from error
    try:
        yield
    finally:
        getattr(model, off)()
