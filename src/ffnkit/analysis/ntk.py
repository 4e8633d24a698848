"""The neural tangent kernel of a model's FFNs before and after compression, for SGD and for Adam.

theta are the FFN tensors that a tuner would train: of an uncompressed FFN its up, gate, down and biases; of a
compressed one what stands in their place (a fixed factor is part of the function and not of theta; of two thin
matrices both). With g(x) the gradient of a scalar output f(x) by theta, one an example,

    SGD   K(x, z) = <g(x), g(z)>            a step on z moves f(x) by so much, times the rate
    Adam  K(x, z) = <g(x), sign(g(z))>      the same where each number moves by the sign of its gradient

A kernel is a sum over theta, so FFNs and slices of them are handled one after the other: at most ``memory`` bytes of
gradients are held, whatever the number of examples and parameters. Where not all fit, gradients are computed again
for each slice: ceil(4 N P / (0.8 memory)) passes over N examples with P parameters in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnkit.analysis.scalar import Output, check_output, scalar
from ffnkit.calibration.batches import evaluating
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.plans import Progress
from ffnkit.settings import WhichLayers

MEMORY = 512 << 20
BUFFER, SIGNS = 0.8, 0.1  # shares of the memory: gradients of all examples, signs of some columns of them
COLUMNS = 1 << 16  # products are summed in float32 over so many columns at most, then in float64
Kind = Literal["sgd", "adam"]
KINDS: tuple[Kind, ...] = ("sgd", "adam")


@dataclass(frozen=True)
class NtkSettings:
    """What the kernel is computed of.

    Attributes:
        examples: so many examples, the first of the data.
        layers: whose FFNs are theta, e.g. "last:2", "all", "encoder:last:1".
        output: "probability" or "logit"; see :func:`ffnkit.analysis.scalar.scalar`.
        memory: bytes of gradients held at a time.
    """

    examples: int = 48
    layers: WhichLayers = "last:2"
    output: Output = "probability"
    memory: int = MEMORY

    def __post_init__(self) -> None:
        if self.examples < 2:
            raise FfnkitError(f"ntk of {self.examples} examples", "a kernel compares examples", "Give 2 or more")
        if self.memory < 1:
            raise FfnkitError(f"ntk memory {self.memory}", "no room at all", "Give bytes, such as 512 << 20")
        check_output(self.output)


@dataclass(frozen=True)
class Kernels:
    """Kernels of single FFNs; that of all of them is the sum.

    Attributes:
        names: the FFNs. sgd, adam: (FFNs, N, N), float64, on the CPU.
        parameters: numbers in theta. passes: how often the examples were gone through.
    """

    names: tuple[str, ...]
    sgd: Tensor
    adam: Tensor
    parameters: int
    passes: int


@dataclass(frozen=True)
class Distance:
    """How far a kernel is from another.

    Attributes:
        absolute: ||K_after - K_before||_F. relative: the same over ||K_before||_F.
        cosine: <K_before, K_after> / (||K_before||_F ||K_after||_F): 1 where only the scale changed.
        centred: the same of the kernels without their row and column means: what tells examples apart. The gradients
            of a fresh head share a large common part, which makes any two kernels look alike.
    """

    absolute: float
    relative: float
    cosine: float
    centred: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Distance:
        gap, size = (after - before).norm().item(), before.norm().item()
        relative = gap / size if size > 0 else 0.0 if gap == 0 else math.inf
        return cls(gap, relative, _cosine(before, after), _cosine(_centred(before), _centred(after)))


def _cosine(one: Tensor, two: Tensor) -> float:
    scale = (one.norm() * two.norm()).item()
    return (one * two).sum().item() / scale if scale > 0 else math.nan


def _centred(kernel: Tensor) -> Tensor:
    """H K H with H = I - 1 1^T / N."""
    inner = kernel - kernel.mean(0, keepdim=True)
    return inner - inner.mean(1, keepdim=True)


def compare(before: Kernels, after: Kernels) -> dict[str, dict[Kind, Distance]]:
    """Distances of both kernels: of the sum over all FFNs under "", and of each FFN by its name."""
    if before.names != after.names:
        raise FfnkitError("comparing kernels", "they are of other FFNs", "Choose the same layers for both")
    found: dict[str, dict[Kind, Distance]] = {
        "": {kind: Distance.of(getattr(before, kind).sum(0), getattr(after, kind).sum(0)) for kind in KINDS}
    }
    for place, name in enumerate(before.names):
        found[name] = {kind: Distance.of(getattr(before, kind)[place], getattr(after, kind)[place]) for kind in KINDS}
    return found


def kernels(
    model: nn.Module,
    found: Sequence[FFN],
    examples: Sequence[Mapping[str, Any]],
    *,
    output: Output = "probability",
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Kernels:
    """Both kernels of each FFN in ``found`` on ``examples``.

    The model runs in eval mode, one example at a time; its mode, its gradients and what trains stay as they are.
    Held beside the model: ``memory`` bytes, one example's gradient of the tensors at hand, and the kernels.

    Args:
        examples: batches of one example each (:func:`singles`).

    Raises:
        FfnkitError: fewer than two examples, an output that is not a scalar's source, gradients that are not finite.

    Source: MLP Fusion (arXiv 2307.08941), Section 4 and the NTK check of its experiments.
    Differs: nothing of size examples x parameters is held; pairs and models that write work too; the SGD kernel and
        relative distances are given beside.
    """
    if len(examples) < 2:
        raise FfnkitError(f"a kernel of {len(examples)} examples", "it compares examples", "Give 2 or more")
    theta = [ffn.parameters() for ffn in found]
    first = next(model.parameters())
    dtype = torch.promote_types(theta[0][0].dtype, torch.float32)
    count, size = len(examples), dtype.itemsize
    chunks = list(_chunks(theta, max(1, int(memory * BUFFER) // (count * size))))
    step = max(1, min(COLUMNS, int(memory * SIGNS) // (count * size)))
    sums = {kind: torch.zeros(len(found), count, count, dtype=torch.float64, device=first.device) for kind in KINDS}
    with evaluating(model), _only(model):
        for number, chunk in enumerate(chunks):
            gradients = first.new_empty((count, sum(p.stop - p.start for p in chunk)), dtype=dtype)
            tensors = list(dict.fromkeys(theta[p.ffn][p.tensor] for p in chunk))
            for row, example in enumerate(examples):
                _fill(gradients[row], _gradient(model, example, output, tensors), chunk, theta)
                if progress is not None:
                    progress(number * count + row + 1, len(chunks) * count, "kernels")
            for ffn, start, stop in _columns(chunk):
                _add(sums["sgd"][ffn], sums["adam"][ffn], gradients[:, start:stop], step)
            del gradients
    if not all(bool(torch.isfinite(value).all()) for value in sums.values()):
        raise FfnkitError("the kernels", "a gradient is NaN or infinite", "Use dtype float32")
    total = sum(p.numel() for each in theta for p in each)
    return Kernels(tuple(f.name for f in found), sums["sgd"].cpu(), sums["adam"].cpu(), total, len(chunks))


@dataclass(frozen=True)
class _Piece:
    """Numbers ``start`` to ``stop`` of a tensor of theta, laid out flat."""

    ffn: int
    tensor: int
    start: int
    stop: int


def _chunks(theta: list[list[nn.Parameter]], columns: int) -> Iterator[list[_Piece]]:
    """Theta in order, cut into parts of at most ``columns`` numbers."""
    chunk: list[_Piece] = []
    room = columns
    for ffn, tensors in enumerate(theta):
        for place, tensor in enumerate(tensors):
            start = 0
            while start < tensor.numel():
                stop = min(start + room, tensor.numel())
                chunk.append(_Piece(ffn, place, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield chunk
                    chunk, room = [], columns
    if chunk:
        yield chunk


def _columns(chunk: list[_Piece]) -> Iterator[tuple[int, int, int]]:
    """(FFN, first column, column after the last) of the part of each FFN in a chunk."""
    start = 0
    for ffn in dict.fromkeys(piece.ffn for piece in chunk):
        stop = start + sum(p.stop - p.start for p in chunk if p.ffn == ffn)
        yield ffn, start, stop
        start = stop


def _gradient(
    model: nn.Module, example: Mapping[str, Any], output: Output, tensors: list[nn.Parameter]
) -> dict[int, Tensor | None]:
    """The gradient of f by each of ``tensors``, by the tensor's id; None where f does not depend on it."""
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        with torch.enable_grad():
            value = scalar(model, example, output)
            found: Sequence[Tensor | None] = [None] * len(tensors)  # no expert among them was reached
            if value.requires_grad:
                found = torch.autograd.grad(value, tensors, allow_unused=True)
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
    return {id(tensor): grad for tensor, grad in zip(tensors, found, strict=True)}


def _fill(row: Tensor, found: dict[int, Tensor | None], chunk: list[_Piece], theta: list[list[nn.Parameter]]) -> None:
    at = 0
    for piece in chunk:
        gradient = found[id(theta[piece.ffn][piece.tensor])]
        place = row[at : at + piece.stop - piece.start]
        if gradient is None:
            place.zero_()
        else:
            place.copy_(gradient.reshape(-1)[piece.start : piece.stop])
        at += piece.stop - piece.start


def _add(sgd: Tensor, adam: Tensor, gradients: Tensor, step: int) -> None:
    """Add the products of some columns: each block in the gradients' dtype, the blocks in float64.

    A block's rounding is about 1e-6 of its sum; float64 keeps that from growing with the number of blocks.
    """
    for block in gradients.split(step, dim=1):
        sgd += block @ block.T
        adam += block @ block.sign().T


@contextmanager
def _only(model: nn.Module) -> Iterator[None]:
    """Nothing of the model trains inside the block, so that graphs begin at the tensors that are asked for."""
    training = [p for p in model.parameters() if p.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
