"""Streaming moments of activations: means and the Gram matrix, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512  # columns of h whose products with the others are formed at a time
NOISE = 1e-6  # of a mean square: products are rounded to float32
DOUBLE_UP_TO = 6144  # columns; a float64 Gram matrix of more takes over 300 MB


class Moments:
    """Weighted sums over tokens of h, |h| and h h^T.

    Products of a batch are formed in float32 around its mean, so that what varies little is not lost in their
    rounding, and summed in float64 (float32 for very wide FFNs, where the ridge of every use is far above float32's).

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
        share = rows.new_ones(len(rows)) if weights is None else weights.to(rows)
        count = float(share.sum(dtype=torch.float64))
        if count <= 0:
            return
        self._absolute += share @ rows.abs()
        centre = share @ rows / count
        rows = rows - centre  # up to the rounding of the centre, which ``rest`` takes up
        weighed = rows if weights is None else rows * share[:, None]
        rest, exact = share @ rows, self._gram.dtype
        total = rest.double() + count * centre.double()
        self.count += count
        self._sum += total
        left, right = torch.stack((centre, rest)).to(exact), torch.stack((total, centre)).to(exact)
        for part in self._panels():
            gram = self._gram[part, : part.stop]
            gram += weighed[:, part].T @ rows[:, : part.stop]
            gram.addmm_(left[:, part].T, right[:, : part.stop])

    def mean(self) -> Tensor:
        """(width,), float64."""
        return self._sum / max(self.count, 1e-300)

    def absolute(self) -> Tensor:
        """The mean of |h|, (width,), float64."""
        return self._absolute / max(self.count, 1e-300)

    def second(self, *, last: bool = False) -> Tensor:
        """H^T H / n, (width, width).

        Args:
            last: nothing is asked of these moments afterwards: the sums become the result, and no copy is made.
        """
        gram = self._gram if last else self._gram.clone()
        for part in self._panels():
            gram[: part.start, part] = gram[part, : part.start].T
        return gram.div_(max(self.count, 1e-300))

    def centred(self, *, last: bool = False) -> Tensor:
        """The covariance, (width, width); ``last`` as in :meth:`second`.

        What does not vary beyond the rounding of the products (all, of a single token) has none: relative to it any
        ridge would be noise too.
        """
        mean, gram = self.mean().to(self._gram.dtype), self.second(last=last)
        least = NOISE * gram.diagonal()
        constant = (gram.addr_(mean, mean, alpha=-1).diagonal() <= least).nonzero().squeeze(1)
        if len(constant):
            gram.index_fill_(0, constant, 0.0).index_fill_(1, constant, 0.0)
        return gram

    def merge(self, other: Moments) -> None:
        """Add what ``other`` saw."""
        self.count += other.count
        self._sum += other._sum.to(self._sum.device)
        self._absolute += other._absolute.to(self._sum.device)
        self._gram += other._gram.to(self._gram.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, as tensors by name."""
        count = torch.tensor(self.count, dtype=torch.float64)
        return {"count": count, "sum": self._sum, "absolute": self._absolute, "gram": self._gram}

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Moments:
        """The moments of which :meth:`state_dict` gave the sums."""
        moments = cls(len(state["sum"]), state["sum"].device)
        moments.count = float(state["count"])
        moments._sum, moments._absolute, moments._gram = state["sum"], state["absolute"], state["gram"]
        return moments

    def forget(self) -> None:
        """Let the matrix go; means stay."""
        self._gram = self._gram.new_empty(0, 0)

    def _panels(self) -> list[slice]:
        """The panels of rows of which the sums hold what lies up to the diagonal."""
        width = len(self._sum)
        return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]
