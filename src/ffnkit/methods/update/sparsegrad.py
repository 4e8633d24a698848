"""SparseGrad: train about one percent of the entries of a weight's gradient, in a basis in which it is sparse."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import kept, telling
from ffnkit.calibration.gradients import Receive, weight_gradients
from ffnkit.edits import Edit, Train, UpdateLinear
from ffnkit.errors import FfnkitError
from ffnkit.io.files import spool
from ffnkit.io.progress import counted
from ffnkit.methods.common import Batch, generator, need_data, plain_linears
from ffnkit.model.linear import features, own_weight
from ffnkit.nn.quantized import is_quantized_linear
from ffnkit.nn.selecting import EACH_STEP
from ffnkit.ops.bases import Grams, Zeros, core_of, top_share, turned
from ffnkit.plans import Draft, Progress
from ffnkit.settings import check, renamed, told
from ffnkit.settings.presets import with_presets
from ffnkit.settings.updates import SparseGradSettings

IN_MEMORY = 1 << 30  # bytes of sums while planning; more lie in files that are memory-mapped
ROOM = 4  # times as many entries has a core in which the choice may change
REACH = 0.995  # of the gradients' energy: what the leading rows of a basis hold from which the core is taken


@renamed(sites="targets", also="modules_to_train", share="density")
@with_presets
@dataclass(frozen=True)
class SparseGrad(SparseGradSettings):
    """Train few entries of each weight's update, in a basis in which the gradients of that weight are sparse.

    Batches with labels give gradients: first the basis (the factors of their higher-order SVD), then which of its
    entries hold the most energy. Weights stay as they are below the update. After ``fk.apply`` any optimizer over
    ``fk.trainable_parameters(model)`` trains; ``fk.fold`` puts the update into the weights.

    Source: SparseGrad (arXiv 2410.07383), selection "step". Of the authors' code, selection "masked-gradient" is the
        script for LLaMA, and with basis "none" their MeProp.
    Differs: entries are confined to a core; the input side's basis is not transposed; a fixed selection by summed
        squares.
    """

    name: ClassVar[str] = "sparsegrad"
    summary: ClassVar[str] = "train about 1% of the entries of each update, in a basis in which gradients are sparse"
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.07383"

    @property
    def needs_data(self) -> bool:
        """Whether gradients are needed: for a basis, or to choose entries by."""
        return self.basis != "none" or (self.choose == "gradient" and self.selection not in EACH_STEP)

    def settings(self) -> dict[str, Any]:
        return told(self)

    def check(self) -> None:
        """Raises FfnkitError on settings out of range."""
        check(self)

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The linears by name. Raises FfnkitError where the settings do not fit the model."""
        self.check()
        found = plain_linears(model, self.name, self.targets, self.layers)
        asked = f"sparsegrad on {type(model).__name__}"
        for name, linear in found.items():
            if is_quantized_linear(linear):
                raise FfnkitError(asked, f"{name} is quantized, and has no gradient of its own", "Take dsee or lora")
        return found

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        started = time.perf_counter()
        linears = self.chosen(model)
        batches = kept(islice(need_data(data, self.name, beyond="gradients"), self.batches)) if self.needs_data else []
        work = _Work(self, model, linears, progress)
        # gradients that a basis was made from flatter it: entries are chosen on others
        confined = self.basis != "none" and self.core < 1
        chooses = self.choose == "gradient" and (self.selection not in EACH_STEP or confined)
        parted = len(batches) // 3 if self.basis != "none" and chooses and len(batches) > 2 else 0
        if self.basis != "none":
            work.find_bases(batches[:parted] or batches)
        if chooses:
            work.find_energies(batches[parted:])
        elif self.choose == "magnitude":
            work.weigh()
        edits = work.edits()
        report = {"cores": {name: list(core) for name, core in work.cores.items()}, "batches": len(batches)}
        return Draft(
            (*edits, Train("", parts=list(self.modules_to_train))),
            work.quantities,
            report | {"seconds": time.perf_counter() - started},
        )


