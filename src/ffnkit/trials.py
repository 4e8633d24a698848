"""A plan's edits on trial: the model has them inside a block and is exactly as before after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ffnkit import blocks
from ffnkit.depth import without_layers
from ffnkit.edits import Drop, Edit, Keep, Resize, Rewrite, Tie
from ffnkit.errors import FfnkitError
from ffnkit.surgery import borrowed, carry_out, merged, resize

PLAIN = (Resize, Keep, Rewrite, Tie, Drop)


@contextmanager
def trying(model: nn.Module, edits: Iterable[Edit]) -> Iterator[nn.Module]:
    """The model with the edits, for as long as the block runs. Memory beyond the model: the new weights.

    Raises:
        FfnkitError: an edit that puts special linears in place of plain ones.
    """
    edits = list(edits)
    found = {ffn.name: ffn for ffn in blocks.ffns(model)}
    with ExitStack() as stack, torch.no_grad():
        for name in dict.fromkeys(name for edit in edits for name in edit.touched):
            stack.enter_context(borrowed(found[name]))
        for edit in edits:
            if not isinstance(edit, PLAIN):
                raise FfnkitError(f"a trial of {edit.kind}", "it replaces linears", "Apply it to a copy of the model")
            if isinstance(edit, Tie):
                ffns = [found[name] for name in edit.touched]
                if edit.average:
                    resize(ffns[0], merged(ffns, edit.orders))
                for member in ffns[1:]:
                    _lend(ffns[0], member)
            elif not isinstance(edit, Drop):
                carry_out(found[edit.ffn], edit)
        if gone := [edit.layer for edit in edits if isinstance(edit, Drop)]:
            stack.callback(without_layers(model, gone)[1])  # type: ignore[arg-type]
        yield model


def _lend(ffn: blocks.FFN, member: blocks.FFN) -> None:
    """The member's linears compute with the FFN's very parameters."""
    for owner in member.owners.values():
        for site in ffn.sites:
            source, target = ffn.linear(site), member.linear(site, owner)
            target.weight, target.bias = source.weight, source.bias
