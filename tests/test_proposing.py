"""The row that is proposed for an unknown layout works once it is added, gates included."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns

D, FF = 8, 20


class Block(nn.Module):
    """An FFN under names that no family has; ``kind`` says which of them is the gate."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.alpha = nn.Linear(D, 2 * FF if "fused" in kind else FF)
        if kind in ("first", "second", "gate"):
            self.add_module("my_gate" if kind == "gate" else "beta", nn.Linear(D, FF))
        self.omega = nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        a = self.alpha(x)
        if self.kind == "plain":
            return self.omega(functional.gelu(a))
        b = (
            a.chunk(2, -1)[1]
            if "fused" in self.kind
            else getattr(self, "my_gate" if self.kind == "gate" else "beta")(x)
        )
        a = a.chunk(2, -1)[0] if "fused" in self.kind else a
        gate, up = (a, b) if self.kind in ("first", "fused") else (b, a)
        return self.omega(functional.silu(gate) * up)


class Unknown(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(kind) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("meta", [False, True], ids=["weights", "empty"])
@pytest.mark.parametrize("kind", ["plain", "first", "second", "gate", "fused", "fused up first"])
def test_the_proposed_row_works(kind: str, meta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = Unknown(kind)
    with pytest.raises(FfnkitError) as caught:
        ffns(model)
    text = re.search(r"ffnkit\.LAYOUTS\.append\((.*)\)", str(caught.value))
    assert text is not None
    row: Any = eval(text[1], {"ffnkit": fk})
    gates = {"plain": None, "first": "alpha", "second": "beta", "gate": "my_gate"}
    if not meta or kind not in ("second", "fused up first"):  # without numbers the first is taken
        assert row.gate == gates.get(kind, "alpha") and row.up_first == (kind == "fused up first")
    monkeypatch.setattr("ffnkit.model.families.ffns.LAYOUTS", [*fk.LAYOUTS, row])
    assert [(f.width, f.gated) for f in ffns(model)] == [(FF, kind != "plain")] * 2
