"""Batches for distillation, in an order that can be found again at any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ffnkit.errors import FfnkitError

Collate = Callable[[list[Any]], Mapping[str, Tensor]]


class Data:
    """Examples batched in a seeded order, or ready batches in their own.

    Args:
        data: examples by index, where ``collate`` is given; else an iterable of batches; of a generator they are held.
        collate: makes a batch of a list of examples.
        batch_size: examples a batch.
        seed: order of the examples; with ready batches, of a DataLoader that shuffles.
    """

    def __init__(self, data: Any, collate: Collate | None, batch_size: int, seed: int) -> None:
        self.data: Any = data if not isinstance(data, Iterator) else list(data) if collate else _Replayed(data)
        self.collate, self.batch_size, self.seed = collate, batch_size, seed

    def steps(self, epochs: float) -> int:
        """Steps of so many passes. Raises FfnkitError where the data have no length, or a length of zero."""
        try:
            size = len(self.data)
        except TypeError:
            raise FfnkitError("distillation epochs", "the data have no length", "Set steps in the settings") from None
        if size == 0:
            raise FfnkitError("distillation data", "they are empty", "Give at least one batch")
        batches = math.ceil(size / self.batch_size) if self.collate else size
        return max(1, math.ceil(epochs * batches))

    def batches(self, start: int, total: int) -> Iterator[Mapping[str, Tensor]]:
        """Batches of the steps ``start`` to ``total`` (from 0, exclusive), over as many passes as it takes."""
        step, epoch = 0, 0
        while start < total and step < total:
            before = step
            for make in self._epoch(epoch):
                if step >= total:
                    return
                if step >= start:
                    yield make()
                step += 1
            epoch += 1
            if step == before:
                raise FfnkitError("distillation data", "they are empty", "Give at least one batch")

    def _epoch(self, epoch: int) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
        """One pass; a batch of examples is made only where it is wanted."""
        if self.collate is None:
            yield from self._ready(epoch)
            return
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        for place in range(0, len(order), self.batch_size):
            yield partial(self._make, self.collate, order[place : place + self.batch_size])

    def _make(self, collate: Collate, chosen: list[int]) -> Mapping[str, Tensor]:
        return collate([self.data[i] for i in chosen])

    def _ready(self, epoch: int) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
        with torch.random.fork_rng(devices=[]):  # a DataLoader that shuffles draws its seed when iteration starts
            torch.manual_seed(self.seed + epoch)
            iterator = iter(self.data)
            first = next(iterator, None)
        if first is None:
            return
        yield partial(_same, first)
        for batch in iterator:
            yield partial(_same, batch)


class _Replayed:
    """What an iterator gives, held as it is asked for, so that it can be gone through again."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.held: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while place < len(self.held) or self._more():
            yield self.held[place]
            place += 1

    def __len__(self) -> int:
        """All of them; the iterator must come to an end."""
        while self._more():
            pass
        return len(self.held)

    def _more(self) -> bool:
        before = len(self.held)
        self.held.extend(islice(self.source, 1))
        return len(self.held) > before


def _same(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return batch
