"""MLP Fusion against loops written from the paper's formulas, and what keeping P apart is for."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from tolerance import assert_close, assert_differs
from torch import Tensor

import ffnkit as fk
from ffnkit.edits import ClusterNeurons
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.ops.neurons import Neurons, average, balance, cluster_sizes


def random_neurons(ff: int = 12, d: int = 5, gated: bool = False, seed: int = 0) -> Neurons:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    gate = (draw(ff, d), draw(ff)) if gated else (None, None)
    return Neurons(draw(ff, d), draw(d, ff), gate[0], draw(ff), gate[1], draw(d))


def run(neurons: Neurons, x: Tensor) -> Tensor:
    """The FFN by loops over its neurons, with tanh."""
    out = torch.zeros(x.shape[0], neurons.d, dtype=x.dtype)
    for n in range(x.shape[0]):
        for i in range(neurons.ff):
            pre = sum(neurons.up[i, k] * x[n, k] for k in range(neurons.d)) + neurons.up_bias[i]
            if neurons.gate is None:
                h = torch.tanh(pre)
            else:
                h = torch.tanh(neurons.gate[i] @ x[n] + neurons.gate_bias[i]) * pre
            out[n] += neurons.down[:, i] * h
        out[n] += neurons.down_bias
    return out


def test_centroids_are_the_papers_formula() -> None:
    """A~ = (C^T C)^-1 C^T A and H~ = s(X W1~ + b1~) P W2~ + b2, with C one-hot."""
    neurons, labels = random_neurons(), torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 0, 1, 3, 2])
    one_hot = torch.nn.functional.one_hot(labels, 4).double()
    stacked = torch.cat([neurons.up, neurons.up_bias[:, None], neurons.down.T], dim=1)
    counts = one_hot.T @ one_hot
    centroids = torch.linalg.inv(counts) @ one_hot.T @ stacked
    fused = average(neurons, labels, 4)
    assert_close(fused.matrix(), centroids, rel=1e-14)
    assert_close(cluster_sizes(labels, 4).double(), counts.diagonal(), rel=0)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.tanh(x @ centroids[:, :5].T + centroids[:, 5]) @ counts @ centroids[:, 6:] + neurons.down_bias
    assert_close(run(fused.scaled(counts.diagonal()), x), expected, rel=1e-14)
    assert_differs(run(fused, x), expected, rel=1e-3, what="without P")


@pytest.mark.parametrize("gated", [False, True])
def test_identical_members_make_it_exact(gated: bool) -> None:
    single = random_neurons(6, gated=gated)
    triple = single.take(torch.arange(6).repeat_interleave(3))
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6).repeat_interleave(3)
    fused = average(triple, labels, 6).scaled(cluster_sizes(labels, 6))
    assert_close(run(fused, x), run(triple, x), rel=1e-12)
    wrong = average(triple, labels.flip(0).roll(1), 6).scaled(cluster_sizes(labels, 6))
    assert_differs(run(wrong, x), run(triple, x))


def test_balance_keeps_the_function_and_finds_scaled_duplicates() -> None:
    neurons = random_neurons(gated=True)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor = torch.tensor([2.0, -0.5, -3.0] * 4, dtype=torch.float64)
    moved = Neurons(
        neurons.up * factor[:, None],
        neurons.down / factor,
        neurons.gate,
        neurons.up_bias * factor,
        neurons.gate_bias,
        neurons.down_bias,
    )
    assert_close(run(balance(moved), x), run(neurons, x), rel=1e-12)
    assert_close(balance(moved).matrix(), balance(neurons).matrix(), rel=1e-12)
    assert_differs(moved.matrix(), neurons.matrix())
    plain = random_neurons()
    assert balance(plain) is plain


def test_balance_leaves_dead_neurons_alone() -> None:
    neurons = random_neurons(gated=True)
    neurons.up[0], neurons.up_bias[0], neurons.down[:, 1] = 0, 0, 0
    assert bool(balance(neurons).matrix().isfinite().all())


def test_apart_a_centroid_moves_the_output_as_its_members_would() -> None:
    """Sign steps on a duplicated FFN and on its fused form change the output alike; with P folded early they do not.

    Source: the Adam kernel <grad f(x), sign grad f(z)> of the paper.
    """
    d, small = 6, random_neurons(5, 6)
    big = small.take(torch.arange(5).repeat(3))
    x, z = torch.randn(2, 7, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def output(n: Neurons, scale: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(x @ n.up.T + n.up_bias) * scale) @ n.down.T + n.down_bias

    def kernel(n: Neurons, scale: Tensor) -> Tensor:
        """<grad f(x), sign grad f(z)> over up, up_bias, down, with f a fixed combination of the outputs."""
        grads = []
        for data in (x, z):
            leaf = n.map(lambda value: value.clone().requires_grad_())
            f = (output(leaf, scale, data) * torch.linspace(1, 2, d, dtype=torch.float64)).sum()
            grads.append(torch.autograd.grad(f, [leaf.up, leaf.up_bias, leaf.down]))
        return sum((a * b.sign()).sum() for a, b in zip(*grads, strict=True))

    ones, three = torch.ones(15, dtype=torch.float64), torch.full((5,), 3.0, dtype=torch.float64)
    expected = kernel(big, ones)
    assert_close(kernel(small, three), expected, rel=1e-12, what="P apart")
    assert_differs(kernel(small.scaled(three), torch.ones(5, dtype=torch.float64)), expected, rel=1e-2, what="P folded")


def test_more_restarts_are_never_worse_and_the_seed_decides() -> None:
    model = FAMILIES["bert"].model()
    losses = []
    for restarts in (1, 8):
        plan = fk.plan(model, fk.Fusion(width=0.5, restarts=restarts))
        losses.append([v["within-cluster variance"] for v in plan.quantities.values()])
    assert all(many <= one + 1e-9 for one, many in zip(*losses, strict=True))
    assert fk.plan(model, fk.Fusion(width=0.5, seed=3)) == fk.plan(model, fk.Fusion(width=0.5, seed=3))


@pytest.mark.parametrize("settings", [{"width": 0}, {"width": 10_000}, {"width": 1.2}, {"seed": -1}, {"restarts": 0}])
def test_settings_that_do_not_fit_are_refused_in_one_line(settings: dict[str, float]) -> None:
    with pytest.raises(FfnkitError, match="fusion on Bert") as error:
        fk.plan(FAMILIES["bert"].model(), fk.Fusion(**{"width": 0.5, **settings}))
    assert "\n" not in str(error.value)


def test_bf16_weights_are_averaged_in_float32() -> None:
    model = FAMILIES["bert"].model().bfloat16()
    exact = copy.deepcopy(model).double()
    plan = fk.plan(model, fk.Fusion(width=0.5))
    fk.apply(model, plan)
    fk.apply(exact, plan)
    for low, high in zip(ffns(model), ffns(exact), strict=True):
        assert low.raw().up.dtype == torch.bfloat16
        assert_close(low.raw().up, high.raw().up.to(torch.bfloat16), rel=1e-3)


def test_labels_that_miss_a_cluster_are_refused() -> None:
    model = FAMILIES["bert"].model()
    plan = fk.plan(model, fk.Fusion(width=0.5))
    first = next(e for e in plan.edits if isinstance(e, ClusterNeurons))
    first.labels.fill_(0)
    with pytest.raises(FfnkitError, match="labels do not fit"):
        fk.apply(model, plan)
