"""Weights that a family computes and writes into no file (Marian's positions): tuned, killed, resumed, compressed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_cli import invoke
from test_recipe_run import Killed as KilledRecipe
from test_recipe_run import outcome
from test_translation import marian, multi30k  # noqa: F401 (a fixture)
from test_tune import assert_same, killed_at
from transformers import TrainingArguments

import ffnkit as fk
from ffnkit import tasks, tune
from ffnkit.errors import FfnkitError
from ffnkit.recipe import run
from ffnkit.recipe.schema import recipe_from
from ffnkit.tune.loop import Loop, Saving

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")


def looped(model: Any, folder: Path) -> Loop:
    return Loop(model=model, args=TrainingArguments(str(folder), report_to="none", use_cpu=True))


def computing(name: str) -> Any:
    """A model of a family, and names of its weights that its files leave out."""
    model: Any = FAMILIES[name].model()
    if name == "gpt2":  # as a class of somebody else might declare it
        model._keys_to_ignore_on_save = {"transformer.wpe.weight"}
        model.transformer.wpe.weight.requires_grad_(False)
    assert model._keys_to_ignore_on_save
    return model


@pytest.mark.parametrize("name", ["marian", "gpt2"])
def test_checkpoints_without_them_go_back_and_no_others_do(name: str, tmp_path: Path) -> None:
    model = computing(name)
    loop = looped(model, tmp_path)
    loop._save(str(tmp_path / "checkpoint-1"))
    before = {n: value.clone() for n, value in model.state_dict().items()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n not in model._keys_to_ignore_on_save:
                p.add_(1.0)
    loop._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])] == []
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    stored = load_file(path)
    buffers = [n for n in stored if n == "final_logits_bias"]
    for lost in [n for n in stored if "fc" in n][:1] + buffers:
        save_file({n: v for n, v in stored.items() if n != lost}, path, {"format": "pt"})
        with pytest.raises(FfnkitError, match=re.escape(f"do not match ({lost})")):
            loop._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    save_file(stored, path, {"format": "pt"})
    model._keys_to_ignore_on_save = set()  # the negative control
    with pytest.raises(FfnkitError, match="do not match"):
        loop._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


def merged(folder: Path, data: Path) -> tuple[Any, Any, Any, Any]:
    """Marian with the FFNs of each stack made one, and what it is tuned on."""
    task: Any = tasks.get("multi30k")
    tokenizer = task.load_tokenizer(folder)
    tune.seed_everything(0)
    model = task.load_model(folder, tokenizer=tokenizer)
    fk.apply(model, fk.plan(model, fk.Merging(layers="all", match=False)))
    return model, tokenizer, task, task.splits(data, train_limit=6)


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_killed_recovery_ends_as_one_that_was_not(
    marian: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep_best: bool,
    tuner: str,
) -> None:
    data = multi30k(tmp_path)
    settings = tune.TrainSettings(
        learning_rate=1e-2, steps=4, batch_size=3, max_length=32, eval_every=2, keep_best=keep_best, best_metric="loss"
    )

    def fit(out: str) -> Any:
        return tune.train(*merged(marian, data), settings, tuner=tuner, out_dir=tmp_path / out, progress=False)

    whole = fit("whole")
    killed_at(4, monkeypatch, lambda: fit("killed"))
    again = fit("killed")
    assert_same(again.model, whole.model)
    assert again.history == whole.history
    fk.save(again.model, tmp_path / "compact")
    reloaded = dict(fk.load(tmp_path / "compact").state_dict())
    assert all(torch.equal(value, reloaded[name]) for name, value in again.model.state_dict().items())


@pytest.mark.slow
def test_the_command(marian: Path, tmp_path: Path) -> None:  # noqa: F811
    data = multi30k(tmp_path)
    result = invoke(
        "tune", marian, "--task", "multi30k", "--data-dir", data, "--steps", "2", "--batch-size", "3", "--max-length",
        "32", "--set", "eval_every=1", "--set", "best_metric=loss", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 2


def test_a_recipe_that_is_killed_within_tuning(
    marian: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FFNKIT_DATA", str(multi30k(tmp_path)))
    recipe = recipe_from(
        {
            "name": "marian", "model": str(marian), "task": "multi30k", "seeds": [0], "evaluate_before": True,
            "measure": {"latency": False}, "export": "both",
            "arms": {"merged": {"method": "merging", "layers": "all", "match": False}},
            "tune": {"learning_rate": 1e-2, "steps": 4, "batch_size": 3, "max_length": 32, "eval_every": 2},
        },
        "marian",
    )  # fmt: skip
    plain = run(recipe, tmp_path / "plain", progress=False, isolate=False)
    assert plain.ok, plain.rows
    step_end = Saving.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            raise KilledRecipe
        step_end(self, args, state, control, **more)

    with monkeypatch.context() as patch, pytest.raises(KilledRecipe):
        patch.setattr(Saving, "on_step_end", dying)
        run(recipe, tmp_path / "killed", progress=False, isolate=False)
    assert run(recipe, tmp_path / "killed", progress=False, isolate=False).ok
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "plain")
