"""What a training run gives: the model, and how it came about."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ffnkit.tune.loop import Loop
from ffnkit.tune.settings import TrainSettings


@dataclass
class TrainResult:
    """A trained model and how it came about.

    Attributes:
        model: a plain transformers model (adapters merged), where it was trained, in eval mode.
        seconds: wall-clock seconds of training with its evaluations and checkpoints, over all calls that it took.
        steps: optimizer steps.
        samples_per_second: examples a second inside training steps, evaluation left out.
        best_metric: the best value on dev of the metric ``best_metric_name``; None where none was reached.
        best_step: the step of that value, of which ``model`` has the weights under ``keep_best``.
        trainable_parameters: numbers trained.
        losses: entries with step, loss, learning_rate and grad_norm.
        history: entries with step and every metric on dev.
        log: all of the Trainer's log.
        peak_rss: largest resident memory of this process so far, in bytes.
        peak_cuda: largest memory of tensors on the GPU during training, in bytes; None without one.
    """

    model: PreTrainedModel
    seconds: float
    steps: int
    samples_per_second: float
    best_metric_name: str
    best_metric: float | None
    best_step: int | None
    trainable_parameters: int
    losses: list[dict[str, float]]
    history: list[dict[str, float]]
    peak_rss: int
    peak_cuda: int | None
    log: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and the raw log, as JSON data."""
        return {key: value for key, value in vars(self).items() if key not in ("model", "log")}


def result_of(
    loop: Loop, state: dict[str, Any], model: PreTrainedModel, settings: TrainSettings, metric: str, trained: int
) -> TrainResult:
    """The result of a run from the state that the Trainer kept."""
    entries: list[dict[str, Any]] = state["log_history"]
    clock = state["stateful_callbacks"]["Clock"]["attributes"]
    seen = state["global_step"] * settings.batch_size * settings.accumulation * max(loop.args.world_size, 1)
    best = state.get("best_global_step")
    return TrainResult(
        model=model,
        seconds=clock["seconds"],
        steps=state["global_step"],
        samples_per_second=seen / max(clock["step_seconds"], 1e-9),
        best_metric_name=metric,
        best_metric=float(state["best_metric"]) if best else None,
        best_step=best or None,
        trainable_parameters=trained,
        losses=[_entry(e, "loss", "learning_rate", "grad_norm") for e in entries if "loss" in e],
        history=[_entry(e, *(k for k in e if k.startswith("eval_"))) for e in entries if "eval_loss" in e],
        peak_rss=_peak_rss(),
        peak_cuda=on_device(torch.cuda.max_memory_allocated),
        log=entries,
    )


def _entry(entry: dict[str, Any], *keys: str) -> dict[str, float]:
    slow = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    chosen = {key.removeprefix("eval_"): entry[key] for key in keys if key in entry and key not in slow}
    return {"step": entry["step"], **chosen}


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def on_device(call: Any) -> Any:
    """What ``call`` gives where there is a GPU, else None."""
    return call() if torch.cuda.is_available() else None
