"""One FFN for several: neurons chosen from all of theirs, the output layer fitted to what each of them gives.

Member i receives X_i (n, d) and gives Y_i (n, d). With H_i (n, p) what the neurons of *all* members do on X_i, a shared
FFN of the neurons S with output layer D costs ``sum_i s_i ||T_i^1/2 (H_i,S D^T + b - Y_i) M^1/2||_F^2``: T_i weighs the
tokens, M the dimensions, and s_i makes each member's error relative to its own outputs. All of it follows from the
pooled moments ``G = sum_i s_i H_i^T T_i H_i`` and ``C = sum_i s_i H_i^T T_i Y_i``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnkit.ops import local
from ffnkit.ops.local import Activation
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.ridge import factored, pulled
from ffnkit.ops.subset import choose

ROWS = 2048  # tokens at a time
FAINT = 1e-4  # of the mean variance of a group's outputs: outputs that vary by less are no measure of their own error


@dataclass(frozen=True)
class Member:
    """One FFN of those that are to be one.

    Attributes:
        neurons: float32. inputs, outputs: (n, d), float32, what it receives and gives on the data.
        tokens: (n,) how much each token counts. dimensions: (d,) how much each dimension of the outputs does.
        centre: (d,) the mean output. scale: one over the weighted variance of the outputs (see :func:`balanced`).
    """

    neurons: Neurons
    inputs: Tensor
    outputs: Tensor
    tokens: Tensor
    dimensions: Tensor
    centre: Tensor
    scale: float

    @classmethod
    def of(cls, neurons: Neurons, inputs: Tensor, outputs: Tensor, tokens: Tensor, dimensions: Tensor) -> Member:
        """A member with its centre and scale from the data. Without an output bias there is nothing to take a mean."""
        weights = tokens / tokens.sum()
        centre = weights @ outputs
        if neurons.down_bias is None:
            centre = torch.zeros_like(centre)
        spread = sum(
            float((((y - centre).square() * w[:, None]).sum(0) * dimensions).sum(dtype=torch.float64))
            for y, w in zip(outputs.split(ROWS), weights.split(ROWS), strict=True)
        )
        return cls(neurons, inputs, outputs, tokens, dimensions, centre, 1 / max(spread, 1e-30))


def balanced(members: list[Member]) -> list[Member]:
    """The members of a group, none of which counts for all: one that gives next to nothing counts as the others do.

    Of an FFN that gives nothing, or always the same, any error is infinite relative to its own outputs.
    """
    spreads = [1 / member.scale for member in members]
    faint = FAINT * sum(spreads) / len(spreads)
    others = [spread for spread in spreads if spread > faint]
    scale = len(others) / sum(others)
    return [m if s > faint else dataclasses.replace(m, scale=scale) for m, s in zip(members, spreads, strict=True)]


def union(members: list[Neurons], most: int | None = None, sizes: list[Tensor] | None = None) -> Neurons:
    """The neurons of all members side by side; of each at most ``most``, the largest by ``sizes``, (ff,) each."""
    parts = []
    for number, each in enumerate(members):
        if most is not None and sizes is not None and most < each.ff:
            each = each.take(sizes[number].topk(most).indices.sort().values)
        parts.append(each)
    joined = {
        name: torch.cat([part.tensors()[name] for part in parts])
        for name in ("up", "gate", "up_bias", "gate_bias")
        if name in parts[0].tensors()
    }
    biases = [part.down_bias for part in parts if part.down_bias is not None]
    bias = torch.stack(biases).mean(0) if biases else None
    return Neurons(**joined, down=torch.cat([part.down for part in parts], dim=1), down_bias=bias)


@dataclass(frozen=True)
class Pooled:
    """Second moments of neurons on the data of all members, around each member's own means where there is a bias.

    Attributes:
        gram: (p, p), float64, G. cross: (p, d), float64, C.
        means: (p,) for each member, the mean hidden activations.
    """

    gram: Tensor
    cross: Tensor
    means: list[Tensor]


def pooled(neurons: Neurons, members: list[Member], activation: Activation) -> Pooled:
    """The moments of ``neurons`` (p of them) over all members, each on its own inputs; float32 products of slices."""
    p, d = neurons.ff, neurons.d
    gram = neurons.up.new_zeros(p, p, dtype=torch.float64)
    cross = neurons.up.new_zeros(p, d, dtype=torch.float64)
    means = []
    for member in members:
        weights = member.tokens / member.tokens.sum()
        own, outer = neurons.up.new_zeros(p, p), neurons.up.new_zeros(p, d)
        mean = gram.new_zeros(p)
        for x, y, w in zip(*(v.split(ROWS) for v in (member.inputs, member.outputs, weights)), strict=True):
            hidden = local.hidden(neurons, x, activation)
            weighted = hidden * w[:, None]
            own.addmm_(weighted.T, hidden)
            outer.addmm_(weighted.T, y - member.centre)
            mean += weighted.sum(0, dtype=torch.float64)
        gram.add_(own, alpha=member.scale)
        cross.add_(outer, alpha=member.scale)
        if neurons.down_bias is not None:
            gram.addr_(mean, mean, alpha=-member.scale)
        means.append(mean)
    return Pooled(gram, cross, means)


def with_one_bias(moments: Pooled, members: list[Member]) -> Pooled:
    """The moments around the mean of all members, where they are to share the output bias too; as they are without."""
    if members[0].neurons.down_bias is None:
        return moments
    scales = [member.scale for member in members]
    mean = _mean(moments.means, scales)
    centre = _mean([member.centre.double() for member in members], scales)
    gram, cross = moments.gram.clone(), moments.cross.clone()
    for member, own in zip(members, moments.means, strict=True):
        gram.addr_(own - mean, own - mean, alpha=member.scale)
        cross.addr_(own - mean, member.centre.double() - centre, alpha=member.scale)
    return Pooled(gram, cross, [mean] * len(members))


def _mean(values: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum(0) / sum(weights)


def biases(neurons: Neurons, moments: Pooled, kept: Tensor, members: list[Member], *, one: bool) -> list[Tensor | None]:
    """The output bias (d,) that suits each member best, or all of them; None where the FFN has none."""
    if neurons.down_bias is None:
        return [None] * len(members)
    down = neurons.down.double()
    own = [m.centre.double() - down @ mean[kept] for m, mean in zip(members, moments.means, strict=True)]
    if one:
        own = [_mean(own, [member.scale for member in members])] * len(members)
    return [bias.to(neurons.down.dtype) for bias in own]


def thin_difference(
    hidden: Tensor, gap: Tensor, tokens: Tensor, dimensions: Tensor, rank: int, ridge: float
) -> tuple[Tensor, Tensor]:
    """first (r, p) and second (d, r) whose product, added to the output layer, takes off most of what is missing.

    Minimises ||T^1/2 (H (second first)^T - R) M^1/2||^2 + lambda ||M^1/2 second first||^2 over products of rank r, with
    H (n, p), R (n, d) what is missing and lambda = ridge x the mean diagonal of H^T T H: the whole least-squares
    solution, of which the singular values that count are kept after whitening by H.

    Source: reduced-rank regression (Izenman 1975); for compression cf. Olica.
    """
    weighted = (hidden * (tokens / tokens.sum())[:, None]).double()
    gram = weighted.T @ hidden.double()
    root = dimensions.double().sqrt()
    factor, _ = factored(gram, ridge)  # L L^T
    white = torch.linalg.solve_triangular(factor, (weighted.T @ gap.double()) * root, upper=False)  # L^-1 C M^1/2
    left, values, right = torch.linalg.svd(white, full_matrices=False)
    rank = min(rank, len(values))
    first = torch.linalg.solve_triangular(factor.T, left[:, :rank] * values[:rank].sqrt(), upper=True).T
    second = (right[:rank].T * values[:rank].sqrt()) / root.clamp_min(1e-12)[:, None]
    return first.to(hidden.dtype).contiguous(), second.to(hidden.dtype).contiguous()


def choose_from(moments: Pooled, width: int, dimensions: Tensor, ridge: float) -> Tensor:
    """Numbers (width,), ascending, of the neurons chosen greedily for the outputs of all members.

    The greedy choice of one FFN (:func:`~ffnkit.ops.subset.choose`) asks for an output layer W with G W^T = C. Here
    none has that of itself: the outputs are not those of the pooled neurons on all members' inputs. W is the best fit
    of all of them, ``(G + ridge) W^T = C``, so that every step lowers the shared error most.
    """
    gram = moments.gram.float() if len(moments.gram) > 1024 else moments.gram
    weight = torch.cholesky_solve(moments.cross, factored(moments.gram, ridge)[0]).T
    return choose(gram, weight * dimensions.double().sqrt()[:, None], width, ridge).order.sort().values.to(gram.device)


def fitted(neurons: Neurons, moments: Pooled, kept: Tensor, members: int, ridge: float) -> Neurons:
    """The chosen neurons with the output layer that suits all members best; biases are set by :func:`biases`.

    Minimises the shared error + lambda ||D - D_0||_F^2, lambda = ridge x the mean diagonal of G_SS, with D_0 the
    neurons' own columns over the number of members: each was written by one member, and the others did without it.
    """
    square, cross = moments.gram[kept[:, None], kept], moments.cross[kept].T
    down = pulled(square, cross, neurons.down[:, kept] / members, ridge)
    return dataclasses.replace(neurons.take(kept), down=down.to(neurons.down.dtype).contiguous())
