"""One FFN at every width: which neurons stay, what the outputs lose, and the output layer that is refitted to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnkit.calibration.statistics import Statistics
from ffnkit.io.files import spooled
from ffnkit.methods.common import lifted, norms, singles
from ffnkit.methods.narrow.calibrated import BY_LOSS, RIDGE, CalibratedFusion
from ffnkit.methods.narrow.observed import Part
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.ops.refit import RIDGES, refit
from ffnkit.ops.subset import ranked, weighed

FUSION = CalibratedFusion(width=1)  # its defaults
REFIT = RIDGES[0]


@dataclass(frozen=True)
class _Single:
    """An FFN or expert: ``order`` (ff,) of its neurons, ``gram`` (ff, ff) and ``mean`` (ff,) of them on the data."""

    order: Tensor
    gram: Tensor | None = None
    mean: Tensor | None = None


class Nested:
    """An FFN's neurons in the order in which they stay: a narrower FFN keeps a part of what a wider one keeps.

    The order is that of data-aware fusion (the loss without each neuron), and so is the output layer at each width. The
    squared errors at all widths follow from one Cholesky factor: with G = L L^T in that order, what the last neurons
    take with them is the squared norm of the last columns of W L.

    Memory: Gram matrices in float32, in temporary files where they are large.

    Args:
        seen: what the FFN and its experts did on the data (``methods.narrow.observed.observing``).
        dimensions: (d,) how much an error of each dimension of the outputs counts (``calibration.reading``).

    Attributes:
        lost: (ff + 1,) float64, the squared output error at each width, as its reader weighs it, summed over tokens and
            experts; None where no token reached it.
    """

    def __init__(self, ffn: FFN, seen: Statistics[Part], dimensions: Tensor) -> None:
        self.ffn = ffn
        self.lost: Tensor | None = None
        self.parts: list[_Single] = []
        for number, single in enumerate(singles(lifted(ffn.raw()))):
            part = seen.parts.pop((ffn.name, number), None)
            if part is None:  # an expert that no token reached: nothing is known but its weights
                self.parts.append(_Single(torch.sort(norms(single), descending=True, stable=True).indices))
                continue
            gram = part.moments.centred() if single.down_bias is not None else part.moments.second()
            read = weighed(single.down, dimensions)
            order = ranked(gram, RIDGE, read, BY_LOSS[FUSION.select])
            lost = tail_errors(gram, read, order) * part.moments.count
            self.lost = lost if self.lost is None else self.lost + lost
            self.parts.append(_Single(order, spooled(gram.float()), part.moments.mean()))

    def neurons(self, width: int) -> Neurons:
        """The FFN with so many neurons; with none, one of zeros stands in, and the mean output in the bias."""
        old = self.ffn.raw()
        if width == old.ff:
            return old
        made = [_narrowed(*pair, width) for pair in zip(singles(lifted(old)), self.parts, strict=True)]
        return (concatenate(made) if old.experts else made[0]).to(old.up.dtype)


def _narrowed(old: Neurons, part: _Single, width: int) -> Neurons:
    if not width:
        silent = old.take(part.order[:1]).map(torch.zeros_like)
        return _with_bias(silent, old, part, silent.down, part.order[:1])
    kept = part.order[:width].sort().values
    if part.gram is None:
        return old.take(kept)
    down, _ = refit(part.gram.to(old.down.device), old.down, kept, REFIT)
    return _with_bias(dataclasses.replace(old.take(kept), down=down.to(old.down.dtype)), old, part, down, kept)


def _with_bias(new: Neurons, old: Neurons, part: _Single, down: Tensor, kept: Tensor) -> Neurons:
    """With the output bias under which the mean output stays."""
    if old.down_bias is None:
        return new
    mean = part.mean if part.mean is not None else old.down.new_zeros(old.ff, dtype=torch.float64)
    bias = old.down_bias.double() + old.down.double() @ mean - down.double() @ mean[kept]
    return dataclasses.replace(new, down_bias=bias.to(old.down_bias.dtype))


def tail_errors(gram: Tensor, down: Tensor, order: Tensor) -> Tensor:
    """(ff + 1,) float64: ||H W^T - H_S D^T||^2 with S the first 0, 1, ... neurons of ``order`` and the best D for each.

    Args:
        gram: (ff, ff) H^T H. down: (d, ff). order: (ff,), each neuron once.
    """
    sorted_gram = gram[order[:, None], order].double()
    shift = max(1e-6 * float(sorted_gram.diagonal().mean()), torch.finfo(torch.float64).tiny)
    while True:
        sorted_gram.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(sorted_gram)
        if not int(failed):
            break
        shift *= 10  # less than rounding
    columns = (down.double()[:, order] @ factor).square().sum(0)
    lost = torch.cat((columns.flip(0).cumsum(0).flip(0), columns.new_zeros(1)))
    return lost.cpu()
