"""FFNs that are dead, constant or out of reach: every method makes a plan of finite numbers, and a model of finite
outputs."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import EVERY, REFUSED, case_of
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as Switch

import ffnkit as fk
from ffnkit.edits import FactorLinear, KeepOwn, ReplaceLinear, ReplaceNeurons, Rescale
from ffnkit.errors import FfnkitError
from ffnkit.methods.narrow import mmd
from ffnkit.model.finding import ffns
from ffnkit.ops.neurons import Neurons


def variants(name: str) -> Iterator[tuple[str, Any]]:
    """A method in its usual settings, and with every other value of each setting that names one of a few."""
    usual = EVERY[name]()
    yield name, usual
    if name == "combined":
        return
    for setting, hint in typing.get_type_hints(type(usual), include_extras=True).items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else None
        values = (True, False) if kind is bool else typing.get_args(kind) if str(kind).startswith("typing.Lit") else ()
        for value in values:
            if getattr(usual, setting) != value:
                yield f"{name} {setting}={value}", dataclasses.replace(usual, **{setting: value})


@torch.no_grad()
def kill(model: nn.Module, how: str) -> None:
    """The first FFN: nothing but zeros, no second linear, or neurons that are all alike; or all of the model."""
    if how == "a model of zeros":
        for parameter in model.parameters():
            parameter.zero_()
        return
    ffn = ffns(model)[0]
    ffn.write(dataclasses.replace(ffn.read(), **changed(ffn.read(), how)))


def changed(neurons: Neurons, how: str) -> dict[str, Tensor]:
    tensors = {f.name: v for f in dataclasses.fields(neurons) if isinstance(v := getattr(neurons, f.name), Tensor)}
    if how == "dead":
        return {name: torch.zeros_like(value) for name, value in tensors.items()}
    if how == "no output":
        return {"down": torch.zeros_like(neurons.down)}
    if how == "constant":
        return {n: torch.full_like(v, 0.5 if "bias" in n else 0) for n, v in tensors.items() if "down" not in n}
    return {name: torch.full_like(value, 0.01) for name, value in tensors.items()}


def unsound(value: Any, path: str = "") -> list[str]:
    """Where numbers are not finite."""
    if isinstance(value, Tensor):
        return [path] if value.is_floating_point() and not bool(value.isfinite().all()) else []
    if isinstance(value, float):
        return [] if math.isfinite(value) else [path]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [found for key, part in parts for found in unsound(part, f"{path}/{key}")]


DEAD = ("dead", "no output", "constant", "alike", "a model of zeros")
FAMILY = ("bert", "gpt2", "llama", "t5", "switch", "mixtral", "albert", "vit")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), [("bert", "dead"), ("llama", "alike")])
def test_every_plan_is_finite(family: str, how: str) -> None:
    for name in (name for name in EVERY if (name, family) not in REFUSED):
        check(case_of(family), name, EVERY[name](), lambda model: kill(model, how))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), list(product(FAMILY, DEAD)))
def test_every_plan_is_finite_in_every_setting(family: str, how: str) -> None:
    for label, method in (each for name in EVERY if (name, family) not in REFUSED for each in variants(name)):
        with suppress(FfnkitError):  # a setting that does not go with the family, told in one line
            check(case_of(family), label, method, lambda model: kill(model, how))


def check(case: Any, label: str, method: Any, break_it: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = case.model()
    break_it(model)
    inputs = case.inputs(model)
    plan = fk.plan(model, method, data=case.data(model) if getattr(method, "needs_data", False) else None)
    found = [where for edit in plan.edits for where in unsound(edit.tensors(), f"{label}: {edit.target}")]
    assert found + unsound(plan.quantities, label) + unsound(plan.report, label) == []
    fk.apply(model, plan)
    assert unsound(case.outputs(model, inputs), label) == []


@pytest.mark.parametrize("rows", [torch.zeros(6, 4), torch.full((6, 4), 0.3), torch.ones(6, 4) * 1e-20])
def test_points_stay_where_nothing_pulls_them(rows: Tensor) -> None:
    points = rows[:3].clone()
    assert mmd.mmd(points, rows) == 0
    assert not bool(mmd.gradient(points, rows).any())
    other = rows.clone()
    other[0, 0] += 1
    assert mmd.mmd(points, other) > 0 and bool(mmd.gradient(points, other).any())  # the control


# Out of the gradients' reach -----------------------------------------------------------------------------------------


def experts() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Four experts and three tokens."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=4, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    ids = torch.tensor([[3, 4, 5]])
    return Switch(config), [{"input_ids": ids, "labels": ids[:, :2]}] * 4


def images() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """LLaVA takes what the last layer but one of its vision tower gives."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = text | {"image_size": 8, "patch_size": 4, "projection_dim": 8, "model_type": "clip_vision_model"}
    text |= {"vocab_size": 50, "max_position_embeddings": 32, "model_type": "llama"}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=49, vision_feature_layer=-2)
    ids = torch.tensor([[49] * 4 + [3, 4, 5]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return LlavaForConditionalGeneration(config), [batch | {"pixel_values": torch.randn(1, 3, 8, 8)}] * 4


SETTINGS = list(product(("shared", "layer", "none"), ("gradient", "magnitude", "random"), ("layer", "all")))
BASES = [("shared", "gradient", "layer"), ("layer", "gradient", "layer"), ("none", "gradient", "all")]


@pytest.mark.parametrize("settings", [BASES, pytest.param(SETTINGS, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("made", [experts, images])
@pytest.mark.parametrize("selection", ["fixed", "refresh", "step"])
def test_weights_that_no_gradient_reaches_are_no_obstacle(selection: Any, made: Any, settings: Any) -> None:
    for basis, choose, by in settings:
        model, data = made()
        given: Any = {"basis": basis, "choose": choose, "by": by, "selection": selection}
        plan = fk.plan(model, fk.SparseGrad(density=0.05, every=1, batches=2, **given), data=data)
        fk.apply(model, plan)
        optimizer = torch.optim.AdamW(fk.trainable_parameters(model), lr=1e-2)
        model(**data[0]).loss.backward()
        unreached = [n for n, p in model.named_parameters() if n.endswith(".values") and p.grad is None]
        assert unreached or by == "all"
        optimizer.step()
        before = model.eval()(**data[0]).logits
        torch.testing.assert_close(fk.fold(model)(**data[0]).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "phi"])
def test_one_token_gives_finite_numbers(family: str) -> None:
    """No neuron varies then, so nothing that is missing can be laid to any."""
    model = FAMILIES[family].model()
    for ids in (torch.tensor([[5]]), torch.full((4, 25), 5)):
        plan = fk.plan(model, fk.CalibratedFusion(width=0.5), data=[{"input_ids": ids}])
        assert [where for edit in plan.edits for where in unsound(edit.tensors(), edit.target)] == []
        for edit in (each for each in plan.edits if isinstance(each, ReplaceNeurons)):
            old = next(ffn for ffn in ffns(model) if ffn.name == edit.target).raw()
            assert edit.down.abs().max() < 3 * old.down.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_outputs_that_overflow_are_refused(family: str) -> None:
    """The last FFN's come back in no later one: what it holds itself is finite."""
    model = FAMILIES[family].model()
    ffn = ffns(model)[-1]
    ffn.raw().down.mul_(1e38)
    ffn.raw().up.mul_(50)
    data = case_of(family).data(model)
    for method in (fk.CalibratedFusion(width=0.5), EVERY["modegpt"](), EVERY["importance"]()):
        with pytest.raises(FfnkitError, match=f"{ffn.name} gives: it is NaN or infinite"):
            fk.plan(model, method, data=data)


def test_edits_hold_finite_numbers() -> None:
    ffn = ffns(FAMILIES["gpt2"].model())[0]
    old = ffn.raw()
    bad = torch.full_like(old.down, torch.inf)
    makes: list[Callable[[], Any]] = [
        lambda: ReplaceNeurons.of(ffn.name, dataclasses.replace(old, down=bad)),
        lambda: ReplaceLinear.of("linear", bad, None),
        lambda: ReplaceLinear.of("linear", old.down, bad[0]),
        lambda: FactorLinear.of(ffn.name, "down", old.down, bad),
        lambda: Rescale.of("norm", bad[0]),
        lambda: KeepOwn.of(ffn.name, "down", scale=bad[0]),
    ]
    for make in makes:
        with pytest.raises(FfnkitError, match="would hold NaN or infinity"):
            make()
