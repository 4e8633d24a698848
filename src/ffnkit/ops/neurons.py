"""The canonical feed-forward network as a set of neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnkit.ops import room


@dataclass(frozen=True)
class Neurons:
    """The weights of one FFN; with experts every tensor has a leading axis E.

    ``y = down (act(gate x + gate_bias) * (up x + up_bias)) + down_bias``, and without a gate
    ``y = down act(up x + up_bias) + down_bias``.

    Attributes:
        up: (ff, d); down: (d, ff); gate: (ff, d) or None;
        up_bias, gate_bias: (ff,) or None; down_bias: (d,) or None.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def ff(self) -> int:
        return self.up.shape[-2]

    @property
    def d(self) -> int:
        return self.up.shape[-1]

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def experts(self) -> int:
        return self.up.shape[0] if self.up.ndim == 3 else 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Neurons:
        """Every tensor passed through ``function``."""
        return Neurons(**{name: function(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        return {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> Neurons:
        """Every tensor in another precision."""
        return self.map(lambda value: room.cast(value, dtype))

    def expert(self, index: int) -> Neurons:
        """One expert's FFN."""
        return self.map(lambda value: value[index])

    def take(self, index: Tensor) -> Neurons:
        """The neurons at ``index`` (any length), whole: row of up and gate, biases, column of down."""
        rows = {
            name: value.index_select(-2 if name in ("up", "gate") else -1, index)
            for name, value in self.tensors().items()
            if name != "down_bias"
        }
        return Neurons(**rows, down_bias=self.down_bias)

    def scaled(self, scale: Tensor) -> Neurons:
        """Columns of down times ``scale`` (.., ff): the exact fold of a factor behind the activation."""
        return dataclasses.replace(self, down=self.down * scale.unsqueeze(-2).to(self.down.dtype))

    def matrix(self) -> Tensor:
        """The neurons stacked as rows, (ff, m): gate, gate bias, up, up bias, column of down.

        m is 2d + 1 for the plain FFN with biases. The output bias belongs to no neuron and stays out.
        Source: MLP Fusion (arXiv 2307.08941), the sub-MLPs [W1; b1; W2]; with a gate its row and bias are added.
        """
        parts = [self.gate, self.gate_bias, self.up, self.up_bias, self.down.mT]
        columns = [p if p.ndim == self.up.ndim else p[..., None] for p in parts if p is not None]
        shape = (*self.up.shape[:-1], sum(part.shape[-1] for part in columns))
        return room.made(torch.cat, columns, -1, shape=shape, like=self.up)

    def with_matrix(self, matrix: Tensor) -> Neurons:
        """The inverse of :meth:`matrix`, for any number of rows; the output bias is kept."""
        names = [name for name in ("gate", "gate_bias", "up", "up_bias") if getattr(self, name) is not None] + ["down"]
        sizes = [1 if name.endswith("bias") else self.d for name in names]
        parts = dict(zip(names, matrix.split(sizes, dim=-1), strict=True))
        fields = {name: part.squeeze(-1) if name.endswith("bias") else part for name, part in parts.items()}
        fields["down"] = fields["down"].mT
        return Neurons(**{name: part.contiguous() for name, part in fields.items()}, down_bias=self.down_bias)


_FIELDS = tuple(field.name for field in dataclasses.fields(Neurons))


def concatenate(parts: list[Neurons]) -> Neurons:
    """Stack experts along a new leading axis."""
    names = parts[0].tensors()
    return Neurons(**{name: torch.stack([getattr(part, name) for part in parts]) for name in names})


def balance(neurons: Neurons) -> Neurons:
    """Bring the free scale and sign of a gated neuron to a canonical form; without a gate nothing changes.

    ``down_i act(gate_i x) (up_i x + b_i)`` is the same for (a up_i, a b_i, down_i / a) with any a != 0. Neurons that
    differ by a only are duplicates, and clustering finds them once each neuron has ||[up_i, b_i]|| = ||down_i|| and
    the entry of ``up_i`` with the largest magnitude is positive. Neurons with a zero side keep their scale.

    Differs: the papers cluster raw weights; for gated FFNs that misses such duplicates.
    """
    if neurons.gate is None:
        return neurons
    bias = neurons.up_bias
    full = neurons.up if bias is None else torch.cat([neurons.up, bias[..., None]], dim=-1)
    up_norm, down_norm = full.norm(dim=-1), neurons.down.norm(dim=-2)
    usable = (up_norm > 0) & (down_norm > 0)
    factor = torch.where(usable, (down_norm / up_norm.clamp_min(torch.finfo(full.dtype).tiny)).sqrt(), 1.0)
    largest = full.gather(-1, full.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    factor = torch.where(largest < 0, -factor, factor)
    return dataclasses.replace(
        neurons,
        up=room.made(torch.mul, neurons.up, factor[..., None], shape=neurons.up.shape, like=neurons.up),
        up_bias=None if bias is None else bias * factor,
        down=room.made(torch.div, neurons.down, factor.unsqueeze(-2), shape=neurons.down.shape, like=neurons.down),
    )


def average(neurons: Neurons, labels: Tensor, width: int) -> Neurons:
    """The mean neuron of each cluster, not multiplied by the cluster's size.

    Args:
        neurons: the FFN in float32 or float64 (bf16 means would lose the small differences in a cluster).
        labels: (ff,) cluster of each neuron, or (E, ff) with experts.
        width: number of clusters.

    Source: MLP Fusion, A~ = (C^T C)^-1 C^T A.
    """
    if neurons.experts:
        return concatenate([average(neurons.expert(e), labels[e], width) for e in range(neurons.experts)])
    where, counts = labels.to(neurons.up.device), cluster_sizes(labels, width).to(neurons.up)

    def mean(rows: Tensor) -> Tensor:
        sums = room.empty((width, *rows.shape[1:]), rows).zero_().index_add_(0, where, rows)
        return sums.div_(counts if rows.ndim == 1 else counts[:, None])

    rows = {name: value for name, value in neurons.tensors().items() if name not in ("down", "down_bias")}
    means = {name: mean(value) for name, value in rows.items()}
    return Neurons(**means, down=mean(neurons.down.mT).mT.contiguous(), down_bias=neurons.down_bias)


def cluster_sizes(labels: Tensor, width: int) -> Tensor:
    """P, the number of neurons in each cluster, int64: (width,), or (E, width) with experts."""
    if labels.ndim == 2:
        return torch.stack([cluster_sizes(row, width) for row in labels])
    return torch.bincount(labels.long(), minlength=width)
