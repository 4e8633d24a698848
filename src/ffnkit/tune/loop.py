"""transformers' Trainer with the few changes that exact resuming and fair comparison need."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file, save_model
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from ffnkit.errors import FfnkitError
from ffnkit.io.files import replacing
from ffnkit.io.loading import no_bars
from ffnkit.io.progress import Step
from ffnkit.model.trainable import parts_of
from ffnkit.nn.adapter_layer import adapter_layers, full_tensor
from ffnkit.nn.differing import Differing
from ffnkit.ops.products import fast_products
from ffnkit.surgery.compressed import compressed_parameters
from ffnkit.tasks.running import IGNORED, is_seq2seq, logits_of, target_counts
from ffnkit.tune.sharding import load_whole, on_any_device

TRAINED = "trained.safetensors"  # in checkpoints of peft models: all that trains; of models in shards: all of it


class Loop(Trainer):
    """The Trainer; the task evaluates, checkpoints hold the names that the model in memory has.

    The loss of a step is the mean over its texts; where labels are tokens, over its target tokens: however many of them
    a micro-batch or a process has.

    Args:
        scores: metrics and loss of the model on dev, by name; None: as the Trainer evaluates.
        group_lengths: length of each training example, to make batches of similar lengths; None: plain shuffling.
        label_smoothing: share of each target that is spread over all classes, in training alone.
        compressed_rate: what was compressed learns at this many times the learning rate.
    """

    def __init__(
        self,
        *args: Any,
        scores: Callable[[Any], dict[str, float]] | None = None,
        group_lengths: np.ndarray | None = None,
        label_smoothing: float = 0.0,
        compressed_rate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self._scores, self._group_lengths = scores, group_lengths
        self._smoothing, self._compressed_rate = label_smoothing, compressed_rate
        super().__init__(*args, **kwargs)
        # Whatever their forward accepts, models return the mean over a micro-batch, which is weighted here.
        self.model_accepts_loss_kwargs = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            from accelerate import FullyShardedDataParallelPlugin

            on_any_device(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = True

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self._scores is None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        model: Any = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        found = {f"{metric_key_prefix}_{name}": value for name, value in self._scores(model).items()}
        return EvalLoopOutput(
            predictions=np.empty(0), label_ids=None, metrics=found, num_samples=len(dataloader.dataset)
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What a step's loss is the mean over, for each process; None where that is what the model gives anyway."""
        processes = self.args.world_size
        if not batch_samples or len(batch_samples) * processes < 2 or any("labels" not in b for b in batch_samples):
            return None
        total = torch.stack([self._items(batch["labels"]) for batch in batch_samples]).sum().to(device)
        return total if processes == 1 else self.accelerator.gather(total).sum() / processes

    def _items(self, labels: torch.Tensor) -> torch.Tensor:
        """How many texts, or target tokens where these are the labels."""
        if labels.ndim < 2 or labels.is_floating_point():
            return torch.tensor(len(labels), device=labels.device)
        return target_counts(labels, self.model).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        share = None
        if num_items_in_batch is not None:  # divided by the number of micro-batches afterwards
            own = self._items(inputs["labels"]).to(num_items_in_batch.device)
            share = own * self.current_gradient_accumulation_steps / num_items_in_batch.clamp(min=1)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self._smoothing:
            loss = loss + self._smoothing * confidence(logits_of(outputs), inputs["labels"], self.model)
        loss = loss if share is None else loss * share
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with fast_products(model):
            return super().training_step(model, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        if self._compressed_rate != 1.0:
            inner: Any = self.model if model is None else model
            slower(made, compressed_parameters(inner), self._compressed_rate)
        return made

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Without biases, norms and factors, which mean nothing at zero."""
        spared = {id(p) for p in parts_of(model, ("biases", "norms"))}
        spared |= {id(layer.coefficients) for layer in adapter_layers(model).values()}
        spared |= {id(module.scale) for module in model.modules() if isinstance(module, Differing)}
        names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in spared}
        return [name for name in super().get_decay_parameter_names(model) if name not in names]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._group_lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GroupedSampler(self._group_lengths, batch, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        held = self._trained() or (state_dict if self.is_fsdp_enabled else None) or {}
        trained = {name: full_tensor(value).detach() for name, value in held.items()}  # of shards, all give theirs
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        if trained:  # the file of peft holds the adapter alone
            os.makedirs(folder, exist_ok=True)
            save_file(
                {name: value.clone().contiguous() for name, value in trained.items()}, os.path.join(folder, TRAINED)
            )
        if self.is_fsdp_enabled:  # save_pretrained reads the model itself
            return
        more: dict[str, Any] = {}
        if not hasattr(self.model, "peft_config"):
            # Names of older layouts, which save_pretrained prefers for some families, could not be loaded in place.
            more["save_original_format"] = False
        model: Any = self.model
        with no_bars():
            model.save_pretrained(folder, **more)

    def _trained(self) -> dict[str, torch.Tensor]:
        """What trains beside an adapter of peft and in it, by name; {} of other models."""
        model: Any = self.model
        if not hasattr(model, "peft_config"):
            return {}
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_trained(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_fsdp_enabled and checkpoint is not None:
            self._load_trained(checkpoint)  # torch made room for moments by a step, which layers that choose counted

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            super()._load_best_model()
        self._load_trained(self.state.best_model_checkpoint or "")

    def _load_trained(self, folder: str) -> None:
        """What trained beside an adapter of peft and in it; of a model in shards everything."""
        path = os.path.join(folder, TRAINED)
        if os.path.isfile(path):
            load_whole(self.model, load_file(path))  # type: ignore[arg-type]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights or buffers, but those that the family computes and never writes."""
        model: Any = self.model
        named = model.state_dict(keep_vars=True)
        absent = set(load_result.missing_keys)
        there = {id(value) for name, value in named.items() if name not in absent}
        computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # Marian's positions
        lost = sorted(n for n in absent - computed if n in named and id(named[n]) not in there)
        if lost or load_result.unexpected_keys:
            found = f"the names of its weights do not match ({(lost or load_result.unexpected_keys)[0]})"
            raise FfnkitError("resuming from a checkpoint", found, "Give the model that was trained, or another folder")


def confidence(logits: torch.Tensor, labels: torch.Tensor, model: Any) -> torch.Tensor:
    """How far the logits of the targets are above the mean logit, a mean over targets (scalar).

    Added to the cross entropy with a factor e, it gives that with labels smoothed by e: (1 - e) CE + e CE of the
    uniform distribution, for the normalizer is in both.

    Args:
        logits: (batch, classes) or (batch, tokens, words). labels: (batch,) or (batch, tokens), -100 where none counts.
    """
    if labels.ndim > 1 and not is_seq2seq(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels.ne(IGNORED)
    rows, wanted = logits[kept].float(), labels[kept]
    if not len(rows):
        return rows.sum()
    return (rows.gather(-1, wanted[:, None]).squeeze(-1) - rows.mean(-1)).mean()


def slower(optimizer: torch.optim.Optimizer, chosen: set[int], factor: float) -> None:
    """Let the chosen parameters of a fresh optimizer learn at ``factor`` times the rate, in groups of their own."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    parts = [(g, [p for p in g["params"] if (id(p) in chosen) is own], own) for own in (False, True) for g in groups]
    for group, parameters, own in parts:
        if parameters:
            rate = group["lr"] * factor if own else group["lr"]
            optimizer.add_param_group({**group, "params": parameters, "lr": rate})


class GroupedSampler(Sampler[int]):
    """Batches of similar lengths, shuffled anew each epoch from the seed and the number of the epoch alone.

    The library's own sampler draws from the global generator, so that its order would depend on dropout and could not
    be found again in the middle of an epoch.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths.tolist(), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        # it asks for a dataset beside the lengths, but takes no more than its size from either
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator))


