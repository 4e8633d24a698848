"""What methods compute, against their formulas written down once more; by the public API alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors import safe_open
from tolerance import assert_close
from torch import Tensor

import ffnkit as fk
from ffnkit import methods


def compressed(name: str, method: Any) -> Any:
    model: Any = FAMILIES[name].model()
    return fk.fold(fk.apply(model, fk.plan(model, method)))


def weights(name: str, model: Any) -> list[dict[str, Tensor]]:
    """up (ff, d), down (d, ff) and gate of each layer."""
    if name == "bert":
        pairs = [(layer.intermediate.dense, layer.output.dense) for layer in model.bert.encoder.layer]
        return [{"up": up.weight.detach(), "down": down.weight.detach()} for up, down in pairs]
    parts = ((layer.mlp, ("up", "down", "gate")) for layer in model.model.layers)
    return [{part: getattr(mlp, f"{part}_proj").weight.detach() for part in names} for mlp, names in parts]


def sizes(one: dict[str, Tensor]) -> Tensor:
    product = one["up"].norm(dim=1) * one["down"].norm(dim=0)
    return product * one["gate"].norm(dim=1) if "gate" in one else product


def test_svd_is_the_best_of_its_rank() -> None:
    before = weights("bert", FAMILIES["bert"].model())
    for old, new in zip(before, weights("bert", compressed("bert", methods.build("svd", width=0.5))), strict=True):
        for part in ("up", "down"):
            u, s, vt = torch.linalg.svd(old[part].double(), full_matrices=False)
            rank = int(torch.linalg.matrix_rank(new[part].double(), rtol=1e-5))
            assert 0 < rank < len(s)
            assert_close(new[part], (u[:, :rank] * s[:rank]) @ vt[:rank], rel=1e-5, what=part)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_magnitude_keeps_the_largest_neurons_as_they_are(name: str) -> None:
    before = weights(name, FAMILIES[name].model())
    for old, new in zip(before, weights(name, compressed(name, methods.build("magnitude", width=7))), strict=True):
        kept = sizes(old).argsort(descending=True)[:7].sort().values
        for part, value in old.items():
            assert torch.equal(new[part], value[:, kept] if part == "down" else value[kept]), part


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mmd_without_steps_is_some_neurons_with_the_root_on_both_sides(name: str) -> None:
    before = weights(name, FAMILIES[name].model())
    after = weights(name, compressed(name, methods.build("mmd", width=0.25, steps=0)))
    for old, new in zip(before, after, strict=True):
        root = (len(old["up"]) / len(new["up"])) ** 0.5
        assert root == 2
        own = old["up"].norm(dim=1) * old["down"].norm(dim=0)  # a gated neuron's own scale is free
        for size in new["up"].norm(dim=1) * new["down"].norm(dim=0):
            assert float((own * root**2 / size - 1).abs().min()) < 1e-5


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_sketch_keeps_squares_in_expectation(name: str) -> None:
    before = weights(name, FAMILIES[name].model())[0]
    draws = [
        weights(name, compressed(name, methods.build("sketch", width=0.5, seed=s, layers="0")))[0] for s in range(30)
    ]
    for part, value in before.items():
        mean = torch.stack([draw[part].square().sum() for draw in draws]).mean()
        assert 0.8 < float(mean / value.square().sum()) < 1.25, part


def test_heads_by_activation_lose_what_is_written_down() -> None:
    model: Any = FAMILIES["llama"].model()
    inputs = FAMILIES["llama"].inputs(model)
    seen: list[Tensor] = []
    outputs = [layer.self_attn.o_proj for layer in model.model.layers]
    hooks = [linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for linear in outputs]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    plan = fk.plan(model, fk.RemoveHeads(remove=1, by="activation"), data=[inputs])
    mask = inputs["attention_mask"].flatten().bool()
    for linear, x, lost in zip(outputs, seen, plan.quantities.values(), strict=True):
        tokens = x.reshape(-1, x.shape[-1])[mask].double()
        rms = tokens.view(len(tokens), 2, -1).square().sum(-1).mean(0).sqrt()  # two groups of heads
        scores = rms * linear.weight.detach().double().T.reshape(2, -1).norm(dim=1)
        assert lost["score lost"] == pytest.approx(float(scores.min() / scores.sum()), rel=1e-5)


def test_what_a_refresh_settled_stays() -> None:
    """A step changes the entries that are chosen then, and no other, however often they are chosen anew."""
    family = FAMILIES["bert"]
    model: Any = family.model()
    data = [{**family.inputs(model, seed=seed), "labels": torch.tensor([seed % 3, 1])} for seed in range(6)]
    method = fk.SparseGrad(count=6, basis="none", selection="refresh", every=1, batches=1, layers="0")
    fk.apply(model, fk.plan(model, method, data=data))
    optimizer = torch.optim.SGD(fk.trainable_parameters(model), lr=0.1)
    linear = model.bert.encoder.layer[0].intermediate.dense
    start = before = linear.weight.detach().clone()
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = linear.weight.detach().clone()
        assert 0 < int((after != before).sum()) <= 6
        before = after
    assert int((before != start).sum()) > 6, "the control: others were chosen"


def test_planning_leaves_gradients_as_they_were() -> None:
    family = FAMILIES["bert"]
    model: Any = family.model()
    batch = {**family.inputs(model), "labels": torch.tensor([0, 1])}
    model(**batch).loss.backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fk.plan(model, fk.SparseGrad(density=0.05, batches=1), data=[batch])
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert now.keys() == kept.keys() and all(torch.equal(now[name], value) for name, value in kept.items())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral"])
def test_frozen_weights_are_frozen_when_they_are_narrower(name: str) -> None:
    model: Any = FAMILIES[name].model()
    model.requires_grad_(False)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    assert not fk.trainable_parameters(model)
    fk.fold(model)
    assert not fk.trainable_parameters(model)


def test_a_saved_model_holds_no_parts_of_its_updates(tmp_path: Path) -> None:
    model: Any = FAMILIES["bert"].model()
    names = set(model.state_dict())
    fk.apply(model, fk.plan(model, fk.DSEE(rank=2, nonzeros=3)))
    fk.save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) <= names


def test_lora_is_scaled_by_alpha_over_rank() -> None:
    from ffnkit import tune

    model: Any = FAMILIES["bert"].model()
    before = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    tuner = tune.get({"name": "lora", "rank": 2, "alpha": 5})
    tuned: Any = tuner.prepare(model)
    state = {}
    for name, parameter in tuned.named_parameters():
        if "layer.0.output.dense.lora_" in name and "attention" not in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(state)))
            state[name.split(".lora_")[1][0]] = parameter.detach().clone()
    plain: Any = tuner.finish(tuned)
    after = plain.bert.encoder.layer[0].output.dense.weight
    assert_close(after - before, 5 / 2 * state["B"] @ state["A"], rel=1e-5)


def test_adam_gets_its_own_factors(tmp_path: Path) -> None:
    from ffnkit.tune import TrainSettings
    from ffnkit.tune.arguments import training_arguments

    settings = TrainSettings(betas=(0.8, 0.95), eps=1e-7, weight_decay=0.03, learning_rate=2e-4)
    found = training_arguments(settings, "accuracy", tmp_path, 3)
    assert (found.adam_beta1, found.adam_beta2, found.adam_epsilon) == (0.8, 0.95, 1e-7)
    assert (found.weight_decay, found.learning_rate, found.seed, found.data_seed) == (0.03, 2e-4, 3, 3)


def test_losses_of_batches_are_weighed_by_their_labels() -> None:
    from ffnkit.report.sparsity import merge_costs

    family = FAMILIES["bert"]
    model: Any = family.model()
    inputs, labels = family.inputs(model), torch.tensor([0, 2])
    one = {**{key: value[:1] for key, value in inputs.items()}, "labels": labels[:1]}
    both = {**inputs, "labels": labels}
    fk.apply(model, fk.plan(model, fk.DSEE(rank=2, nonzeros=3)))
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in (one, both)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert merge_costs(model, [one, both]).apart == pytest.approx((losses[0] + 2 * losses[1]) / 3, rel=1e-5)


def test_a_head_that_was_read_counts_as_no_drawn_one(tmp_path: Path) -> None:
    import transformers

    from ffnkit.io.loading import newly_initialized

    model: Any = FAMILIES["bert"].model()
    model.save_pretrained(tmp_path / "whole")
    model.bert.save_pretrained(tmp_path / "body")
    config = {"architectures": ["BertForSequenceClassification"], "num_labels": 3}
    assert newly_initialized(fk.load(tmp_path / "whole")) == ()
    opened = transformers.AutoConfig.from_pretrained(tmp_path / "body", **config)
    assert newly_initialized(fk.load(tmp_path / "body", config=opened)) == ("classifier.weight", "classifier.bias")


def test_clustering_puts_the_root_of_the_size_on_both_sides() -> None:
    before = weights("bert", FAMILIES["bert"].model())
    after = weights("bert", compressed("bert", methods.build("clustering", width=1)))
    for old, new in zip(before, after, strict=True):
        root = len(old["up"]) ** 0.5
        assert_close(new["up"][0], root * old["up"].mean(0), rel=1e-5, what="up")
        assert_close(new["down"][:, 0], root * old["down"].mean(1), rel=1e-5, what="down")
