"""Selection "step": as many entries as asked for move in a step, by torch's SparseAdam, under whatever optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_sparsegrad import batches, layer
from test_tune import bert, fit
from tolerance import assert_close
from torch import Tensor, nn
from torch.optim import SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.nn.selecting import largest
from ffnkit.nn.sparsegrad import SparseGradLinear

FAMILY_NAMES = ("bert", "gpt2", "llama", "t5", "vit", "albert")
RATE = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3}


def stepping(name: str, tied: bool = False, **more: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A float64 model with updates that are chosen at every step, and its batches."""
    model = FAMILIES[name].model().double()
    data = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches(name, model, 3)]
    if tied:
        fk.apply(model, fk.plan(model, fk.Merging(layers="all", match=False)))
    method = fk.SparseGrad(
        **{"selection": "step", "count": 5, "batches": 2, "modules_to_train": ["head", "norms"]} | more
    )
    fk.apply(model, fk.plan(model, method, data=data)).eval()
    return model, data


def layers_of(model: Any) -> list[SparseGradLinear]:
    return [each for each in adapter_layers(model).values() if isinstance(each, SparseGradLinear)]


class ByHand:
    """SparseAdam on the chosen entries and AdamW on the rest, as two optimizers of torch, on a copy of the model."""

    def __init__(self, model: Any, together: bool) -> None:
        self.model, self.together = copy.deepcopy(model), together
        self.layers = layers_of(self.model)
        self.counts = [each.count for each in self.layers]
        for each in self.layers:
            each.selection = "fixed"  # nothing is done for it around a step
        own = {id(each.values) for each in self.layers}
        rest = [p for p in fk.trainable_parameters(self.model) if id(p) not in own]
        self.sparse = SparseAdam([each.values for each in self.layers], **RATE)
        self.dense = torch.optim.AdamW(rest, **RATE)

    def step(self, batch: dict[str, Any], rate: float) -> None:
        self.model(**batch).loss.backward()
        grads = [each.values.grad for each in self.layers]
        groups = [list(range(len(grads)))] if self.together else [[number] for number in range(len(grads))]
        for group in groups:
            masks = largest([grads[n] for n in group], sum(self.counts[n] for n in group))
            for number, mask in zip(group, masks, strict=True):
                self.layers[number].values.grad = (grads[number] * mask).to_sparse()
        for optimizer in (self.sparse, self.dense):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((family, {}) for family in FAMILY_NAMES),
        ("bert", {"by": "all"}),
        ("llama", {"tied": True}),
        ("bert", {"basis": "none"}),
    ],
    ids=str,
)
def test_the_trajectory_is_that_of_sparse_adam(name: str, how: dict[str, Any]) -> None:
    model, data = stepping(name, **how)
    wanted = ByHand(model, together=how.get("by") == "all")
    optimizer = torch.optim.AdamW(fk.trainable_parameters(model), **RATE)
    mine, counts = layers_of(model), wanted.counts
    assert mine and all(each.values.numel() > 2 * count for each, count in zip(mine, counts, strict=True))
    for number in range(12):
        rate = 0.01 * (0.5 + number % 3)  # a schedule's
        optimizer.param_groups[0]["lr"] = rate
        before = [each.values.detach().clone() for each in mine]
        model(**data[number % len(data)]).loss.backward()
        given = [each.values.grad for each in mine]
        reached = [int((each.values.grad != 0).sum()) for each in mine]
        optimizer.step()
        assert all(a.values.grad is b for a, b in zip(mine, given, strict=True)), "the gradient is as it was"
        optimizer.zero_grad()
        wanted.step(data[number % len(data)], rate)
        moved = [int((each.values != old).sum()) for each, old in zip(mine, before, strict=True)]
        if how.get("by") == "all":
            assert sum(moved) == sum(counts)
        else:
            assert moved == [min(pair) for pair in zip(counts, reached, strict=True)]
    for each, other in zip(mine, wanted.layers, strict=True):
        assert_close(each.values, other.values, rel=1e-10)
    for (key, value), other in zip(model.named_parameters(), wanted.model.parameters(), strict=True):
        assert_close(value, other, rel=1e-10, what=key)


