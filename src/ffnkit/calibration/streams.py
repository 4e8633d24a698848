"""The data through a model as it was and through it as it is compressed so far, side by side, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, first_tensor, kept, runs_on
from ffnkit.calibration.blockwise import Blockwise
from ffnkit.calibration.hooks import Activations, Receive
from ffnkit.calibration.reading import is_norm
from ffnkit.calibration.statistics import Statistics
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name
from ffnkit.model.running import few_tokens
from ffnkit.surgery.temporary import with_neurons

HALF = 0.5  # an FFN's output is scaled by this to see how much of it its reader gets
ROUNDING = 0.3  # relative: what the narrow numbers of a residual stream may hide of a change

Read = Callable[[FFN, Activations, Tensor | None], None]


class Streams:
    """What each FFN is to give so that what reads its output gets what it got in the model as it was.

    What reads the output (the next norm, in the block or behind it) gets R = residual + c * output. Where the blocks
    before are compressed the residual is another one, and the FFN can make up for that: beyond its own output it is to
    give (R_before - R_now) / c. c is 1 in most models; it is measured. FFNs whose reader gets something else (routed
    experts, a factor for each dimension) just have their own output to give.

    Memory beyond the model: one block's output for all batches, and what reads it.

    Args:
        found: the FFNs, in the model as it was.

    Attributes:
        factors: c, by name, of the FFNs of which there is one. before: the model as it was.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], found: list[FFN]) -> None:
        batches = kept(batches)
        self.before = Blockwise(model, batches, found)
        self.factors = _factors(model, batches[0], found) if self.before.skips else {}

    def see(self, blocks: Blockwise, group: list[FFN], seen: Statistics[Any]) -> None:
        """Let ``seen`` see what the FFNs of one block get from ``blocks``, and what they are to give beyond it."""
        wanted: dict[str, list[Tensor | None]] = {ffn.name: [] for ffn in group}

        def note(ffn: FFN, _: Activations, rows: Tensor | None) -> None:
            wanted[ffn.name].append(rows)

        def compare(ffn: FFN, acts: Activations, rows: Tensor | None) -> None:
            before = wanted[ffn.name].pop(0) if wanted[ffn.name] else None
            if before is not None and rows is not None and ffn.name in self.factors:
                missing = (before.float() - rows.float()) / self.factors[ffn.name]
                acts = dataclasses.replace(acts, missing=missing)
            seen.update(ffn, acts)

        if any(ffn.name in self.factors for ffn in group):
            _watch(self.before, group, note, last=True)
            self.before.advance(group)
        _watch(blocks, group, compare)


def _watch(blocks: Blockwise, group: list[FFN], read: Read, *, last: bool = False) -> None:
    with _reading(blocks.modules[block_name(group[0].name)], read) as receive:
        blocks.watch(group, receive, last=last)


@contextmanager
def _reading(block: nn.Module, read: Read) -> Iterator[Receive]:
    """``read`` is called with each call of an FFN, and the rows (n, d) that the next norm or block gets of it.

    Gives what the calls of the FFNs of this block are to be handed to.
    """
    waiting: list[tuple[FFN, Activations]] = []

    def hand_on(rows: Tensor | None) -> None:
        ready = [each for each in waiting if rows is None or each[1].output.shape == rows.shape]
        waiting[:] = [each for each in waiting if not any(each is other for other in ready)]
        for ffn, acts in ready:
            read(ffn, acts, rows)

    def reads(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None and waiting:
            hand_on(given.reshape(-1, given.shape[-1]).clone())

    def ends(_: nn.Module, __: Any, output: Any) -> None:
        value = first_tensor(output)
        hand_on(value.reshape(-1, value.shape[-1]).clone())
        hand_on(None)  # nothing that fits came

    norms = [module for module in block.modules() if is_norm(module)]
    handles = [norm.register_forward_pre_hook(reads, with_kwargs=True) for norm in norms]
    handles.append(block.register_forward_hook(ends))
    try:
        yield lambda ffn, acts: waiting.append((ffn, acts))
    finally:
        for handle in handles:
            handle.remove()


def _factors(model: nn.Module, batch: Batch, found: list[FFN]) -> dict[str, float]:
    """How much of each FFN's output what reads it gets; FFNs that it gets something else of are left out."""
    factors: dict[str, float] = {}
    got: list[tuple[Tensor, Tensor]] = []

    def note(_: FFN, acts: Activations, rows: Tensor | None) -> None:
        if rows is not None and acts.expert is None:
            got.append((acts.output.float().clone(), rows.float()))

    with Blockwise(model, [few_tokens(batch, partial(runs_on, model))], found) as probe:
        for group in probe.groups:
            for ffn in group:
                got.clear()
                _watch(probe, [ffn], note)
                old = ffn.raw()
                bias = None if old.down_bias is None else old.down_bias * HALF
                with with_neurons(ffn, dataclasses.replace(old, down=old.down * HALF, down_bias=bias)):
                    _watch(probe, [ffn], note)
                if len(got) == 2 and (factor := _factor(*got[0], got[1][1])) is not None:
                    factors[ffn.name] = factor
            probe.advance(group)
    return factors


def _factor(output: Tensor, rows: Tensor, halved: Tensor) -> float | None:
    """c where rows - halved = HALF * c * output, up to rounding."""
    change, given = rows - halved, output * HALF
    factor = float((change * given).sum() / given.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    far = float((change - factor * given).norm()) > ROUNDING * abs(factor) * float(given.norm())
    return None if far or not factor else factor
