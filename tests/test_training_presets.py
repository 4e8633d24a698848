"""Presets of training by paper and model, and the dropout of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import FAMILIES
from test_cli import invoke
from test_tune import assert_same, bert, fit, killed_at, weights
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.recipe import shipped
from ffnkit.recipe.loading import load_recipe
from ffnkit.recipe.schema import recipe_from
from ffnkit.tune import TrainSettings
from ffnkit.tune.arguments import training_arguments
from ffnkit.tune.dropout import dropout_at
from ffnkit.tune.settings import Training
from ffnkit.tune.training import HARMLESS


@pytest.mark.parametrize("name", TrainSettings.presets)
def test_every_preset_is_whole(name: str, tmp_path: Path) -> None:
    assert set(get_args(Training)) == set(TrainSettings.presets)
    values = TrainSettings.presets[name].values
    made = TrainSettings(preset=name)  # type: ignore[arg-type]
    assert {key: getattr(made, key) for key in values} == dict(values)
    assert TrainSettings(preset=name, epochs=2, steps=None).epochs == 2  # type: ignore[arg-type]
    arguments = training_arguments(made, "accuracy", tmp_path, 0)
    assert arguments.learning_rate == values["learning_rate"]
    recipe = recipe_from({"name": "r", "model": "m", "task": "sst2", "tune": {"preset": name}, "arms": {"a": {}}})
    assert recipe.tune.batch_size == values["batch_size"] and recipe.tune.model_dump()["preset"] == name
    assert "preset" in HARMLESS and not {"preset", "dropout"} & set(TrainSettings().model_dump())


def test_the_rate_of_merging_falls_as_in_the_released_code() -> None:
    """Linear to 2% of the rate; by the square root, from step 10,000 on, without a warm-up."""
    from transformers import get_scheduler

    def rates(name: str, steps: int, at: list[int]) -> list[float]:
        s = TrainSettings(preset=name)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=s.learning_rate)
        options: Any = {"num_warmup_steps": 0, "num_training_steps": steps}
        schedule = get_scheduler(s.schedule, optimizer, **options, scheduler_specific_kwargs=dict(s.schedule_options))
        return [s.learning_rate * schedule.lr_lambdas[0](step) for step in at]

    vit = rates("ffn-merging-vit", 20000, [0, 5000, 20000, 30000])
    assert vit == pytest.approx([5e-5, 5e-5 * (0.75 * 0.98 + 0.02), 1e-6, 1e-6])
    opus = rates("ffn-merging-opus", 20000, [0, 10000, 30000])
    assert opus == pytest.approx([5e-5, 5e-5 / 2**0.5, 5e-5 / 2])


def test_at_the_command_line(tmp_path: Path) -> None:
    found = invoke("tune", "m", "--task", "sst2", "--set", "preset=papr", "--out", tmp_path / "out")
    assert found.exit_code == 2 and "mlp-fusion-glue" in found.output


def test_dropout_is_that_of_a_model_made_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {"steps": 6, "eval_every": 3, "learning_rate": 0.01}
    other = bert()
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
    wanted = fit(other, tmp_path / "wanted", **more)
    model = bert()
    shares = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    found = fit(model, tmp_path / "found", **more, dropout=0.4)
    assert_same(found.model, wanted.model)
    assert [m.p for m in found.model.modules() if isinstance(m, nn.Dropout)] == shares  # as it was
    plain = fit(bert(), tmp_path / "plain", **more)
    assert any(not torch.equal(v, weights(found.model)[n]) for n, v in plain.model.state_dict().items())
    killed_at(5, monkeypatch, lambda: fit(bert(), tmp_path / "killed", **more, dropout=0.4))
    assert_same(fit(bert(), tmp_path / "killed", **more, dropout=0.4).model, wanted.model)


@pytest.mark.parametrize("name", ["marian", "t5", "vit", "gpt2", "llama", "distilbert", "deberta-v2", "opt"])
def test_every_kind_of_dropout(name: str) -> None:
    """With a share of almost one nothing is left of what it acts on; afterwards all is as it was."""
    family = FAMILIES[name]
    model = family.model().train()
    inputs = family.inputs(model)
    with dropout_at(model, 0.0):
        first, second = (family.outputs(model, inputs) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first), "dropout 0 draws nothing"
    with dropout_at(model, 0.5):
        third = family.outputs(model, inputs)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    with pytest.raises(FfnkitError, match="has no dropout"), dropout_at(nn.Linear(2, 2), 0.5):
        pass


def test_recipes_name_presets_that_are_there() -> None:
    for path in shipped.FOLDER.rglob("*.yaml"):
        if "preset:" in path.read_text() and path.parent.name != "papers":
            load_recipe(path)
    assert json.dumps(TrainSettings(preset="mlp-fusion-switch").model_dump())


def test_a_plateau_is_that_of_the_metric(tmp_path: Path) -> None:
    """torch takes less for better unless it is told otherwise: a rising accuracy would have lowered the rate."""
    made = TrainSettings(schedule="reduce_lr_on_plateau", schedule_options={"patience": 0})
    for metric, mode in (("accuracy", "max"), ("loss", "min"), ("perplexity", "min"), ("bleu", "max")):
        assert training_arguments(made, metric, tmp_path, 0).lr_scheduler_kwargs == {"patience": 0, "mode": mode}
    wrong = TrainSettings(schedule="reduce_lr_on_plateau", schedule_options={"mode": "min"})
    assert training_arguments(wrong, "loss", tmp_path, 0)
    with pytest.raises(FfnkitError, match="mode=min: of accuracy more is better"):
        training_arguments(wrong, "accuracy", tmp_path, 0)


@pytest.mark.parametrize(
    ("schedule", "options", "fits"),
    [
        ("warmup_stable_decay", {}, False),
        ("warmup_stable_decay", {"num_decay_steps": 5}, True),
        ("cosine_with_min_lr", {}, False),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, True),
        ("polynomial", {"foo": 1}, False),
        ("polynomial", {"power": 2.0}, True),
        ("inverse_sqrt", {"timescale": 10}, True),
    ],
)
def test_options_of_schedules_are_tried_before_a_model_is(schedule: Any, options: Any, fits: bool) -> None:
    if fits:
        assert TrainSettings(schedule=schedule, schedule_options=options).schedule == schedule
        return
    with pytest.raises(ValueError, match=f"do not fit the schedule {schedule}"):
        TrainSettings(schedule=schedule, schedule_options=options)
