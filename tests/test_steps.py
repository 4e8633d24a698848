"""A step of training: what its loss is the mean over, what decays, and what a run in other processes finds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_tune import REGRESSION, TASK, WordTask, bert, fit, rows, settings
from tolerance import assert_close
from transformers import TrainingArguments

import ffnkit as fk
from ffnkit.methods.update.coefficients import with_coefficients
from ffnkit.nn.differing import Differing
from ffnkit.tune.arguments import training_arguments
from ffnkit.tune.loop import Loop

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class TwoScores(WordTask):
    """Labels of several numbers a text."""

    def encode(self, dataset: Dataset, *args: Any, **more: Any) -> Dataset:
        coded = super().encode(dataset, *args, **more)
        pairs = [[float(label), 1 - float(label)] for label in dataset["label"]]
        return Dataset.from_dict({**coded.remove_columns("labels").to_dict(), "labels": pairs})

    def compute_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"mse": 0.0}


ACCUMULATED = {
    "classes": (TASK, lambda: bert(**QUIET)),
    "numbers": (REGRESSION, lambda: bert(1, **QUIET)),
    "two numbers": (TwoScores("pairs", "regression", "mse", ("mse",)), lambda: bert(2, **QUIET, problem="regression")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCUMULATED)
@pytest.mark.parametrize("small", [8, 5])
def test_accumulation_is_a_larger_batch(kind: str, small: int, tmp_path: Path) -> None:
    """Micro-batches give the loss and the gradients of one batch, though the last of an epoch are short.

    Norms are logged before they are clipped. 44 rows: 16, 16, 12 = 8 + 4; or 15, 15, 14 = 5 + 5 + 4.
    """
    task, make = ACCUMULATED[kind]
    times = 16 // small
    common = {"epochs": 2, "logging_every": 1, "warmup": 0.0, "best_metric": "loss", "keep_best": False}
    one = fit(make(), tmp_path / "a", task, batch_size=small * times, **common)
    two = fit(make(), tmp_path / "b", task, batch_size=small, accumulation=times, **common)
    for figure in ("grad_norm", "loss"):
        whole, parts = (torch.tensor([entry[figure] for entry in result.losses]) for result in (one, two))
        assert len(whole) == 6
        assert_close(parts, whole, rel=2e-3, what=figure)


def test_weight_decay_leaves_factors_alone(tmp_path: Path) -> None:
    """At a rate that moves nothing but by decay: biases, norms and coefficients keep their values, weights do not."""
    model = bert()
    plan = with_coefficients(model, fk.plan(model, fk.DSEE(targets="ffn", rank=2, modules_to_train=("rest",))), l1=0.0)
    with torch.no_grad():
        for parameter in fk.apply(model, plan).parameters():
            parameter.copy_(torch.ones_like(parameter)) if parameter.is_floating_point() else None
    arguments = training_arguments(settings(weight_decay=0.5), "accuracy", tmp_path, 0)
    loop = Loop(model=model, args=arguments, train_dataset=rows(4, 0), eval_dataset=rows(4, 1))
    optimizer = loop.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kept = {name for name, p in model.named_parameters() if p.requires_grad and bool((p == 1).all())}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {name for name in trained if name.endswith(("bias", "coefficients")) or "LayerNorm" in name}
    assert kept == factors and len([name for name in kept if name.endswith("coefficients")]) == 4
    assert {name.rpartition(".")[2] for name in trained - kept} >= {"up", "down", "values", "weight"}


def test_weight_decay_leaves_factors_of_members_alone(tmp_path: Path) -> None:
    model = bert()
    batches = [{"input_ids": torch.arange(8).view(2, 4) + seed} for seed in range(4)]
    fk.apply(model, fk.plan(model, fk.CalibratedMerging(layers="0-1", extra_rank=1, refine=0), data=batches))
    arguments = training_arguments(settings(weight_decay=0.5), "accuracy", tmp_path, 0)
    loop = Loop(model=model, args=arguments, train_dataset=rows(4, 0), eval_dataset=rows(4, 1))
    names = loop.get_decay_parameter_names(model)
    own = [name for name, module in model.named_modules() if isinstance(module, Differing)]
    assert len(own) == 2
    for name in own:
        assert {n.rpartition(".")[2] for n in names if n.startswith(name)} == {"weight", "first", "second"}


# Several processes ---------------------------------------------------------------------------------------------------


def main(out: str) -> None:
    """One process of a run, which is stopped after its fourth step."""
    step = Loop.training_step

    def training_step(self: Any, *args: Any, **more: Any) -> Any:
        if self.state.global_step == 4:
            raise SystemExit(3)
        return step(self, *args, **more)

    Loop.training_step = training_step  # type: ignore[method-assign]
    fit(bert(**QUIET), Path(out), save_every=1)


def test_more_processes_do_not_go_on_from_the_checkpoints_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(bert(**QUIET), tmp_path, steps=1, keep_checkpoints=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(fk.FfnkitError, match="differs in processes"):
        fit(bert(**QUIET), tmp_path, steps=1)


@pytest.mark.slow
def test_a_run_does_not_go_on_in_another_number_of_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "out")]
    running = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in running] == [3, 3]
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    with pytest.raises(fk.FfnkitError, match="differs in processes"):
        fit(bert(**QUIET), tmp_path / "out", save_every=1)


if __name__ == "__main__":
    main(sys.argv[1])
