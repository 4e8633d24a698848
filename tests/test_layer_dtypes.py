"""Every layer of ours in every dtype, with and without autocast, whatever the number of tokens, beside a dense loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor, nn

from ffnkit.nn import adapter_layer
from ffnkit.nn import sparsegrad as sparsegrad_module
from ffnkit.nn.coefficients import Coefficients
from ffnkit.nn.dsee import SparseLowRank
from ffnkit.nn.expert_weights import folded, parametrize_weight
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.nn.scaled import Scaled
from ffnkit.nn.sparsegrad import Bases, SparseGradLinear
from ffnkit.tune.meprop import _Cut

OUT, IN = 48, 40
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# autocast to a dtype, with the backward pass behind it or in it too, or the whole layer in another dtype
MODES = ["plain", "bf16", "fp16", "bf16 both", "fp16 both", "moved"]
FEW, MORE = (0, 8, 512), (1, 64, 4096)  # a route through the bases is chosen by how many there are


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparsegrad(linear: nn.Linear, selection: Any, basis: bool) -> SparseGradLinear:
    rows, columns = (12, 20) if basis else (OUT, IN)
    sides = [
        torch.linalg.qr(draw(n, n, seed=n))[0][:m].to(linear.weight.dtype) for n, m in ((OUT, rows), (IN, columns))
    ]
    index = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[:30].sort().values
    given = {"bases": Bases(*sides)} if basis else {}
    return SparseGradLinear(linear, index=None if selection == "step" else index, selection=selection, **given)


def dsee(linear: nn.Linear, rank: int, count: int) -> SparseLowRank:
    index = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(0))[:count].sort().values
    return SparseLowRank(linear, rank=rank, index=index if count else None)


LAYERS: dict[str, Callable[[nn.Linear], Any]] = {
    **{
        f"sparsegrad {selection}{' basis' * basis}": lambda linear, s=selection, b=basis: sparsegrad(linear, s, b)
        for selection, basis in product(("fixed", "refresh", "step"), (False, True))
    },
    "dsee low rank": lambda linear: dsee(linear, 4, 0),
    "dsee entries": lambda linear: dsee(linear, 0, 30),
    "dsee": lambda linear: dsee(linear, 4, 900),
    "coefficients": Coefficients,
    "masked": lambda linear: Masked(linear, draw(OUT, IN, seed=5) > 0),
    "scaled": lambda linear: Scaled(linear, draw(IN, seed=5).abs()),
    "lowrank": lambda linear: LowRank(linear, draw(3, IN, seed=5) / 6, draw(OUT, 3, seed=6)),
}


def made(kind: str, dtype: torch.dtype) -> Any:
    """A layer whose update and coefficients are not those of the start."""
    torch.manual_seed(0)
    layer = LAYERS[kind](nn.Linear(IN, OUT).to(dtype))
    if isinstance(layer, adapter_layer.AdapterLayer):
        layer.use_coefficients(draw(IN, seed=7).abs() + 0.5)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(layer.named_parameters()):
            if name in ("values", "up", "down"):
                parameter.copy_(draw(*parameter.shape, seed=20 + number) * 0.1)
    return layer


def passes(layer: Any, mode: str, x: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradients of inputs and parameters."""
    to, both = DTYPES.get(mode.split(" ")[0]), "both" in mode
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=to) if to else nullcontext():
        y = layer(x)
        if both:
            y.backward(gradient.to(y.dtype))
    if not both:
        y.backward(gradient.to(y.dtype))
    assert x.grad is not None
    return y.detach(), {"x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def by_loop(layer: Any, x: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in float64, from the weight that the layer stands for; gradients by autograd over dense tensors."""
    exact = copy.deepcopy(layer).double()
    named = {n: p.detach().clone().requires_grad_() for n, p in exact.named_parameters() if n != "base"}
    base = exact.base.detach() if hasattr(exact, "base") else None
    if isinstance(layer, SparseGradLinear):
        s = named["values"]
        if exact.index is not None:
            s = torch.zeros(exact.core, dtype=s.dtype).flatten().index_put((exact.index.long(),), s).view(exact.core)
        pair = exact.pair(torch.float64)
        weight = base + (s if pair is None else pair[0].T @ s @ pair[1])
    elif isinstance(layer, SparseLowRank):
        weight = base + (named["up"] @ named["down"] * exact.scale if "up" in named else 0)
        if "values" in named:
            flat = torch.zeros(OUT * IN, dtype=torch.float64).index_put((exact.index.long(),), named["values"])
            weight = weight + flat.view(OUT, IN) * exact.scale
    elif isinstance(layer, Coefficients):
        weight = base
    elif isinstance(layer, LowRank):
        weight = named["second.weight"] @ named["first.weight"]
    else:
        weight = named["weight"] * (exact.mask if isinstance(layer, Masked) else exact.scale)
    if "coefficients" in named:
        weight = weight * named["coefficients"]
    x = x.double().requires_grad_()
    y = torch.stack([weight @ token + named["bias"] for token in x[:8]] + list(x[8:] @ weight.T + named["bias"]))
    wanted = {"x": x, **named}
    found = torch.autograd.grad(y, list(wanted.values()), gradient.double(), allow_unused=True)
    return y.detach(), {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


@pytest.mark.parametrize("counts", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_dtype_is_a_dense_loop(kind: str, counts: tuple[int, ...]) -> None:
    for dtype, mode in product(DTYPES, MODES):
        for tokens in counts:
            layer = made(kind, DTYPES[dtype])
            layer = layer.bfloat16() if mode == "moved" else layer
            inner = torch.bfloat16 if mode == "moved" else DTYPES[dtype]
            x, gradient = draw(tokens, IN, seed=1).to(inner), draw(tokens, OUT, seed=2).to(inner)
            gradient = gradient / max(tokens, 1) ** 0.5  # sums of thousands leave what fp16 can hold
            y, found = passes(layer, mode, x, gradient)
            if not tokens:
                assert y.shape == (0, OUT) and not any(bool(g.any()) for g in found.values())
                continue
            expected, wanted = by_loop(layer, x, gradient)
            exact = (dtype, mode) == ("fp32", "plain")
            what = f"{kind}, {dtype}, {mode}, {tokens} tokens"
            assert_close(y, expected, rel=1e-5 if exact else 2e-2, what=what)
            assert found.keys() >= wanted.keys() - {"base"}, what
            for name in found.keys() & wanted.keys():
                assert_close(found[name], wanted[name], rel=1e-5 if exact else 4e-2, what=f"{what}: {name}")
            assert_close(layer.fold()(x.to(inner)), y, rel=1e-5 if exact else 4e-2, what=f"{what}, folded")


def test_without_the_guard_a_larger_batch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: products that autocast takes over meet others that it does not."""
    x, gradient = draw(512, IN, seed=1), draw(512, OUT, seed=2)
    for name in ("forward", "backward"):
        bare = getattr(sparsegrad_module._Apply, name).__wrapped__
        monkeypatch.setattr(sparsegrad_module._Apply, name, staticmethod(bare))
    with pytest.raises(RuntimeError, match="dtype"):
        passes(made("sparsegrad fixed basis", torch.float32), "bf16", x, gradient)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_meprops_cut_keeps_the_dtype(dtype: torch.dtype) -> None:
    y = draw(8, OUT, seed=1).to(dtype).requires_grad_()
    _Cut.apply(y, 3).backward(draw(8, OUT, seed=2).to(dtype))
    assert y.grad is not None and y.grad.dtype == dtype and int((y.grad != 0).sum()) == 24


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_experts(dtype: str, mode: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(draw(2, IN, OUT, seed=1).to(DTYPES[dtype]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.expand(2, -1, -1), self.down)

    experts = Experts()
    parametrize_weight(experts, "down", "scaled", "down", draw(2, OUT, seed=3).abs())
    parametrize_weight(experts, "down", "masked", "down", draw(2, IN, OUT, seed=4) > 0)
    inner = torch.bfloat16 if mode == "moved" else DTYPES[dtype]
    experts = experts.bfloat16() if mode == "moved" else experts
    x, gradient = draw(8, IN, seed=1).to(inner), draw(2, 8, OUT, seed=2).to(inner)
    y, found = passes(experts, mode, x, gradient)
    factor = draw(2, OUT, seed=3).abs().to(inner)[:, None].double() * (draw(2, IN, OUT, seed=4) > 0)
    whole = experts._parameters["down"]
    assert whole is not None
    rel = 1e-5 if (dtype, mode) == ("fp32", "plain") else 2e-2
    assert_close(y, torch.bmm(x.double().expand(2, -1, -1), whole.double() * factor), rel=rel)
    by_hand = torch.bmm(x.double().T.expand(2, -1, -1), gradient.double()) * factor
    assert_close(found["down"], by_hand, rel=rel)
    assert_close(folded(experts)["down"], whole.double() * factor, rel=rel)
