"""A matrix of few entries beside a weight: its products, and their gradient, with neither ever there as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

AT_ONCE = 1 << 20  # numbers of tokens times entries that are gathered at a time
BLOCK = 512  # rows of the weight that get their entries at a time
TOKENS = 256  # tokens that entries are summed over at a time: both sides stay in the cache
_BOUNDS = WeakTensorKeyDictionary()  # places of entries -> shape and version that they had, and their blocks
MANY = 0.01  # of a weight's entries: on accelerators the gradient of more is taken out of products of blocks


@dataclass(frozen=True)
class Entries:
    """S (out, in), zero but for N entries.

    Attributes:
        index: (N,) ascending: row times in plus column of each entry.
        values: (N,); their dtype is the one that sums with a weight are formed in.
        shape: (out, in).
        scale: S is the values times it.
    """

    index: Tensor
    values: Tensor
    shape: tuple[int, int]
    scale: float = 1.0

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each entry."""
        index = self.index.long()
        return index // self.shape[1], index % self.shape[1]

    # --- products

    def blocks(self, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """First row, and W + S of the rows from there in ``dtype``, a block at a time.

        Args:
            weight: W (out, in).
        """
        exact = self.values.dtype
        for start, first, last in self._bounds():
            block = weight[start : start + BLOCK].to(exact, copy=True, memory_format=torch.contiguous_format)
            index = self.index[first:last].long() - start * self.shape[1]
            block.view(-1).index_add_(0, index, self.values[first:last], alpha=self.scale)
            yield start, block.to(dtype)

    def product(self, tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(W + S) x + b of each of (n, in) tokens, (n, out)."""
        y = tokens.new_empty(len(tokens), self.shape[0])
        for start, block in self.blocks(weight, tokens.dtype):
            torch.mm(tokens, block.T, out=y[:, start : start + len(block)])
        return y if bias is None else y.add_(bias)

    def product_back(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the tokens, (n, in), from that of the outputs, (n, out)."""
        exact = torch.promote_types(rows.dtype, torch.float32)
        x_grad = rows.new_zeros(len(rows), self.shape[1], dtype=exact)
        for start, block in self.blocks(weight, rows.dtype):
            part = rows[:, start : start + len(block)]
            if rows.dtype == exact:
                x_grad.addmm_(part, block)
            else:  # parts are rounded once, their sum once more
                x_grad += part @ block
        return x_grad.to(rows.dtype)

    def add(self, y: Tensor, tokens: Tensor) -> None:
        """``y += S x``, so many entries at a time as memory is meant to hold; in the dtype of y."""
        row, column = self.places()
        self._scatter(y, tokens, row, column)

    def add_back(self, x_grad: Tensor, rows: Tensor) -> None:
        """``x_grad += S^T gY``."""
        row, column = self.places()
        self._scatter(x_grad, rows, column, row)

    def _scatter(self, y: Tensor, x: Tensor, into: Tensor, source: Tensor) -> None:
        given, step = self.values.to(x.dtype), max(1, AT_ONCE // max(len(x), 1))
        for row, column, value in zip(into.split(step), source.split(step), given.split(step), strict=True):
            y.index_add_(1, row, x.index_select(1, column).mul_(value), alpha=self.scale)

    # --- the gradient

    def gradient(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The sum over tokens of gY[row] x[column] for each entry, (N,), in float32 or more; ``scale`` is left out.

        Operations: 2 n N; torch's sampled product does them on a CPU, for which both sides are turned over once.
        """
        if self._by_sampling(rows):
            return self._sampled(rows, tokens)
        row, column = self.places()
        exact = torch.promote_types(rows.dtype, torch.float32)
        if len(row) > MANY * self.shape[0] * self.shape[1]:
            parts = []
            for start, first, last in self._bounds():
                product = rows[:, start : start + BLOCK].T @ tokens
                parts.append(product[row[first:last] - start, column[first:last]].to(exact))
            return torch.cat(parts)
        step = max(1, AT_ONCE // max(len(rows), 1))
        pairs = zip(row.split(step), column.split(step), strict=True)
        return torch.cat([(rows.index_select(1, r) * tokens.index_select(1, c)).sum(0, dtype=exact) for r, c in pairs])

    def _by_sampling(self, rows: Tensor) -> bool:
        return rows.device.type == "cpu" and 2 * len(self.index) > sum(self.shape)

    def _sampled(self, rows: Tensor, tokens: Tensor) -> Tensor:
        row, column = self.places()
        exact = torch.promote_types(rows.dtype, torch.float32)
        ends = torch.searchsorted(row, torch.arange(self.shape[0] + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the layout, once a process: it is in beta
            blank = torch.zeros(len(row), dtype=exact)
            total = torch.sparse_csr_tensor(ends, column, blank, self.shape, check_invariants=False)
        for g, x in zip(rows.split(TOKENS), tokens.split(TOKENS), strict=True):
            total = torch.sparse.sampled_addmm(total, g.to(exact).T, x.to(exact))
        return total.values()

    def _bounds(self) -> list[tuple[int, int, int]]:
        """First row of each block, and its first and last entry; a device is asked once for each choice of entries."""
        out, inner = self.shape
        key = None if self.index.is_inference() else (self.shape, self.index._version)
        known, bounds = _BOUNDS.get(self.index, (None, []))
        if key is None or known != key:
            starts = torch.arange(0, out, BLOCK, device=self.index.device)
            edges = torch.searchsorted(self.index.long(), starts * inner).tolist() + [len(self.index)]
            bounds = list(zip(range(0, out, BLOCK), edges, edges[1:], strict=False))
            _BOUNDS[self.index] = key, bounds
        return bounds
