"""Optimal brain surgeon with whole neurons: which go, and what the others do in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnkit.ops.ridge import factored


def surgeon(gram: Tensor, down: Tensor, width: int, ridge: float, block: int = 1) -> tuple[Tensor, Tensor]:
    """Take neurons away until ``width`` are left, each time the one without which the outputs move least.

    With P = (G + lambda I)^-1 over the neurons that are left and w_i the columns of the output layer W, the one with
    the least ||w_i||^2 / P_ii goes; then ``W -= w_i P_i: / P_ii`` and ``P -= P_:i P_i: / P_ii``. So W is at any time
    the least-squares output layer of those left, pulled towards the old columns by lambda = ridge x the mean diagonal
    of G.

    Args:
        gram: (ff, ff) H^T H. down: (d, ff). block: neurons that go by the same scores, each still taken off exactly;
            products with W are formed for a block at once.

    Returns:
        The neurons that stay, (width,) int64, ascending, and their output layer (d, width).

    Source: Hassibi and Stork 1992; whole columns: ZipLM (arXiv 2302.04089), SlimGPT (arXiv 2412.18110), eq. 3 and its
        batched greedy pruning.
    """
    ff, tiny = len(gram), torch.finfo(gram.dtype).tiny
    inverse = torch.cholesky_inverse(factored(gram, ridge)[0])
    rest = down.T.to(gram.dtype).contiguous().clone()  # (ff, d)
    diagonal = inverse.diagonal().clone()
    columns = gram.new_zeros(ff - width, ff)  # P_:i / P_ii^(1/2) of each that went, as P was then
    left = torch.ones(ff, dtype=torch.bool, device=gram.device)
    for start in range(0, ff - width, block):
        stop = min(start + block, ff - width)
        scores = rest.square().sum(1) / diagonal.clamp_min(tiny)
        picked = scores.masked_fill_(~left, torch.inf).topk(stop - start, largest=False).indices
        left[picked] = False
        moved = rest.new_empty(stop - start, rest.shape[1])
        for step, number in enumerate(picked.tolist(), start):
            root = diagonal[number].clamp_min(tiny).sqrt()
            columns[step] = (inverse[number] - columns[:step, number] @ columns[:step]) / root
            moved[step - start] = (rest[number] - columns[start:step, number] @ moved[: step - start]) / root
            diagonal -= columns[step].square()
        rest.addmm_(columns[start:stop].T, moved, alpha=-1)
    kept = left.nonzero().squeeze(1)
    return kept, rest[kept].T
