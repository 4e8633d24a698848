"""Streaming moments of activations: means and the Gram matrix, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

DOUBLE_UP_TO = 6144  # columns; a float64 Gram matrix of more takes over 300 MB


class Moments:
    """Weighted sums over tokens of h, |h| and h h^T.

    Products of a batch are formed in float32 and summed in float64 (float32 for very wide FFNs, where the ridge of
    every use is far above float32's rounding).

    Args:
        width: columns of h.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        exact = torch.float64 if width <= DOUBLE_UP_TO else torch.float32
        self.count = 0.0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._absolute = torch.zeros(width, dtype=torch.float64, device=device)
        self._gram = torch.zeros(width, width, dtype=exact, device=device)

    def add(self, h: Tensor, weights: Tensor | None = None) -> None:
        """Tokens h (n, width), each weighing ``weights`` (n,) or 1."""
        rows = h.detach().float()
        if weights is None:
            self.count += len(rows)
            self._sum += rows.sum(0, dtype=torch.float64)
            self._absolute += rows.abs().sum(0, dtype=torch.float64)
            self._gram += rows.T @ rows
            return
        share = weights.to(rows)
        self.count += float(share.sum())
        self._sum += (rows * share[:, None]).sum(0, dtype=torch.float64)
        self._absolute += (rows.abs() * share[:, None]).sum(0, dtype=torch.float64)
        self._gram += (rows * share[:, None]).T @ rows

    def mean(self) -> Tensor:
        """(width,), float64."""
        return self._sum / max(self.count, 1e-300)

    def absolute(self) -> Tensor:
        """The mean of |h|, (width,), float64."""
        return self._absolute / max(self.count, 1e-300)

    def second(self) -> Tensor:
        """H^T H / n, (width, width)."""
        return self._gram / max(self.count, 1e-300)

    def centred(self) -> Tensor:
        """The covariance, (width, width)."""
        mean = self.mean()
        return self.second() - torch.outer(mean, mean).to(self._gram.dtype)