class Saving(TrainerCallback):
    """Further checkpoints between evaluations, an evaluation at the last step, and a log entry at each checkpoint.

    The loss of the log is a mean since the entry before; a checkpoint in between would lose the first part of it.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        by_epoch = args.eval_strategy == IntervalStrategy.EPOCH
        if state.global_step >= state.max_steps and not by_epoch:
            control.should_evaluate = control.should_save = True
        # Saved before the evaluation that ends an epoch, a checkpoint would resume behind that evaluation.
        ends_epoch = by_epoch and (float(state.epoch).is_integer() or state.global_step >= state.max_steps)
        if self.every is not None and state.global_step % self.every == 0 and not ends_epoch:
            control.should_save = True
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


class Clock(TrainerCallback, ExportableState):
    """Seconds of training, over all the calls that a run took; it travels in the checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.step_seconds = 0.0
        self._since: float | None = None
        self._step_since = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds, self._since = self.total(), None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.step_seconds += time.perf_counter() - self._step_since

    def total(self) -> float:
        """Seconds until now, evaluation and saving included."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.total(), "step_seconds": self.step_seconds}}


class Snapshot(TrainerCallback):
    """Writes the weights after a step, in one piece."""

    def __init__(self, step: int, path: str | Path) -> None:
        self.step, self.path = step, Path(path)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step and state.is_world_process_zero:
            with replacing(self.path) as new:
                save_model(model, str(new))


class Epochs(TrainerCallback):
    """Tells a collator that augments which pass over the data it is in."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collate.epoch = int(state.epoch or 0)


class Telling(TrainerCallback):
    """Tells where the training is, with the last figures of its log."""

    def __init__(self, step: Step) -> None:
        self.step, self.what = step, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.step(state.global_step, state.max_steps, self.what)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = [f"{k.removeprefix('eval_')} {v:.4g}" for k, v in (logs or {}).items() if _shown(k, v)]
        self.what = ", ".join(shown[:2]) or self.what


def _shown(key: str, value: Any) -> bool:
    told = ("runtime", "per_second", "epoch", "flos", "learning_rate", "grad_norm")
    return isinstance(value, float) and not any(part in key for part in told)
