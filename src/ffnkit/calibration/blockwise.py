"""Run a model block by block over calibration data: each block once, on what the blocks before it gave.

A block is the layer that holds an FFN. While block l is watched, the blocks before it are not computed again: they
return the output that the last of them gave for this batch. Embeddings, masks and position encodings are computed by
the model itself, so no family needs code here. Where a family does not bear that, blocks run again: those of a stack
of which others take more than the last output (LLaVA's language model takes what the last vision layer but one gave),
or whose own later blocks do (keys of earlier layers, sums over layers), and where shapes change between stages. The
first rows are walked through beforehand to tell, at every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, forward, kept, prepared, runs_on
from ffnkit.calibration.going_on import again, keep
from ffnkit.calibration.hooks import Receive, hooked
from ffnkit.calibration.padding import TokenMasks
from ffnkit.calibration.statistics import Statistics
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.errors import FfnkitError
from ffnkit.io.files import held
from ffnkit.io.progress import counted
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name
from ffnkit.model.running import few_tokens
from ffnkit.nn.grouped_experts import run_uneven_experts
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery.temporary import with_neurons

Beside = Callable[[], AbstractContextManager[Any]]

SAME = 1e-4  # relative: the same computation in another order of batches at most


class _Enough(Exception):
    """Ends a pass once the block of interest has run."""


class Blockwise:
    """Block-wise calibration: the data at one block after the other.

    Memory beyond the model: the batches, and one block's outputs for them.

    Args:
        batches: keyword arguments of the model; labels may be among them. Or statistics of a pass over them: then
            :meth:`see` reads these, and the first batches, which lie beside them, are what the model runs on.
        found: the FFNs of interest, in any order.
        beside: what is done to the rest of the model while it runs; entered for each pass, and left after it.

    Attributes:
        groups: the FFNs by block, in the order in which the blocks run.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch] | StatisticsFile,
        found: list[FFN],
        beside: Beside = nullcontext,
    ) -> None:
        self.model, self.found, self._beside = model, found, beside
        self.stored = batches if isinstance(batches, StatisticsFile) else None
        if isinstance(batches, StatisticsFile):
            batches.check(model)
            batches = batches.probe
        self.batches = [prepared(model, batch) for batch in kept(batches)]
        self.masks = TokenMasks.of_ffns(model, found)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        by_block: dict[str, list[FFN]] = {}
        for ffn in found:
            by_block.setdefault(block_name(ffn.name), []).append(ffn)
        whole, self.batches = self.batches, [dict(few_tokens(self.batches[0], partial(runs_on, model)))]
        self.calls = self._order(list(by_block))
        silent = next((name for name in by_block if not self.calls.get(name)), None)
        if silent is not None:
            what = f"{by_block[silent][0].name} did not run on the data given"
            raise FfnkitError("calibrating", what, "Give inputs of every stack (text, images, decoder inputs)")
        order = [name for name in self.calls if name in by_block]
        self.groups = [by_block[name] for name in order]
        self._done: dict[str, list[str]] = {}  # blocks behind us, by the list that holds them
        self._outputs: dict[str, list[Any]] = {}  # what the last of them gave, a batch each
        self._kept: dict[str, Any] = {}  # what of it lies in files, as plain data
        self._alone: set[str] = set()  # lists whose blocks are skipped for blocks of the same list only
        self._whole: set[str] = set()  # and those whose blocks always run
        self._passed: str | None = None  # the block whose outputs are there since it was watched
        self._lent = ExitStack()
        self._walk()
        self.batches = whole

    def __enter__(self) -> Blockwise:
        return self

    def __exit__(self, *_: Any) -> None:
        """The model is as it was before the first :meth:`install`."""
        self._lent.close()

    @property
    def skips(self) -> bool:
        """Whether no block of these FFNs runs again once it is behind us, nor sees another call of theirs."""
        return not self._alone and all(self._stops(g) and self._skips(block_name(g[0].name)) for g in self.groups)

    def install(self, ffn: FFN, neurons: Neurons) -> None:
        """Let an FFN run with other neurons, of any width, until the block of ``with`` ends."""
        self._lent.enter_context(lent(self.model, ffn, neurons))

    def watch(self, group: list[FFN], receive: Receive, *, last: bool = False) -> None:
        """Hand every call of the FFNs of one block to ``receive``, over all batches.

        Args:
            last: the block stays as it is and is not watched again before :meth:`advance`, which then need not run it.
        """
        name = block_name(group[0].name)
        self._passed = None
        keep = last and self._stops(group) and self._skips(name)
        with self.masks.watching(), hooked(group, receive, self.masks):
            for number, batch in enumerate(counted(self.batches, "what it gets")):
                self.masks.start(batch)
                output = self._run(number, name if self._stops(group) else None, _holder(name))
                if keep:
                    self._room(name)[number] = output
        self._passed = name if keep else None

    def see(self, group: list[FFN], seen: Statistics[Any], *, last: bool = False) -> None:
        """Let ``seen`` see every call of the FFNs of one block, over all batches; ``last`` as of :meth:`watch`."""
        if self.stored is not None:
            self.stored.fill(group, seen)
        else:
            self.watch(group, seen.update, last=last)

    def advance(self, group: list[FFN]) -> None:
        """Keep what this block, as it is now, gives for every batch; blocks that come later start from there."""
        name = block_name(group[0].name)
        if not self._stops(group) or not self._skips(name):
            return
        outputs = self._room(name)
        if self._passed != name:
            for number in range(len(self.batches)):
                outputs[number] = self._run(number, name, _holder(name))
        self._pass(name)

    def keep(self, folder: Path, name: str) -> dict[str, Any]:
        """Leave what the blocks behind us gave in files of a folder, whose names begin with ``name``; as plain data.

        Only what is new since the last call is written. Raises CannotKeep where no file holds it.
        """
        for holder, passed in self._done.items():
            if self._kept.get(holder, {}).get("blocks") == passed:
                continue
            outputs, told = self._outputs[holder], []
            for number, output in enumerate(outputs):
                outputs[number], row = keep(output, folder / f"ffnkit-{name}-{holder}-{len(passed)}-{number}")
                told.append(row)
            self._kept[holder] = {"blocks": list(passed), "outputs": told}
        return dict(self._kept)

    def restore(self, folder: Path, kept: dict[str, Any]) -> None:
        """Be where another object of the same model and batches was when it gave ``kept``."""
        self._kept = dict(kept)
        self._done = {holder: list(each["blocks"]) for holder, each in kept.items()}
        self._outputs = {holder: [again(told, folder) for told in each["outputs"]] for holder, each in kept.items()}

    def finish(self, number: int) -> None:
        """Run one batch to the model's end, for hooks to see; blocks behind us are not run again."""
        self._run(number, None)

    def _skips(self, block: str) -> bool:
        """Whether this block, once it is behind us, returns what was kept."""
        return bool(block) and self.calls.get(block) == 1 and _holder(block) not in self._whole

    def _pass(self, block: str) -> None:
        """The block, and those before it in its list, are behind us."""
        passed = [name for name in self.calls if _holder(name) == _holder(block)]
        self._done[_holder(block)] = passed[: passed.index(block) + 1]

    def _room(self, name: str) -> list[Any]:
        """Where a block's outputs go, a batch each: each takes the place of the one that it was computed from."""
        return self._outputs.setdefault(_holder(name), [None] * len(self.batches))

    # --- whether skipping is seen

    def _walk(self) -> None:
        """Walk through the first rows, and note the lists whose blocks cannot be skipped.

        Every block, and the end, is to get what it gets where all blocks run. Costs two passes of that batch, one
        block at a time, and a few numbers a token of each block.
        """
        blocks = [name for name in self.calls if self._skips(name)]
        seen: dict[str | None, Any] = {}
        handles = [
            self.modules[name].register_forward_hook(lambda _, __, output, n=name: seen.update({n: _sketch(output)}))
            for name in blocks
        ]
        try:
            seen[None] = _sketch(self._run(0, None))
        finally:
            for handle in handles:
                handle.remove()
        for name in [*blocks, None]:
            if name is not None and not self._skips(name):
                continue
            self._find_seen(name, seen[name])
            if name is not None and self._skips(name):
                self._room(name)[0] = self._run(0, name, _holder(name))
                self._pass(name)
        self._done.clear()
        self._outputs.clear()

    def _find_seen(self, name: str | None, wanted: Any) -> None:
        """Note which lists are to run, for this block (None: the model's end) to give what it gives otherwise."""
        own = _holder(name or "")
        if self._gives(name, wanted):
            return
        done = dict(self._done)
        for holder in done:  # each alone
            self._done = {holder: done[holder]}
            if not self._gives(name, wanted):
                (self._whole if name is not None and holder == own else self._alone).add(holder)
        self._done = done
        if not self._gives(name, wanted):
            self._whole.update(done)

    def _gives(self, name: str | None, wanted: Any) -> bool:
        try:
            return _same(_sketch(self._run(0, name, _holder(name or ""))), wanted)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # shapes, states that are not there
            return False

    # --- one pass

    def _run(self, number: int, until: str | None, within: str = "") -> Any:
        """One batch through the model, up to the block ``until``, for a block of the list ``within``; gives its output.

        Without ``until`` the model's own output.
        """
        caught: list[Any] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            caught.append(_detached(output))
            raise _Enough

        # what is beside puts modules back as it found them, hooks too: ours comes after it, and goes before
        with (
            torch.no_grad(),
            evaluating(self.model),
            self._beside(),
            self._skipping(number, within),
            ExitStack() as own,
        ):
            if until is not None:
                own.callback(self.modules[until].register_forward_hook(stop).remove)
            try:
                return forward(self.model, self.batches[number])
            except _Enough:
                return caught[0]

    @contextmanager
    def _skipping(self, number: int, within: str) -> Iterator[None]:
        """Blocks behind us return what the last of their list gave for this batch, where nobody sees it."""
        replaced: list[nn.Module] = []
        try:
            for holder, names in self._done.items():
                if holder in self._whole or (holder in self._alone and holder != within):
                    continue
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
                forward(self.model, self.batches[0], logits=False)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _stops(self, group: list[FFN]) -> bool:
        """Whether all calls of these FFNs happen in one call of their block."""
        return all(self.calls.get(block_name(ffn.name)) == 1 and not ffn.tied for ffn in group)


