"""Shared FFNs through the Trainer: one copy in its checkpoints, tied again on resuming, one optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from methods import crossed
from safetensors import safe_open
from test_tied_lora import tied
from test_tune import assert_same, bert, fit, gpt2, killed_at, llama
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import ffnkit as fk
from ffnkit.methods.share.merging import Merging
from ffnkit.model.finding import ffns

STEPS, KILLED = 6, 4
NAMES = ["bert", "gpt2", "llama", "t5"]


class Stop(TrainerCallback):
    """Ends the run as a kill would, after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= KILLED


def trainer(name: str, model: nn.Module, out: Path, *callbacks: TrainerCallback) -> Trainer:
    inputs = FAMILIES[name].inputs(model)
    rows = {key: [value[i % len(value)].tolist() for i in range(24)] for key, value in inputs.items()}
    rows["labels"] = [i % 2 for i in range(24)] if name == "bert" else rows.get("decoder_input_ids", rows["input_ids"])
    arguments = TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2, report_to="none",
        disable_tqdm=True, use_cpu=True, save_total_limit=2, logging_strategy="no",
    )  # fmt: skip
    dataset: Any = Dataset.from_dict(rows)
    return Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=list(callbacks))


def shared_places(model: nn.Module) -> list[list[str]]:
    return [list(ffn.owners) for ffn in ffns(model)]


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_of_the_users_own_keeps_the_tie_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    whole = tied(name)
    places = shared_places(whole)
    trainer(name, whole, tmp_path / "whole").train()
    killed = tied(name)
    started = trainer(name, killed, tmp_path / "killed", Stop())
    started.train()
    assert started.optimizer is not None
    moments = [id(p) for group in started.optimizer.param_groups for p in group["params"]]
    assert len(moments) == len(set(moments)) == len(list(killed.parameters())) == len(started.optimizer.state)
    folder = tmp_path / "killed" / f"checkpoint-{KILLED}"
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        size = sum(file.get_tensor(key).numel() for key in stored)
    sites = {f"{o}.{f.path(s)}.weight" for f in ffns(killed) for o in f.tied for s in f.sites}
    assert sites and not stored & sites
    assert size == sum(p.numel() for p in killed.parameters())  # one copy, and embeddings that are tied once too
    resumed = tied(name)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    run = trainer(name, resumed, tmp_path / "killed")
    run.train(resume_from_checkpoint=str(folder))
    assert run.state.global_step == STEPS
    assert shared_places(run.model) == places and len(list(resumed.parameters())) == len(list(killed.parameters()))  # type: ignore[arg-type]
    assert_same(resumed, whole)
    opened = fk.load(tmp_path / "killed" / f"checkpoint-{STEPS}")
    assert shared_places(opened) == places
    assert_same(opened, whole)


def test_without_the_tie_a_checkpoint_holds_every_copy(tmp_path: Path) -> None:
    """The negative control: FFNs with equal weights that are not tied drift apart and are stored apart."""
    name = "llama"
    model = type(FAMILIES[name].model()).from_pretrained(_expanded(tmp_path))
    with torch.no_grad():
        model.model.layers[1].mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
    trainer(name, model, tmp_path / "out", Stop()).train()
    with safe_open(tmp_path / "out" / f"checkpoint-{KILLED}" / "model.safetensors", "pt") as file:
        first, second = (file.get_tensor(f"model.layers.{i}.mlp.up_proj.weight") for i in range(2))
    assert not torch.equal(first, second)


def _expanded(folder: Path) -> Path:
    fk.export(tied("llama"), folder / "expanded")
    return folder / "expanded"


@pytest.mark.parametrize(("build", "tuner"), crossed([bert, gpt2, llama], ["full", "lora"]))
def test_tuning_of_a_tied_model_resumes(
    build: Any, tuner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> Any:
        fresh = build()
        return fk.apply(fresh, fk.plan(fresh, Merging(layers="all", match=False)))

    more = {"eval_every": 4, "learning_rate": 0.01, "tuner": tuner}
    whole = fit(model(), tmp_path / "whole", **more)
    killed_at(6, monkeypatch, lambda: fit(model(), tmp_path / "killed", **more))
    again = fit(model(), tmp_path / "killed", **more)
    assert len(ffns(again.model)) == 1
    assert_same(again.model, whole.model)
    assert again.history == whole.history