class _Work:
    """Bases, energies and the choice, linear by linear."""

    def __init__(
        self, method: SparseGrad, model: nn.Module, linears: dict[str, nn.Module], progress: Progress | None
    ) -> None:
        self.method, self.model, self.linears, self.progress = method, model, linears, progress
        self.shapes = {name: features(linear) for name, linear in linears.items()}
        shared = method.basis == "shared"
        self.group = {name: f"{kind_of(name)} {self.shapes[name]}" if shared else name for name in linears}
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}
        self.energies: dict[str, Tensor] = {}
        self.fresh: dict[str, Tensor] = {}  # of the last batches, which judge the core
        self.totals: dict[str, float] = defaultdict(float)
        self.cores: dict[str, tuple[int, int]] = {}
        self.quantities: dict[str, dict[str, float]] = {}

    def find_bases(self, batches: list[Batch]) -> None:
        """The leading rows of the bases of each group."""
        grams: dict[str, Grams] = {}

        shapes = {self.group[name]: shape for name, shape in self.shapes.items()}
        large = 8 * sum(out * out + inner * inner for out, inner in shapes.values()) > IN_MEMORY

        def receive(name: str, gradient: Tensor) -> None:
            if (group := self.group[name]) not in grams:
                grams[group] = Grams(*shapes[group], zeros=_zeros(gradient.device, large))
            grams[group].add(gradient)

        weight_gradients(self.model, telling(batches, self.progress, "gradients"), self.linears, receive)
        counts = {self.group[name]: self._count(name) for name in self.linears}
        for group in counted(list(grams), "bases"):
            left, right = grams.pop(group).bases(REACH if self.method.core < 1 else 1.0, counts[group])
            self.bases[group] = left.rows, right.rows

    def find_energies(self, batches: list[Batch]) -> None:
        """Summed squares of each entry of the gradients, in the basis."""
        sizes = {name: self._size(name) for name in self.linears}
        large = 4 * sum(rows * columns for rows, columns in sizes.values()) > IN_MEMORY

        judges = len(batches) // 4 if self.method.core < 1 and self.method.basis != "none" else 0

        def into(sums: dict[str, Tensor]) -> Receive:
            def receive(name: str, gradient: Tensor) -> None:
                self.totals[name] += float(gradient.float().square().sum())
                # in the gradient's own dtype: squares are summed up and ranked, and bf16 products cost half
                square = turned(gradient, *self.bases.get(self.group[name], (None, None))).float().square()
                if name not in sums:
                    sums[name] = _zeros(square.device, large)(sizes[name], dtype=torch.float32)
                sums[name] += square.to(sums[name].device)

            return receive

        first = batches[: len(batches) - judges]
        weight_gradients(self.model, telling(first, self.progress, "energies"), self.linears, into(self.energies))
        if judges:
            last = batches[len(first) :]
            weight_gradients(self.model, telling(last, self.progress, "energies"), self.linears, into(self.fresh))
        for name in self.linears.keys() - self.energies.keys():  # no batch reached it: all of its entries are alike
            zeros = _zeros(own_weight(self.linears[name]).device, large)
            self.energies[name] = zeros(self._size(name), dtype=torch.float32)

    def _size(self, name: str) -> tuple[int, int]:
        """Rows and columns of the entries that are looked at."""
        pair = self.bases.get(self.group[name])
        return self.shapes[name] if pair is None else (len(pair[0]), len(pair[1]))

    def weigh(self) -> None:
        """The squares of the weight's own entries, in the basis."""
        for name, linear in counted(self.linears.items(), "energies", len(self.linears)):
            weight = own_weight(linear).float()
            self.energies[name] = turned(weight, *self.bases.get(self.group[name], (None, None))).square()
            self.totals[name] = float(weight.square().sum())

    def edits(self) -> list[Edit]:
        """One edit for each linear that gets entries."""
        method = self.method
        counts = {name: self._count(name) for name in self.linears}
        for name in counted(self.linears, "cores"):
            self._confine(name, counts[name])
        pairs, chosen = self._pairs(), self._chosen(counts)
        edits: list[Edit] = []
        for number, name in enumerate(counted(self.linears, "entries")):
            given: dict[str, Any] = {"selection": method.selection, "order": number}
            parts: dict[str, Tensor] = {}
            if self.group[name] in pairs:
                parts["left"], parts["right"] = pairs[self.group[name]]
                given["core"] = list(self.cores[name])
            if method.selection in EACH_STEP:
                rows, columns = self.cores.get(name, self.shapes[name])
                given |= {"count": min(counts[name], rows * columns), "trained": rows * columns}
            else:
                if not len(chosen[name]):
                    continue
                parts["index"] = chosen[name]
                given |= {"trained": len(chosen[name])}
            if method.selection == "refresh":
                given["every"] = method.every
            given["together"] = "all" if method.by == "all" else name
            shape = list(features(self.linears[name]))
            edits.append(UpdateLinear(name, layer="sparsegrad", given=given, parts=parts, shape=shape))
        if not edits:
            raise FfnkitError("sparsegrad", "no entry was chosen", "Give a larger density")
        return edits

    def _count(self, name: str) -> int:
        rows, columns = self.shapes[name]
        return min(self.method.count or max(1, round(self.method.density * rows * columns)), rows * columns)

    def _confine(self, name: str, count: int) -> None:
        """The core of one weight, where it has bases; its energies are cut to it."""
        if self.group[name] not in self.bases:
            return
        energy, fresh = self.energies.get(name), self.fresh.pop(name, None)
        rows, columns = self._size(name)
        if energy is not None and self.method.core < 1:
            room = 1 if self.method.selection == "fixed" else ROOM
            rows, columns = core_of(energy, count, self.method.core, *self.shapes[name], fresh=fresh, room=room)
        self.cores[name] = rows, columns
        if energy is None:
            return
        if fresh is not None:
            energy += fresh
        free = top_share(energy, count)
        self.energies[name] = energy[:rows, :columns].contiguous()
        kept = top_share(self.energies[name], count)
        self.quantities[name] = {
            "energy": kept / max(self.totals[name], 1e-300),
            "of a free choice": kept / max(free, 1e-300),
        }

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The bases of each group: as many leading rows as the largest cores need."""
        pairs = {}
        for group, (left, right) in self.bases.items():
            cores = [core for name, core in self.cores.items() if self.group[name] == group]
            rows, columns = max(r for r, _ in cores), max(c for _, c in cores)
            pairs[group] = left[:rows].cpu().contiguous(), right[:columns].cpu().contiguous()
        return pairs

    def _chosen(self, counts: dict[str, int]) -> dict[str, Tensor]:
        """The flat places of the entries, in order, int32."""
        method = self.method
        if method.selection in EACH_STEP:
            return {}
        draw = generator(method.seed, 0)

        def drawn(name: str) -> Tensor:
            rows, columns = self.cores.get(name, self.shapes[name])
            return torch.randperm(rows * columns, generator=draw)[: counts[name]]

        def largest(name: str) -> Tensor:
            flat = self.energies[name].flatten()
            return torch.topk(flat, min(counts[name], len(flat)), sorted=False).indices if flat.any() else drawn(name)

        if method.choose == "random":
            found = {name: drawn(name) for name in self.shapes}
        elif method.by == "all":
            device = next(iter(self.energies.values())).device  # those of a model on several go to one
            flat = torch.cat([self.energies[name].flatten().to(device) for name in self.linears])
            places = torch.topk(flat, min(sum(counts.values()), len(flat)), sorted=False).indices
            mask = torch.zeros_like(flat, dtype=torch.bool)
            mask[places] = True
            sizes = [self.energies[name].numel() for name in self.linears]
            found = {name: part.nonzero()[:, 0] for name, part in zip(self.linears, mask.split(sizes), strict=True)}
        else:
            found = {name: largest(name) for name in self.linears}
        return {name: places.sort().values.to("cpu", torch.int32) for name, places in found.items()}


def _zeros(device: torch.device, large: bool) -> Zeros:
    """Zeros on the device, or memory-mapped where all of them together are large."""
    if not large:
        return lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=device)
    return spool


def kind_of(name: str) -> str:
    """A linear's name without the numbers of its layers."""
    return re.sub(r"\d+", "#", name)
