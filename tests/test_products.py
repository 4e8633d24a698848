"""Products of 16-bit numbers on a CPU that multiplies float32 faster: the same numbers, in a fraction of the time."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from families import FAMILIES
from family import WANTED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ffnkit as fk
from ffnkit.calibration.batches import eval_mode, evaluating
from ffnkit.calibration.latency import latency
from ffnkit.ops import local, products

ATEN = torch.ops.aten
MM = (ATEN.mm.default, ATEN.addmm.default, ATEN.linear.default)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units for 16-bit products, and no product too small to count."""
    monkeypatch.setattr(products, "is_slow", lambda dtype: dtype in products.NARROW)
    monkeypatch.setattr(local, "is_slow", products.is_slow)
    monkeypatch.setattr(products, "LEAST", 1)


class Seen(TorchDispatchMode):
    """Dtypes of the products that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MM:
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def gradient(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Gradients of all parameters, in one row."""
    model.zero_grad()
    with torch.enable_grad():
        found = model(**inputs)
        next(found[key] for key in WANTED if found.get(key) is not None).float().square().mean().backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", products.NARROW, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_outputs_are_as_near_to_the_true_ones(slow: None, name: str, dtype: torch.dtype) -> None:
    """Against the model in float64; what is rounded is rounded as before."""
    family = FAMILIES[name]
    model = family.model().to(dtype)
    exact = deepcopy(model).double()
    with torch.no_grad():
        try:
            plain = family.outputs(model, family.inputs(model))
        except RuntimeError as error:  # a family that does not run in this type
            pytest.skip(str(error)[:60])
        true = family.outputs(exact, family.inputs(exact))
        with products.fast_products(model):
            ours = family.outputs(model, family.inputs(model))
    for key, value in ours.items():
        assert value.dtype == plain[key].dtype and value.shape == plain[key].shape
        errors = [(each.double() - true[key]).norm() for each in (value, plain[key])]
        assert errors[0] <= 2 * errors[1] + 1e-3 * true[key].norm(), key


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "mixtral"])
def test_gradients_are_the_same_to_rounding(slow: None, name: str) -> None:
    family = FAMILIES[name]
    model = family.model().bfloat16()
    inputs = family.inputs(model)
    plain = gradient(model, inputs)
    with Seen() as seen, products.fast_products(model):
        ours = gradient(model, inputs)
    assert seen.dtypes == {torch.float32}, "forward and backward"
    assert (ours - plain).norm() <= 0.05 * plain.norm()


def test_nothing_is_changed_where_the_type_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    model = family.model().bfloat16()
    monkeypatch.setattr(products, "is_slow", lambda dtype: False)
    with Seen() as seen, products.fast_products(model), torch.no_grad():
        family.outputs(model, family.inputs(model))
    assert seen.dtypes == {torch.bfloat16}


def test_small_products_stay(slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their factors cost more to turn than the product costs: a word at a time is read in its own type."""
    monkeypatch.setattr(products, "LEAST", 64)
    left, right = torch.ones(63, 64).bfloat16(), torch.ones(64, 64).bfloat16()
    with Seen() as seen, products.fast_products(torch.nn.Linear(2, 2).bfloat16()):
        left @ right
        assert seen.dtypes == {torch.bfloat16}
        right @ right
    assert seen.dtypes == {torch.bfloat16, torch.float32}


def test_inference_mode_is_no_other(slow: None) -> None:
    """There a linear layer is one operation, not yet a product."""
    family = FAMILIES["llama"]
    model = family.model().bfloat16()
    with Seen() as seen, products.fast_products(model), torch.inference_mode():
        model(**family.inputs(model))
    assert seen.dtypes == {torch.float32}


def test_float32_is_never_slow() -> None:
    assert not products.is_slow(torch.float32)
    assert isinstance(products.is_slow(torch.bfloat16), bool)


@pytest.mark.parametrize(("mode", "expected"), [(evaluating, torch.float32), (eval_mode, torch.bfloat16)])
def test_passes_are_fast_and_what_is_timed_is_as_it_is(slow: None, mode: Any, expected: torch.dtype) -> None:
    family = FAMILIES["llama"]
    model = family.model().bfloat16()
    with Seen() as seen, mode(model), mode(model), torch.no_grad():
        family.outputs(model, family.inputs(model))
    assert seen.dtypes == {expected}


def test_latency_is_of_the_model_as_it_is(slow: None) -> None:
    family = FAMILIES["llama"]
    model = family.model().bfloat16()
    with Seen() as seen:
        latency(model, family.inputs(model), repeats=1, warmup=0)
    assert seen.dtypes == {torch.bfloat16}


def test_regression_multiplies_in_the_faster_type(slow: None) -> None:
    with Seen() as seen, local.multiplying(torch.device("cpu"), torch.bfloat16):
        torch.nn.functional.linear(torch.ones(4, 4), torch.ones(4, 4))
    assert seen.dtypes == {torch.float32}


@pytest.fixture
def batches() -> Iterator[list[dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(0)
    yield [{"input_ids": torch.randint(4, 99, (2, 16), generator=draw)} for _ in range(4)]


@pytest.mark.parametrize("method", [fk.CalibratedFusion(width=0.5), fk.Fusion(width=0.5, restarts=1)])
def test_plans_and_healing_go_through(slow: None, method: Any, batches: list[dict[str, Tensor]]) -> None:
    """Healing is in float32, and both models have their type afterwards, the original its bits."""
    family = FAMILIES["llama"]
    model, original = family.model().bfloat16(), family.model().bfloat16()
    bits = {name: value.clone() for name, value in original.state_dict().items()}
    fk.apply(model, fk.plan(model, method, data=batches if method.needs_data else None))
    with Seen() as seen:
        found = fk.heal(model, original, batches, tokens=256)
    assert found.steps and seen.dtypes == {torch.float32}
    assert {p.dtype for p in (*model.parameters(), *original.parameters())} == {torch.bfloat16}
    assert all(torch.equal(bits[name], value) for name, value in original.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_healing_takes_up_where_the_type_is_not_slow(
    monkeypatch: pytest.MonkeyPatch, batches: list[dict[str, Tensor]]
) -> None:
    monkeypatch.setattr(products, "is_slow", lambda dtype: False)
    family = FAMILIES["llama"]
    model, original = family.model().bfloat16(), family.model().bfloat16()
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    with Seen() as seen:
        fk.heal(model, original, batches, tokens=64)
    assert torch.bfloat16 in seen.dtypes


def test_a_model_has_its_type_again_whatever_happens(slow: None) -> None:
    """Shared weights stay shared, buffers come too, and an error on the way changes nothing."""
    model = FAMILIES["t5"].model().bfloat16()
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    same = {name: value.data_ptr() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), products.in_float32(model):
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
        raise ZeroDivisionError
    after = model.state_dict()
    assert all(value.dtype is bits[name].dtype and torch.equal(value, bits[name]) for name, value in after.items())
    together = [(a, b) for a in same for b in same if a < b and same[a] == same[b]]
    assert together and all(after[a].data_ptr() == after[b].data_ptr() for a, b in together)
