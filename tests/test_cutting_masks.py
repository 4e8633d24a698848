"""Masks, and updates over pruned weights, are cut with the weights: heads, neurons, FFNs and layers that go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import slow_but
from test_heads import ALL, RAGGED, compare, exact, ragged_plan
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.layers import FfnDrop, LayerDrop
from ffnkit.model.attention import attentions
from ffnkit.model.finding import ffns
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.nn.masked import Masked

# Linears that follow heads beside the four, all ways of laying heads, experts in 3-D parameters (stored both ways).
QUICK = ("deberta", "deberta-4", "deberta-v2", "deberta-v2-keys", "bert-4", "gpt2-4", "phi3-8", "t5-4", "mixtral")
HEADS = slow_but(QUICK, RAGGED)
NEURONS = slow_but((*QUICK[:4], "gpt2", "phi3", "mixtral", "switch", "granitemoe", "t5-gated"), list(ALL))
DROPS = slow_but(("bert", "gpt2", "mixtral", "t5-gated", "granitemoe"), list(ALL))


def pruned(name: str, kind: str) -> Any:
    """A model in float64 with half of its weights zero; with "dsee" below updates as if tuned, on all attention."""
    model = ALL[name].model().double()
    if kind == "dsee":
        fk.apply(model, fk.plan(model, fk.DSEE(rank=2, nonzeros=5, targets="attention", support="random")))
        draw = torch.Generator().manual_seed(0)
        for layer in adapter_layers(model).values():
            for part in (layer.up, layer.down, layer.values):
                part.data.copy_(0.1 * torch.randn(part.shape, generator=draw, dtype=torch.float64))
    return fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5, mode="WABS")))


def silenced(model: nn.Module, plan: Any) -> nn.Module:
    """A copy whose heads that a plan removes hand zeros to the output linear, whatever stands in its place."""
    other = copy.deepcopy(model)
    found = {each.name: each for each in attentions(other)}
    for edit in plan.edits:
        attention = found[edit.target]
        stay = attention.columns()[attention.members(edit.index)["q"]].flatten()

        def hook(_: nn.Module, args: tuple[Any, ...], stay: Any = stay) -> Any:
            kept = torch.zeros(args[0].shape[-1], dtype=args[0].dtype).index_fill(0, stay, 1.0)
            return (args[0] * kept, *args[1:])

        attention.linear("o").register_forward_pre_hook(hook)
    return other


def check_whole(model: nn.Module) -> None:
    """Masks have the sides of their weights, and weights are zero where they say."""
    for module in model.modules():
        if isinstance(module, Masked):
            assert module.mask.shape == module.weight.shape
            assert not bool(module.weight[~module.mask].any())


@pytest.mark.parametrize("kind", ["masks", "dsee"])
@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str, kind: str, tmp_path: Path) -> None:
    family, model = ALL[name], pruned(name, kind)
    plan = ragged_plan(model)
    expected = silenced(model, plan)
    fk.apply(model, plan)
    check_whole(model)
    rel = max(exact(name), 1e-10)
    compare(family, model, expected, rel)
    if kind == "masks":
        fk.save(model, tmp_path / "compact")
        compare(family, fk.load(tmp_path / "compact").eval(), expected, rel)
    if name not in ("llama4",):  # rotates in float32: an export in float64 is not equal
        fk.export(model, tmp_path / "standard")
        compare(family, fk.load(tmp_path / "standard").eval(), expected, rel)
    compare(family, fk.fold(model), expected, rel)


@pytest.mark.parametrize("name", NEURONS)
def test_neurons(name: str, tmp_path: Path) -> None:
    family, model = ALL[name], pruned(name, "masks")
    plan = fk.plan(model, fk.StructuredPruning(remove_heads=0, remove_neurons=0.25, by="random"))
    expected = copy.deepcopy(model)
    found = {ffn.name: ffn for ffn in ffns(expected)}
    for edit in plan.edits:
        ffn = found[edit.target]
        index = edit.index.long().view(ffn.experts or 1, -1)
        stay = torch.zeros(ffn.experts or 1, ffn.width, dtype=torch.float64).scatter_(1, index, 1.0)
        with torch.no_grad():
            ffn.oriented("down").mul_(stay[:, None, :] if ffn.experts else stay)
    fk.apply(model, plan)
    check_whole(model)
    rel = max(exact(name), 1e-10)
    compare(family, model, expected, rel)
    fk.save(model, tmp_path)
    compare(family, fk.load(tmp_path).eval(), expected, rel)
    compare(family, fk.fold(model), expected, rel)


@pytest.mark.parametrize("method", [LayerDrop, FfnDrop])
@pytest.mark.parametrize("name", DROPS)
def test_ffns_and_layers(name: str, method: Any, tmp_path: Path) -> None:
    family, model = ALL[name], pruned(name, "masks")
    expected = fk.fold(copy.deepcopy(model))
    try:
        fk.apply(expected, fk.plan(expected, method(layers="last:1")))
    except FfnkitError as error:
        pytest.skip(error.found)
    masks = sum(isinstance(module, Masked) for module in model.modules())
    fk.apply(model, fk.plan(model, method(layers="last:1")))
    left = sum(isinstance(module, Masked) for module in model.modules())
    assert left < masks or ffns(model)[-1].experts  # experts' masks are buffers
    check_whole(model)
    rel = max(exact(name), 1e-10)
    compare(family, model, expected, rel)
    fk.save(model, tmp_path)
    compare(family, fk.load(tmp_path).eval(), expected, rel)
