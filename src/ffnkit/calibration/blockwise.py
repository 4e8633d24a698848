"""Run a model block by block over calibration data: each block once, on what the blocks before it gave.

A block is the layer that holds an FFN. While block l is watched, the blocks before it are not computed again: they
return the output that the last of them gave for this batch. Embeddings, masks and position encodings are computed by
the model itself, so no family needs code here. Where a family does not bear that (outputs that change shape between
stages, blocks that run several times), the whole model runs instead; the first batch is compared to tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, forward, kept, prepared
from ffnkit.calibration.hooks import Receive, hooked
from ffnkit.calibration.padding import TokenMasks
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import run_uneven_experts
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery.temporary import with_neurons

SAME = 1e-4  # relative: the same computation in another order of batches at most


class _Enough(Exception):
    """Ends a pass once the block of interest has run."""


class Blockwise:
    """Block-wise calibration: the data at one block after the other.

    Memory beyond the model: the batches, and one block's outputs for them.

    Args:
        batches: keyword arguments of the model; labels may be among them.
        found: the FFNs of interest, in any order.

    Attributes:
        groups: the FFNs by block, in the order in which the blocks run.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], found: list[FFN]) -> None:
        self.model, self.found = model, found
        self.batches = [prepared(model, batch) for batch in kept(batches)]
        self.masks = TokenMasks.of_ffns(model, found)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        by_block: dict[str, list[FFN]] = {}
        for ffn in found:
            by_block.setdefault(block_name(ffn.name), []).append(ffn)
        self.calls = self._order(list(by_block))
        silent = next((name for name in by_block if not self.calls.get(name)), None)
        if silent is not None:
            what = f"{by_block[silent][0].name} did not run on the data given"
            raise FfnkitError("calibrating", what, "Give inputs of every stack (text, images, decoder inputs)")
        order = [name for name in self.calls if name in by_block]
        self.groups = [by_block[name] for name in order]
        self._done: dict[str, list[str]] = {}  # blocks behind us, by the list that holds them
        self._outputs: dict[str, list[Any]] = {}  # what the last of them gave, a batch each
        self._whole = False
        self._passed: str | None = None  # the block whose outputs are there since it was watched
        self._lent = ExitStack()

    def __enter__(self) -> Blockwise:
        return self

    def __exit__(self, *_: Any) -> None:
        """The model is as it was before the first :meth:`install`."""
        self._lent.close()

    def install(self, ffn: FFN, neurons: Neurons) -> None:
        """Let an FFN run with other neurons, of any width, until the block of ``with`` ends."""
        self._lent.enter_context(with_neurons(ffn, neurons))
        if ffn.layout.experts and run_uneven_experts(self.model):
            self._lent.callback(self.model.set_experts_implementation, "grouped_mm")  # type: ignore[arg-type]

    def watch(self, group: list[FFN], receive: Receive, *, last: bool = False) -> None:
        """Hand every call of the FFNs of one block to ``receive``, over all batches.

        Args:
            last: the block stays as it is and is not watched again before :meth:`advance`, which then need not run it.
        """
        name = block_name(group[0].name)
        self._passed = None
        keep = last and not self._whole and self._stops(group)
        with self.masks.watching(), hooked(group, receive, self.masks):
            for number, batch in enumerate(self.batches):
                self.masks.start(batch)
                output = self._run(number, name if self._stops(group) else None)
                if keep:
                    self._room(name)[number] = output
        self._passed = name if keep else None

    def advance(self, group: list[FFN]) -> None:
        """Keep what this block, as it is now, gives for every batch; blocks that come later start from there."""
        name = block_name(group[0].name)
        holder = name.rpartition(".")[0]
        if self._whole or not self._stops(group) or not name:
            return
        outputs = self._room(name)
        if self._passed != name:
            for number in range(len(self.batches)):
                outputs[number] = self._run(number, name)
        passed = [n for n in self.calls if n.rpartition(".")[0] == holder]
        done = passed[: passed.index(name) + 1]
        first = holder not in self._done
        self._done[holder] = done
        later = passed[len(done) :]
        if not (self._faithful(later) and self._skippable(passed) if first else self._runs(later)):
            self._whole = True
            self._done.clear()
            self._outputs.clear()

    def finish(self, number: int) -> None:
        """Run one batch to the model's end, for hooks to see; blocks behind us are not run again."""
        self._run(number, None)

    def _room(self, name: str) -> list[Any]:
        """Where a block's outputs go, a batch each: each takes the place of the one that it was computed from."""
        return self._outputs.setdefault(name.rpartition(".")[0], [None] * len(self.batches))

    # --- one pass

    def _run(self, number: int, until: str | None) -> Any:
        """One batch through the model, up to the block ``until``; gives that block's output."""
        caught: list[Any] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            caught.append(_detached(output))
            raise _Enough

        block = self.modules[until] if until is not None else None
        handle = block.register_forward_hook(stop) if block is not None else None
        with torch.no_grad(), evaluating(self.model), self._skipping(number):
            try:
                forward(self.model, self.batches[number])
            except _Enough:
                pass
            finally:
                if handle is not None:
                    handle.remove()
        return caught[0] if caught else None

    @contextmanager
    def _skipping(self, number: int) -> Iterator[None]:
        """Blocks behind us return what the last of them gave for this batch."""
        replaced: list[nn.Module] = []
        try:
            for holder, names in self._done.items():
                output = self._outputs[holder][number]
                for name in names:
                    module = self.modules[name]
                    module.forward = _returning(output)
                    replaced.append(module)
            yield
        finally:
            for module in replaced:
                vars(module).pop("forward", None)

    def _order(self, blocks: list[str]) -> dict[str, int]:
        """How often each block and its neighbours in their list run on the first batch, in the order of first runs."""
        holders = {name.rpartition(".")[0] for name in blocks}
        calls: dict[str, int] = {}

        def count(name: str) -> Any:
            def hook(*_: Any) -> None:
                calls[name] = calls.get(name, 0) + 1

            return hook

        near = [n for n in self.modules if n and n.rpartition(".")[0] in holders and n.rpartition(".")[2].isdigit()]
        near += [n for n in blocks if n not in near]
        handles = [self.modules[name].register_forward_pre_hook(count(name)) for name in near]
        try:
            with torch.no_grad(), evaluating(self.model):
                forward(self.model, self.batches[0])
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _stops(self, group: list[FFN]) -> bool:
        """Whether all calls of these FFNs happen in one call of their block."""
        return all(self.calls.get(block_name(ffn.name)) == 1 and not ffn.tied for ffn in group)

    def _faithful(self, later: list[str]) -> bool:
        """Whether the next block gives the same with the earlier ones skipped as with all of them run."""
        if not later:
            return True
        short = self._tried(later[0])
        held, self._done = self._done, {}
        try:
            full = self._run(0, later[0])
        finally:
            self._done = held
        return short is not None and _same(short, full)

    def _skippable(self, passed: list[str]) -> bool:
        """Whether the last block gives the same with all others skipped: none takes more from an earlier one (keys and
        values that layers share) than what its neighbour gives."""
        if len(passed) < 3:
            return True
        *_, before, last = passed
        holder = last.rpartition(".")[0]
        done, outputs = self._done, self._outputs
        try:
            self._done = {}
            given, full = self._run(0, before), self._run(0, last)
            self._done = done | {holder: passed[:-1]}
            self._outputs = outputs | {holder: [given]}
            short = self._tried(last)
        finally:
            self._done, self._outputs = done, outputs
        return short is not None and _same(short, full)

    def _runs(self, later: list[str]) -> bool:
        """Whether the next block runs with the earlier ones skipped."""
        return not later or self._tried(later[0]) is not None

    def _tried(self, until: str) -> Any:
        """The first batch up to a block; None where it does not run with the earlier ones skipped."""
        try:
            return self._run(0, until)
        except Exception:  # shapes that do not fit, values that an earlier block would have left: by family
            return None


def _returning(output: Any) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        return output

    return forward


def _detached(output: Any) -> Any:
    """The output without what is not needed again: caches are left out."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detached(value) for value in output)
    return output


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in _tensors(each)]
    return [tensor for each in value.values() for tensor in _tensors(each)] if isinstance(value, Mapping) else []


def _same(first: Any, second: Any) -> bool:
    one, two = _tensors(first), _tensors(second)
    if len(one) != len(two) or any(a.shape != b.shape for a, b in zip(one, two, strict=True)):
        return False
    return all(bool((a - b).norm() <= SAME * b.norm() + 1e-12) for a, b in zip(one, two, strict=True))
