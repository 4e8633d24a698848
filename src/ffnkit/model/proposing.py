"""The row that a family of an unknown layout may need."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ffnkit.model.families.ffns import Layout
from ffnkit.model.ffn import FFN, activations
from ffnkit.model.linear import features, linears
from ffnkit.ops import local


def proposed(name: str, owner: nn.Module, up: str, down: str) -> Layout:
    """A row for linears d -> ff and ff -> d of an owner, with the gate beside the first where there is one.

    Which of two is the gate is tried where the owner runs on hidden states; else it is the one that is called so, or
    the first.
    """
    rows = list(_rows(name, owner, up, down))
    return next((row for row in rows if len(rows) > 1 and _computes(owner, row)), rows[0])


def written(row: Layout) -> str:
    """The row as code."""
    gate = f', gate="{row.gate}"' if row.gate else ""
    first = ", up_first=True" if row.up_first else ""
    return f'ffnkit.Layout("{row.name}", up="{row.up}", down="{row.down}"{gate}{first})'


def _rows(name: str, owner: nn.Module, up: str, down: str) -> Iterator[Layout]:
    """The rows that fit the shapes, the likely one first."""
    shapes = {path: features(linear) for path, linear in linears(owner)}
    if shapes[up][0] == 2 * shapes[down][1]:
        yield Layout(name, up, down, gate=up)
        yield Layout(name, up, down, gate=up, up_first=True)
        return
    near = up.rpartition(".")[0]
    alike = [p for p, shape in shapes.items() if shape == shapes[up] and p.rpartition(".")[0] == near and p != down]
    if len(alike) == 2:
        gate, other = sorted(alike, key=lambda path: "gate" not in path)
        yield Layout(name, other, down, gate=gate)
        yield Layout(name, gate, down, gate=other)
    else:
        yield Layout(name, up, down)


@torch.no_grad()
def _computes(owner: nn.Module, row: Layout) -> bool:
    """Whether what down receives is what the row says, for some activation."""
    ffn, seen = FFN("", owner, row), []
    neurons = ffn.raw()
    if neurons.up.is_meta:
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, neurons.up.shape[-1], generator=draw).to(neurons.up)
    handle = ffn.linear("down").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        owner(x)
    except Exception:  # it wants more than hidden states
        return False
    finally:
        handle.remove()
    if not seen:
        return False
    hidden = seen[0].reshape(-1, seen[0].shape[-1])
    return local.activation_of(neurons, x[0], hidden, activations(ffn)) is not None