@contextmanager
def lent(model: Any, ffn: FFN, neurons: Neurons) -> Iterator[None]:
    """An FFN of a model runs with other neurons, of any width, while the block runs."""
    with ExitStack() as stack:
        stack.enter_context(with_neurons(ffn, neurons))
        if ffn.layout.experts and run_uneven_experts(model):
            stack.callback(model.set_experts_implementation, "grouped_mm")
        yield


def _holder(block: str) -> str:
    """The list that holds a block."""
    return block.rpartition(".")[0]


def _returning(output: Any) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        return output

    return forward


def _detached(output: Any) -> Any:
    """The output without what is not needed again: caches are left out."""
    if isinstance(output, Tensor):
        return held(output.detach())
    if isinstance(output, tuple):
        return tuple(_detached(value) for value in output)
    return output


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in _tensors(each)]
    return [tensor for each in value.values() for tensor in _tensors(each)] if isinstance(value, Mapping) else []


def _sketch(value: Any) -> list[Tensor]:
    """A few sums of every row of what a block gives: enough to tell whether it is the same."""
    sketched = []
    for tensor in _tensors(value):
        draw = torch.Generator().manual_seed(tensor.shape[-1]) if tensor.ndim else None
        rows = tensor.detach().float().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
        mix = torch.randn(rows.shape[-1], 4, generator=draw).to(rows.device)
        sketched.append(torch.cat((rows @ mix, rows.norm(dim=1, keepdim=True)), 1).cpu())
    return sketched


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return False
    return all(bool((a - b).norm() <= SAME * b.norm() + 1e-12) for a, b in zip(first, second, strict=True))
