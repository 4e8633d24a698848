"""FFNs fitted block by block, each on what the blocks before it give, going on where an earlier process was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from ffnkit.calibration.blockwise import Beside, Blockwise
from ffnkit.calibration.going_on import CannotKeep, files_of, next_place, tell
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.edits import Edit
from ffnkit.io.files import read_json, replacing, write_text
from ffnkit.methods.common import Batch
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons
from ffnkit.plans import Draft, Plan, Progress, Shape

STATE = "state.json"


@dataclass(frozen=True)
class Fitted:
    """What became of an FFN.

    Attributes:
        edits: of it. quantities: what was measured. neurons: what later blocks are to run on, where blocks are fitted
            one behind the other.
    """

    edits: list[Edit]
    quantities: dict[str, float] = field(default_factory=dict)
    neurons: Neurons | None = None

    def given(self) -> Neurons:
        """The new neurons, of what was fitted in this process."""
        if self.neurons is None:
            raise ValueError("nothing runs on these neurons")
        return self.neurons


def block_by_block(
    model: nn.Module,
    batches: Iterable[Batch] | StatisticsFile,
    found: list[FFN],
    show: Callable[[Blockwise, list[FFN], bool], None],
    fit: Callable[[FFN], Fitted],
    progress: Progress | None,
    *,
    sequential: bool,
    beside: Beside = nullcontext,
    passes: Sequence[Blockwise] = (),
) -> dict[str, Fitted]:
    """Show each block's FFNs their data, then fit them, in the order in which the blocks run; by name what they became.

    Inside of :func:`~ffnkit.calibration.going_on.going_on` it leaves, after each block, what was fitted and what the
    block gave for all batches, and goes on behind the last block that was left.

    Args:
        batches: or statistics of a pass over them, where ``show`` needs no more.
        show: called with a block's FFNs: lets who fits them see what they do, by ``watch`` or ``see`` of
            :class:`~ffnkit.calibration.blockwise.Blockwise`, whose ``last`` is the third argument.
        fit: called with each of them afterwards; its neurons are what the later blocks run on where ``sequential``.
        beside: as of :class:`~ffnkit.calibration.blockwise.Blockwise`. passes: further ones, that ``show`` moves along.
    """
    done: dict[str, Fitted] = {}
    if not found:
        return done
    place = next_place()
    record = None if place is None else _Record(place, found)
    with Blockwise(model, batches, found, beside) as blocks:
        moved = (blocks, *passes)
        if record is not None:
            done |= record.read(moved)
            tell(len(done))
        if progress is not None:
            progress(len(done), len(found), "")
        for group in blocks.groups:
            fresh = [ffn for ffn in group if ffn.name not in done]
            if fresh:
                show(blocks, group, not sequential)
            for ffn in group:
                if fresh:
                    done[ffn.name] = fit(ffn)
                if sequential and (neurons := done[ffn.name].neurons) is not None:
                    blocks.install(ffn, neurons)
                if progress is not None:
                    progress(sum(each.name in done for each in found), len(found), ffn.name)
            if fresh:
                blocks.advance(group)
                if record is not None:
                    done |= record.write(group, done, moved, runs_again=sequential and not blocks.skips)
    return done


def drafted(found: Iterable[FFN], done: Mapping[str, Fitted]) -> Draft:
    """What became of these FFNs, in this order, as a method's draft."""
    made = {ffn.name: done[ffn.name] for ffn in found}
    edits = tuple(edit for each in made.values() for edit in each.edits)
    return Draft(edits, {name: each.quantities for name, each in made.items()})


class _Record:
    """What is left of such work in a folder: a plan of each FFN, and what the last block gave."""

    def __init__(self, folder: Path, found: list[FFN]) -> None:
        self.folder, self.found = folder, {ffn.name: (number, ffn) for number, ffn in enumerate(found)}
        self.names: list[str] = []
        self.works = True

    def read(self, passes: Sequence[Blockwise]) -> dict[str, Fitted]:
        """What was fitted; the passes are where they were then."""
        state = read_json(self.folder / STATE)
        if state is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            return {}
        self.names = list(state["done"])
        for each, kept in zip(passes, state["passes"], strict=True):
            each.restore(self.folder, kept)
        return {name: self._load(name) for name in self.names}

    def write(
        self, group: list[FFN], done: dict[str, Fitted], passes: Sequence[Blockwise], *, runs_again: bool
    ) -> dict[str, Fitted]:
        """Leave a block behind; what its FFNs became comes back, from the files.

        Args:
            runs_again: whether its new neurons are needed by whoever goes on.
        """
        if not self.works:
            return {}
        for ffn in group:
            self._save(ffn.name, done[ffn.name], runs_again)
        try:
            kept = [each.keep(self.folder, str(number)) for number, each in enumerate(passes)]
        except CannotKeep:  # then it begins anew another time
            self.works = False
            with suppress(OSError):
                (self.folder / STATE).unlink()
            return {}
        self.names += [ffn.name for ffn in group]
        write_text(self.folder / STATE, json.dumps({"done": self.names, "passes": kept}))
        needed = set(files_of(kept))
        for file in self.folder.glob("ffnkit-*"):
            if file.name not in needed:
                with suppress(OSError):  # some systems keep what is mapped
                    file.unlink()
        return {ffn.name: self._load(ffn.name, done[ffn.name].neurons) for ffn in group}

    def _files(self, name: str) -> tuple[Path, Path]:
        number = self.found[name][0]
        return self.folder / f"{number}.safetensors", self.folder / f"{number}-neurons.safetensors"

    def _save(self, name: str, made: Fitted, runs_again: bool) -> None:
        plan, neurons = self._files(name)
        shape = {name: Shape.of(self.found[name][1])}
        told: dict[str, Any] = {"method": "", "settings": {}, "model": "", "parameters": 0}
        Plan(**told, edits=tuple(made.edits), shapes=shape, quantities={name: made.quantities}).save(plan)
        if runs_again and made.neurons is not None:
            with replacing(neurons) as new:
                save_file({key: value.contiguous() for key, value in made.neurons.tensors().items()}, new)

    def _load(self, name: str, neurons: Neurons | None = None) -> Fitted:
        plan, stored = self._files(name)
        read = Plan.load(plan)
        if neurons is None and stored.is_file():
            neurons = Neurons(**load_file(stored))
        return Fitted(list(read.edits), read.quantities[name], neurons)
