"""What a training run gives: the model, and how it came about."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffnkit.model.trainable import head_parameters
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.tune.loop import Loop
from ffnkit.tune.settings import TrainSettings
from ffnkit.tune.tuners import trainable_parameters


@dataclass(frozen=True)
class Trained:
    """Numbers of a model that is about to be trained.

    Attributes:
        trainable: those that train. updated: those that a step of the optimizer changes; fewer where entries are
            chosen at every step. body: those that train, the task head left out.
        share: body, relative to the numbers of the plain model without its task head.
    """

    trainable: int
    updated: int
    body: int
    share: float


def counts_of(model: nn.Module, plain: int) -> Trained:
    """What of a model trains, with the tuner's layers on it.

    Args:
        plain: :func:`body_size` of the model before that.
    """
    trains = {id(p): p.numel() for p in trainable_parameters(model)}
    base: Any = model
    head = {id(p) for p in head_parameters(base.get_base_model() if hasattr(base, "peft_config") else base)}
    idle = sum(layer.unstepped for layer in adapter_layers(model).values())
    total = sum(trains.values())
    body = sum(count for key, count in trains.items() if key not in head)
    return Trained(total, total - idle, body, body / max(plain, 1))


def body_size(model: nn.Module) -> int:
    """Numbers of a model without its task head, and without what updates beside its weights hold."""
    left_out = {id(p) for p in head_parameters(model)}
    for layer in adapter_layers(model).values():
        left_out |= {id(p) for p in layer.parameters() if p is not layer.base and p is not layer.bias}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


@dataclass
class TrainResult:
    """A trained model and how it came about.

    Attributes:
        model: a plain transformers model (adapters merged), where it was trained, in eval mode.
        seconds: wall-clock seconds of training with its evaluations and checkpoints, over all calls that it took.
        steps: optimizer steps.
        samples_per_second, steps_per_second: examples and steps a second inside training steps, evaluation left out.
        best_metric: the best value on dev of the metric ``best_metric_name``; None where none was reached.
        best_step: the step of that value, of which ``model`` has the weights under ``keep_best``.
        trainable_parameters: numbers trained. updated_parameters: numbers that a step changes.
        trainable_body: numbers trained, the task head left out. trainable_share: relative to the model without it.
        losses: entries with step, loss, learning_rate and grad_norm.
        history: entries with step and every metric on dev.
        log: all of the Trainer's log.
        peak_rss: largest resident memory of this process so far, in bytes.
        peak_tensors: largest memory of tensors in training steps, in bytes; None where torch does not tell.
        peak_cuda: largest memory of tensors on the GPU during training, in bytes; None without one.
    """

    model: PreTrainedModel
    seconds: float
    steps: int
    samples_per_second: float
    steps_per_second: float
    best_metric_name: str
    best_metric: float | None
    best_step: int | None
    trainable_parameters: int
    updated_parameters: int
    trainable_body: int
    trainable_share: float
    losses: list[dict[str, float]]
    history: list[dict[str, float]]
    peak_rss: int
    peak_tensors: int | None
    peak_cuda: int | None
    log: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and the raw log, as JSON data."""
        return {key: value for key, value in vars(self).items() if key not in ("model", "log")}


def result_of(
    loop: Loop, state: dict[str, Any], model: PreTrainedModel, settings: TrainSettings, metric: str, trained: Trained
) -> TrainResult:
    """The result of a run from the state that the Trainer kept."""
    entries: list[dict[str, Any]] = state["log_history"]
    clock = state["stateful_callbacks"]["Clock"]["attributes"]
    allocated = state["stateful_callbacks"].get("Allocations", {"attributes": {"peak": 0}})["attributes"]["peak"]
    on_gpu = on_device(torch.cuda.max_memory_allocated)
    within = max(clock["step_seconds"], 1e-9)
    seen = state["global_step"] * settings.batch_size * settings.accumulation * max(loop.args.world_size, 1)
    best = state.get("best_global_step")
    return TrainResult(
        model=model,
        seconds=clock["seconds"],
        steps=state["global_step"],
        samples_per_second=seen / within,
        steps_per_second=state["global_step"] / within,
        best_metric_name=metric,
        best_metric=float(state["best_metric"]) if best else None,
        best_step=best or None,
        trainable_parameters=trained.trainable,
        updated_parameters=trained.updated,
        trainable_body=trained.body,
        trainable_share=trained.share,
        losses=[_entry(e, "loss", "learning_rate", "grad_norm") for e in entries if "loss" in e],
        history=[_entry(e, *(k for k in e if k.startswith("eval_"))) for e in entries if "eval_loss" in e],
        peak_rss=_peak_rss(),
        peak_tensors=allocated or on_gpu or None,
        peak_cuda=on_gpu,
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
