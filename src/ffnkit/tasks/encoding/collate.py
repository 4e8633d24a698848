"""Padded batches of examples whose labels are tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffnkit.tasks.running import IGNORED

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Padded:
    """Pads ``input_ids``, ``labels`` and ``token_type_ids``, each to its longest row; makes ``attention_mask``.

    Packed rows have ``position_ids`` in its place, by which a model keeps examples apart; padding is at position 0.

    Attributes:
        pad: the padding token; labels are padded with -100.
        left: pad before the tokens, as decoders want it that go on with a prompt.
    """

    pad: int
    left: bool = False

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        names = [name for name in ("input_ids", "token_type_ids", "labels") if name in rows[0]]
        fills = {"labels": IGNORED}
        batch = {name: self._stacked([row[name] for row in rows], fills.get(name, self.pad)) for name in names}
        if "position_ids" in rows[0]:
            batch["position_ids"] = self._stacked([row["position_ids"] for row in rows], 0)
        else:
            batch["attention_mask"] = self._stacked([[1] * len(row["input_ids"]) for row in rows], 0)
        return batch

    def _stacked(self, rows: list[list[int]], fill: int) -> Tensor:
        import torch

        batch = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
        for place, row in enumerate(rows):
            if row:
                target = slice(-len(row), None) if self.left else slice(len(row))
                batch[place, target] = torch.tensor(row, dtype=torch.long)
        return batch
