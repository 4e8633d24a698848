"""Optimal brain surgeon with whole neurons: which go, and what the others do in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnkit.ops.ridge import factored
from ffnkit.ops.subset import Delayed, least_needed


def surgeon(gram: Tensor, down: Tensor, width: int, ridge: float, block: int = 1) -> tuple[Tensor, Tensor]:
    """Take neurons away until ``width`` are left, each time the one without which the outputs move least.

    With P = (G + lambda I)^-1 over the neurons that are left and w_i the columns of the output layer W, the one with
    the least ||w_i||^2 / P_ii goes; then ``W -= w_i P_i: / P_ii`` and ``P -= P_:i P_i: / P_ii``. So W is at any time
    the least-squares output layer of those left, pulled towards the old columns by lambda = ridge x the mean diagonal
    of G. Neurons that never fire (0 on the diagonal of G) go first, whatever their columns.

    Args:
        gram: (ff, ff) H^T H. down: (d, ff). block: neurons that go by the same scores, each still taken off exactly.

    Returns:
        The neurons that stay, (width,) int64, ascending, and their output layer (d, width).

    Source: Hassibi and Stork 1992; whole columns: ZipLM (arXiv 2302.04089), SlimGPT (arXiv 2412.18110), eq. 3 and its
        batched greedy pruning.
    """
    ff, tiny = len(gram), torch.finfo(gram.dtype).tiny
    inverse = torch.cholesky_inverse(factored(gram, ridge)[0])
    diagonal = inverse.diagonal().clone()
    most = least_needed(gram, down)
    gone = ff - width
    columns = gram.new_zeros(gone, ff)  # P_:i / P_ii^(1/2) of each that went, as P was then
    left = torch.ones(ff, dtype=torch.bool, device=gram.device)
    weight = down.T.to(gram.dtype, copy=True, memory_format=torch.contiguous_format)
    rest = Delayed(weight, columns, min(block, gone))
    for start in range(0, gone, block):
        stop = min(start + block, gone)
        scores = torch.minimum(rest.sizes / diagonal.clamp_min(tiny), most)
        picked = scores.masked_fill_(~left, torch.inf).topk(stop - start, largest=False).indices
        left[picked] = False
        for step, number in enumerate(picked.tolist(), start):
            root = diagonal[number].clamp_min(tiny).sqrt()
            columns[step] = (inverse[number] - columns[:step, number] @ columns[:step]) / root
            rest.move(number, step, root)
            diagonal -= columns[step].square()
        rest.advance(start, stop)
    kept = left.nonzero().squeeze(1)
    return kept, rest.subtract(gone)[kept].T
