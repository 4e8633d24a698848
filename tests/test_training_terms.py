"""Terms of a training: smoothed labels, a rate of its own for what was compressed, the head among what trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES
from pydantic import ValidationError
from test_recipe_run import recipe_of, tiny
from test_recipe_run import run as run_tiny
from test_tune import REGRESSION, TASK, assert_same, bert, fit, killed_at
from torch.nn import functional as F

import ffnkit as fk
from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.model.trainable import head_parameters
from ffnkit.surgery.compressed import compressed_parameters, mark
from ffnkit.tune import TrainSettings, tuners
from ffnkit.tune.loop import Loop, confidence, slower

STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}

# --- label smoothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two", [False, True], ids=["decoder", "encoder-decoder"])
def test_smoothing_is_that_of_the_cross_entropy(two: bool) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    labels[0, :3] = -100
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=two))
    cut, right = (logits, labels) if two else (logits[:, :-1], labels[:, 1:])
    plain, wanted = (F.cross_entropy(cut.flatten(0, 1), right.flatten(), label_smoothing=e) for e in (0.0, 0.3))
    found = plain + 0.3 * confidence(logits, labels, model)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found, LabelSmoother(0.3)({"logits": logits}, labels, shift_labels=not two))
    assert abs(float(found - plain)) > 0.01
    one, classes = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    whole = F.cross_entropy(one, classes) + 0.1 * confidence(one, classes, model)
    torch.testing.assert_close(whole, F.cross_entropy(one, classes, label_smoothing=0.1))
    assert float(confidence(logits, torch.full_like(labels, -100), model)) == 0


def test_a_training_smooths_labels_and_its_evaluation_does_not(tmp_path: Path, monkeypatch: Any) -> None:
    seen = []
    inner = Loop.compute_loss

    def watched(self: Loop, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = inner(self, model, inputs, *args, **kwargs)
        with torch.no_grad():
            logits = model(**inputs).logits
        seen.append((float(loss.detach()), logits, inputs["labels"]))
        return loss

    monkeypatch.setattr(Loop, "compute_loss", watched)
    more = {"steps": 2, "eval_every": 2}
    result = fit(bert(**STILL), tmp_path / "smooth", label_smoothing=0.2, **more)
    for loss, logits, labels in seen:
        assert loss == pytest.approx(float(F.cross_entropy(logits, labels, label_smoothing=0.2)), rel=1e-5)
        assert loss != pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-3)
    plain = fit(bert(**STILL), tmp_path / "plain", **more)
    weights = [dict(each.model.named_parameters())["classifier.weight"] for each in (result, plain)]
    assert not torch.equal(*weights)
    with pytest.raises(FfnkitError, match=r"label_smoothing 0.2: task words-regression asks for a number"):
        fit(bert(num_labels=1), tmp_path / "r", task=REGRESSION, label_smoothing=0.2, **more)


# --- rates ------------------------------------------------------------------------------------------------------------


def test_what_was_compressed_is_known_by_the_plan_and_by_the_file(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model: Any = family.model()
    assert compressed_parameters(model) == set()
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="last:1")))

    def names(of: Any) -> set[str]:
        chosen = compressed_parameters(of)
        return {name for name, p in of.named_parameters() if id(p) in chosen}

    wanted = {n for n, _ in model.named_parameters() if n.startswith("bert.encoder.layer.2.") and "attention" not in n}
    wanted = {n for n in wanted if "LayerNorm" not in n}
    assert wanted and names(model) == wanted  # two weights and two biases, and no norm
    fk.save(model, tmp_path / "compact")
    assert names(fk.load(tmp_path / "compact")) == wanted
    fk.fold(model)
    assert names(model) == wanted
    tuned = tuners.prepare(model, {"name": "lora", "rank": 2})
    adapters = {n for n, p in tuned.named_parameters() if id(p) in compressed_parameters(tuned) and "lora_" in n}
    assert adapters and all(".layer.2." in n for n in adapters)
    whole: Any = family.model()  # one width for all: the plan tells, a file does not, and what knows may say it
    fk.apply(whole, fk.plan(whole, methods.build("magnitude", width=0.5, layers="all")))
    assert len(names(whole)) == 3 * len(wanted)
    fk.save(whole, tmp_path / "narrow")
    opened: Any = fk.load(tmp_path / "narrow")
    assert names(opened) == set()
    mark(opened, ["bert.encoder.layer.0"])
    assert names(opened) and all(".layer.0." in n for n in names(opened))


def test_heads_and_masks_count_and_updates_do_not() -> None:
    family = FAMILIES["bert"]
    model: Any = family.model()
    fk.apply(model, fk.plan(model, fk.DSEE(rank=2, nonzeros=4, targets="ffn")))
    assert compressed_parameters(model) == set()
    model = family.model()
    fk.apply(model, fk.plan(model, fk.RemoveHeads(remove=1, by="weight")))
    chosen = compressed_parameters(model)
    found = {n for n, p in model.named_parameters() if id(p) in chosen}
    assert found and all("attention" in n for n in found)


def test_groups_of_their_own_learn_slower() -> None:
    first, second, third = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [first, second], "weight_decay": 0.1}, {"params": [third], "weight_decay": 0.0}]
    made = torch.optim.AdamW(groups, lr=0.5)
    slower(made, {id(second), id(third)}, 0.1)
    assert [(g["lr"], g["weight_decay"], g["params"]) for g in made.param_groups] == [
        (0.5, 0.1, [first]),
        (0.05, 0.1, [second]),
        (0.05, 0.0, [third]),
    ]


def test_a_training_moves_what_was_compressed_by_a_share_of_the_step(tmp_path: Path) -> None:
    def moved(**settings: Any) -> dict[str, torch.Tensor]:
        model: Any = bert(**STILL)
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="last:1")))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        more: dict[str, Any] = {"steps": 1, "eval_every": 1, "schedule": "constant", "warmup": 0, "optimizer": "sgd"}
        more |= {"learning_rate": 1.0}
        done = fit(model, tmp_path / str(len(settings)), **more, **settings).model
        return {name: p.detach() - before[name] for name, p in done.named_parameters()}

    whole, part = moved(), moved(compressed_rate_factor=0.25)
    slow = [n for n in whole if ".layer.1." in n and "attention" not in n and "LayerNorm" not in n]
    assert slow
    for name, step in whole.items():
        torch.testing.assert_close(part[name], step * (0.25 if name in slow else 1.0), rtol=1e-3, atol=1e-6)
    assert all(float(whole[name].abs().max()) > 0 for name in slow)


@pytest.mark.slow
def test_a_kill_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: Path) -> Any:
        model: Any = bert()
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, layers="last:1")))
        return fit(model, out, steps=6, eval_every=2, compressed_rate_factor=0.25, label_smoothing=0.1).model

    killed_at(5, monkeypatch, lambda: run(tmp_path / "killed"))
    assert_same(run(tmp_path / "killed"), run(tmp_path / "whole"))


def test_a_factor_that_nothing_learns_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FfnkitError, match=r"compressed_rate_factor 0.5: nothing in the \w+ is known to be compressed"):
        fit(bert(), tmp_path / "out", steps=1, compressed_rate_factor=0.5)
    assert "label_smoothing" not in TrainSettings().model_dump()  # facts about older runs stay what they were
    assert TrainSettings(label_smoothing=0.1, compressed_rate_factor=2).model_dump()["compressed_rate_factor"] == 2
    for wrong in ({"label_smoothing": 1.0}, {"compressed_rate_factor": 0}):
        with pytest.raises(ValidationError):
            TrainSettings(**wrong)


def test_a_recipe_s_factor_is_for_its_compressed_arms(tmp_path: Path) -> None:
    tune = {"learning_rate": 3e-3, "steps": 2, "batch_size": 8, "max_length": 16, "compressed_rate_factor": 0.5}
    changes = {"stages": ["compress", "tune", "evaluate"], "export": "none", "measure": {"latency": False}}
    recipe = recipe_of(tiny(tmp_path), **changes, tune=tune | {"label_smoothing": 0.1})
    results = run_tiny(recipe, tmp_path / "out")
    assert results.ok, results.failed


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["modules_to_train", "also"])
@pytest.mark.parametrize("name", ["sparsegrad", "dsee", "mask", "lora", "ffn", "head"])
def test_the_head_may_be_named_among_what_trains(name: str, word: str, tmp_path: Path) -> None:
    extra = {"dsee": {"targets": "ffn"}, "mask": {"choose": "magnitude"}, "sparsegrad": {"choose": "magnitude"}}
    tuner = {"name": name, word: ["head", "norms"], **extra.get(name, {})}
    with pytest.warns(FutureWarning) if word == "also" else _quiet():
        built = recipe_of(tmp_path, arms={"whole": {"tuner": tuner}}, stages=["tune"]).tuner_of("whole").model_dump()
    assert built["modules_to_train"] == ["head", "norms"]
    family = FAMILIES["bert"]

    def trained(**given: Any) -> set[str]:
        model: Any = family.model()
        data = [{**family.inputs(model), "labels": torch.zeros(2, dtype=torch.long)}] if name == "sparsegrad" else None
        tuned = tuners.prepare(model, {**built, **given}, data)
        return {n for n, p in tuned.named_parameters() if p.requires_grad}

    assert trained() == trained(modules_to_train=["norms"])
    assert trained() - trained(modules_to_train=["norms"], head=False)  # the control: without the head less trains
    with pytest.raises(FfnkitError, match="modules_to_train names the head, and head is false"):
        recipe_of(tmp_path, arms={"whole": {"tuner": {"name": name, "head": False, "modules_to_train": ["head"]}}})


def _quiet() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_an_adapter_in_peft_s_form_holds_the_head(tmp_path: Path) -> None:
    model: Any = FAMILIES["bert"].model()
    tuner = {"name": "lora", "modules_to_train": ["head"], "adapter_dir": tmp_path / "adapter"}
    tuned = tuners.prepare(model, tuner)
    assert any("modules_to_save" in n for n, p in tuned.named_parameters() if p.requires_grad)
    plain = tuners.finish(tuned, tuner)
    assert (tmp_path / "adapter").is_dir() and head_parameters(plain) and TASK.name