def test_under_a_masked_gradient_entries_once_chosen_move_on() -> None:
    """The control, and what the setting says: an optimizer goes over the whole core."""
    model, data = stepping("bert", selection="masked-gradient")
    optimizer = torch.optim.AdamW(fk.trainable_parameters(model), lr=0.01, weight_decay=0.0)
    mine = layers_of(model)
    most = [0] * len(mine)
    for number in range(6):
        before = [each.values.detach().clone() for each in mine]
        model(**data[number % len(data)]).loss.backward()
        optimizer.step()
        assert all(int((each.values.grad != 0).sum()) <= each.count for each in mine)
        optimizer.zero_grad()
        moved = [int((each.values != old).sum()) for each, old in zip(mine, before, strict=True)]
        most = [max(pair) for pair in zip(most, moved, strict=True)]
    assert max(most) > max(each.count for each in mine)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda given: torch.optim.SGD(given, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda given: torch.optim.Adagrad(given, lr=0.01),  # has a state before its first step
    "fused": lambda given: torch.optim.AdamW(given, lr=torch.tensor(0.01), fused=True),
    "warm-up": lambda given: torch.optim.AdamW(given, lr=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_under_any_optimizer_and_after_its_state_was_saved(name: str) -> None:
    made, *_ = layer(index=None, selection="step", count=4)
    optimizer = OPTIMIZERS[name]([made.values])
    plain = torch.zeros(6, 5, dtype=torch.float64)
    reference = SparseAdam([plain], lr=0.01)
    given = optimizer.param_groups[0]
    reference.param_groups[0].update(lr=float(given["lr"]), eps=given.get("eps", 1e-8))
    draw = torch.Generator().manual_seed(0)
    for number in range(8):
        grad = torch.randn(6, 5, generator=draw, dtype=torch.float64)
        if number == 4:  # an optimizer of a run that goes on
            kept = copy.deepcopy(optimizer.state_dict())
            optimizer = OPTIMIZERS[name]([made.values])
            optimizer.load_state_dict(kept)
        made.values.grad = grad.clone()
        optimizer.step()
        plain.grad = (grad * largest([grad], 4)[0]).to_sparse()
        reference.step()
        assert torch.equal(made.values, plain), number


def test_scaled_gradients_of_fused_optimizers_are_unscaled() -> None:
    made, *_ = layer(index=None, selection="step", count=4)
    optimizer = torch.optim.SGD([made.values], lr=0.01, fused=True)
    twin = copy.deepcopy(made)
    grad = torch.randn(6, 5, dtype=torch.float64) * 1e-8  # so that eps counts
    made.values.grad = grad * 1024
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    twin.values.grad = grad.clone()
    torch.optim.SGD([twin.values], lr=0.01).step()
    assert_close(made.values, twin.values, rel=1e-6)
    assert bool(made.values.any())


@pytest.mark.parametrize("selection", ["step", "masked-gradient", "refresh", "fixed"])
def test_a_step_that_a_fused_optimizer_leaves_out_is_none(selection: str) -> None:
    """First, between others and last: as if it had not been, moments and counts included; gradients stay."""
    ends = []
    for left_out in ((), (0, 2, 4)):
        torch.manual_seed(0)
        index = None if selection in ("step", "masked-gradient") else torch.arange(4, dtype=torch.int32)
        made = SparseGradLinear(nn.Linear(4, 6), index=index, selection=selection, count=4, every=1)
        made.use_coefficients(torch.ones(4), 0.5)
        trained = [made.values, made.coefficients]
        optimizer: Any = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, fused=True)
        draw = torch.Generator().manual_seed(0)
        for number in range(2 + len(left_out)):
            skipped = number in left_out
            x = torch.full((3, 4), float("inf")) if skipped else torch.randn(3, 4, generator=draw)
            optimizer.zero_grad()
            made(x).square().sum().backward()
            before = {name: value.clone() for name, value in made.state_dict().items()}
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(skipped))
            optimizer.step()
            assert all(p.grad is not None for p in trained)
            same = all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
            assert same == skipped, number
        ends.append(made.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_an_optimizer_without_a_rate_is_refused() -> None:
    made, *_ = layer(index=None, selection="step", count=4)
    optimizer = torch.optim.SGD([made.values], lr=0.01)
    optimizer.param_groups[0]["lr"] = None  # as Adafactor has it
    made.values.grad = torch.ones(6, 5, dtype=torch.float64)
    with pytest.raises(FfnkitError, match="no learning rate"):
        optimizer.step()


@contextmanager
def counted() -> Iterator[list[list[int]]]:
    """How many entries of each update moved, in each step of any optimizer, and of how many that train."""
    steps: list[list[int]] = []
    before: dict[int, Tensor] = {}

    def held(optimizer: Any) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"] if p.ndim == 2]

    def last(optimizer: Any, *_: Any) -> None:
        if not isinstance(optimizer, SparseAdam):
            steps.append([int((p != before.get(id(p), torch.zeros_like(p))).sum()) for p in held(optimizer)])
            before.update({id(p): p.detach().clone() for p in held(optimizer)})

    handle = register_optimizer_step_post_hook(last)
    try:
        yield steps
    finally:
        handle.remove()


@pytest.mark.parametrize("more", [{}, {"accumulation": 2, "batch_size": 4}, {"precision": "bf16"}], ids=str)
def test_in_training_count_entries_move_in_a_step(more: dict[str, Any], tmp_path: Path) -> None:
    tuner = {"name": "sparsegrad", "selection": "step", "count": 7, "head": False, "batches": 2}
    with counted() as steps:
        result = fit(bert(), tmp_path, steps=6, learning_rate=0.01, warmup=0, weight_decay=0.1, tuner=tuner, **more)
    assert len(steps) == 6 and all(moved == 7 for step in steps for moved in step)
    assert result.trainable_parameters > 2 * 7 * len(steps[0])


def test_the_paper_is_named_where_its_step_is() -> None:
    doc = inspect.getdoc(fk.SparseGrad) or ""
    assert 'selection "step"' in doc and "masked-gradient" in doc


def test_the_papers_preset_trains_the_rest_and_steps_on_one_percent(tmp_path: Path) -> None:
    tuner = {"name": "sparsegrad", "preset": "paper"}
    model = bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit(model, tmp_path, steps=2, learning_rate=0.01, warmup=0, tuner=tuner)
    still = [name for name, p in result.model.named_parameters() if torch.equal(p, before[name])]
    assert still == [], "norms, attention and embeddings train too"
    whole = sum(p.numel() for p in model.parameters())
    ffn = [
        p.numel()
        for name, p in model.named_parameters()
        if name.endswith(("intermediate.dense.weight", "output.dense.weight")) and "attention" not in name
    ]
    assert result.trainable_parameters == whole
    assert result.updated_parameters == whole - sum(count - round(0.01 * count) for count in ffn)
