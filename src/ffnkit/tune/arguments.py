"""Settings of fine-tuning said in the terms of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ffnkit.errors import FfnkitError
from ffnkit.tasks.metrics import greater_is_better
from ffnkit.tune.settings import TrainSettings
from ffnkit.tune.tracking import trackers


def chosen_metric(task: Any, settings: TrainSettings) -> str:
    """The metric that picks the best checkpoint. Raises FfnkitError where the task has none of that name."""
    metric = settings.best_metric or str(task.dev_metric)
    known = [*task.metrics, "loss"]
    if metric not in known:
        found = f"task {task.name} has no such metric"
        raise FfnkitError(f"best_metric {metric!r}", found, f"Use {' or '.join(known)}")
    return metric


def _options(s: TrainSettings, metric: str) -> dict[str, Any]:
    """The schedule's options; that which waits for a plateau is told in which direction the metric is better.

    Raises FfnkitError for the other one.
    """
    options = dict(s.schedule_options)
    if s.schedule == "reduce_lr_on_plateau":
        mode = "max" if greater_is_better(metric) else "min"
        if options.setdefault("mode", mode) != mode:
            asked = f"schedule_options mode={options['mode']}"
            raise FfnkitError(asked, f"of {metric} {'more' if mode == 'max' else 'less'} is better", "Leave it out")
    return options


def training_arguments(
    s: TrainSettings, metric: str, out_dir: str | Path, seed: int, name: str | None = None
) -> TrainingArguments:
    """The settings for transformers; ``name`` is what trackers call the run.

    Raises FfnkitError for fp16 without a GPU, for a plateau that is none, and for what transformers refuses.
    """
    on_cpu = s.device == "cpu" or not torch.accelerator.is_available()
    if s.precision == "fp16" and on_cpu:
        raise FfnkitError("precision 'fp16'", "there is no GPU to train on", "Use bf16 or fp32")
    strategy = "epoch" if s.eval_every is None else "steps"
    every = {} if s.eval_every is None else {"eval_steps": s.eval_every, "save_steps": s.eval_every}
    try:
        return TrainingArguments(
            output_dir=str(out_dir),
            learning_rate=s.learning_rate,
            lr_scheduler_type=s.schedule,
            lr_scheduler_kwargs=_options(s, metric),
            warmup_steps=s.warmup,
            weight_decay=s.weight_decay,
            adam_beta1=s.betas[0],
            adam_beta2=s.betas[1],
            adam_epsilon=s.eps,
            optim=s.optimizer,
            max_grad_norm=s.max_grad_norm,
            num_train_epochs=s.epochs,
            max_steps=s.steps or -1,
            per_device_train_batch_size=s.batch_size,
            per_device_eval_batch_size=s.eval_batch_size,
            gradient_accumulation_steps=s.accumulation,
            bf16=s.precision == "bf16",
            fp16=s.precision == "fp16",
            eval_strategy=strategy,
            save_strategy=strategy,
            **every,  # type: ignore[arg-type]
            save_total_limit=s.save_total_limit,
            load_best_model_at_end=s.keep_best,
            metric_for_best_model=metric,
            greater_is_better=greater_is_better(metric),
            restore_callback_states_from_checkpoint=True,
            logging_steps=s.logging_every,
            logging_nan_inf_filter=False,
            report_to=trackers(s.report_to),
            run_name=name,
            disable_tqdm=True,  # ours is shown
            seed=seed,
            data_seed=seed,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            label_names=["labels"],
        )
    except (ValueError, ImportError) as error:
        raise FfnkitError("training settings", str(error), "Change the setting") from error
