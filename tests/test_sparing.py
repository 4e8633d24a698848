"""Updates over weights whose zeros come back: what a model gives while it is tuned is what it gives afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_healing import kl, pair, settings

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.unstructured import Unstructured
from ffnkit.tune import sparing
from ffnkit.tune.base import Tuner
from ffnkit.tune.healing import heal as module
from ffnkit.tune.kinds import Dsee, Lora, MeProp, SparseGrad, SparseMask

TUNERS: dict[str, Tuner] = {
    "lora": Lora(head=False),
    "lora of all, dropout": Lora(targets="all", dropout=0.3, head=False),
    "lora, zeros kept": Lora(keep_zeros=True, head=False),
    "sparsegrad": SparseGrad(head=False),
    "dsee": Dsee(head=False),
    "dsee, zeros kept": Dsee(keep_zeros=True, head=False),
    "mask": SparseMask(head=False),
    "meprop": MeProp(of="outputs", head=False),
}


def moved(tuner: Tuner, name: str, *, folded: bool = False) -> tuple[Any, Any, Any]:
    """A masked model with a tuner on it whose numbers were moved, the same finished, and its inputs."""
    family = FAMILIES[name]
    model: Any = family.model()
    fk.apply(model, fk.plan(model, Unstructured(0.5)))
    if folded:
        fk.fold(model)
    inputs = family.inputs(model)
    with torch.no_grad():
        labels = model(**inputs).logits.argmax(-1)
    given = [] if isinstance(tuner, Lora) else [[{**inputs, "labels": labels}]]
    tuned: Any = tuner.prepare(model, *given)
    sparing.spare_noted(tuned)  # as what trains does, where updates will be merged
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw).to(parameter))
    return tuned.eval(), tuner, inputs


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("which", TUNERS)
def test_what_is_judged_is_what_comes_back(which: str, name: str) -> None:
    folded = "kept" in which
    tuned, tuner, inputs = moved(TUNERS[which], name, folded=folded)
    with torch.no_grad():
        before = tuned(**inputs).logits
        after = tuner.finish(tuned)(**inputs).logits
    assert (before - after).abs().max() < 1e-4 * after.abs().max().clamp_min(1)


def test_without_it_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffnkit.tune.sparing.spare", lambda *_: None)
    tuned, tuner, inputs = moved(TUNERS["lora"], "llama")
    with torch.no_grad():
        assert (tuned(**inputs).logits - tuner.finish(tuned)(**inputs).logits).abs().max() > 1e-3


def test_adapters_learn_what_comes_back() -> None:
    """The gradient is that of the product under the mask, which a slow loop gives."""
    tuned, _, inputs = moved(Lora(head=False), "llama")
    layer = next(m for m in tuned.modules() if hasattr(m, "lora_A") and hasattr(m, "ffnkit_zeros"))
    x = torch.randn(5, layer.in_features)
    layer(x).square().sum().backward()
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = (p.detach().double().requires_grad_() for p in (first, second))
    weight = layer.base_layer.weight.double() + layer.scaling["default"] * (b @ a) * ~layer.ffnkit_zeros
    (x.double() @ weight.T).square().sum().backward()
    assert torch.allclose(first.grad.double(), a.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(second.grad.double(), b.grad, rtol=1e-4, atol=1e-6)
    copied = copy.deepcopy(tuned)
    assert torch.equal(copied(**inputs).logits, tuned(**inputs).logits)


@pytest.mark.parametrize("folded", [False, True])
def test_healing_tells_the_loss_of_the_model_that_it_gives(folded: bool) -> None:
    model, original, batches = pair("llama", method=Unstructured(0.3))
    if folded:
        fk.fold(model)
    done = fk.heal(model, original, batches[:8], settings(trains="lora", learning_rate=1e-2), held={"in": batches[8:]})
    assert done.kept_at and not done.folded
    assert kl(model, original, batches[8:]) == pytest.approx(done.after["in"], rel=1e-3)


def test_zeros_of_experts_are_not_filled_by_adapters() -> None:
    model, original, batches = pair("mixtral", method=Unstructured(0.5))
    if not any(p.ndim == 3 for p in model.parameters()):
        pytest.skip("this release holds experts apart")
    with pytest.raises(FfnkitError, match=r"experts in one parameter would fill them.* Set trains to ffn"):
        fk.heal(model, original, batches, settings(trains="lora"))
    assert fk.heal(model, original, batches, settings(tokens=100)).steps


def test_images_count_by_their_tokens() -> None:
    model, original, batches = pair("vit")
    each = module.tokens_each(original.config)
    assert each > 1
    done = fk.heal(model, original, batches, settings(tokens=3 * each * len(batches[0]["pixel_values"])))
    assert done.steps == 3


def test_rounding_is_no_gain() -> None:
    model, original, batches = pair("llama", method=fk.Fusion(1.0, restarts=1))
    done = fk.heal(model, original, batches, settings(learning_rate=1e-12))
    assert max(done.before.values()) < module.NOISE
    assert not done.kept_at
