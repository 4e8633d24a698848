"""The single weights that pruning chooses among: which linears, how they are read, and their inputs on data."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, run
from ffnkit.calibration.hooks import Activations, hooked
from ffnkit.calibration.padding import TokenMasks
from ffnkit.calibration.statistics import ColumnSquares
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attention_linears
from ffnkit.model.experts import routers
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name, ffns
from ffnkit.model.linear import check_float, check_untouched, is_maskable, is_transposed, stored_weight
from ffnkit.model.targets import GROUPS, query_value, select
from ffnkit.model.trainable import head_modules
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.coefficients import carries_update
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented
from ffnkit.settings import WhichLayers


@dataclass(frozen=True)
class Prunable:
    """One weight that can be pruned: of a linear, or of the experts of an FFN in one 3-D parameter.

    Attributes:
        name: path of the linear, or of the FFN. site: "" for a linear; of experts "up", "gate" or "down".
        module: the linear, or the FFN.
    """

    name: str
    site: str
    module: Any

    @property
    def label(self) -> str:
        """The name in words and tables."""
        return f"{self.name}.{self.site}" if self.site else self.name

    @property
    def adapted(self) -> bool:
        """Whether an update stands beside the weight."""
        return carries_update(self.module)

    @property
    def stored(self) -> Tensor:
        """The weight as (.., out, in), a view of what the model holds; below an update the frozen one."""
        if self.site:
            weight: Tensor = self.module.oriented(self.site)
            return weight
        return oriented(stored_weight(self.module), is_transposed(self.module))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """In which scores are computed."""
        return torch.promote_types(self.stored.dtype, torch.float32)

    def weight(self) -> Tensor:
        """The weight in float32 at least, (.., out, in)."""
        return self.stored.detach().to(self.dtype)

    def update(self, *, low_rank: bool = False) -> Tensor:
        """D (out, in) in the same dtype, or its low-rank part alone, zeros where it has none."""
        assert isinstance(self.module, AdapterLayer)
        found = self.module.low_rank() if low_rank else self.module.update()
        return self.weight().new_zeros(self.shape) if found is None else found.to(self.dtype)

    def gone(self, weight: Tensor) -> Tensor:
        """Where weights are zero already, bool."""
        zero = weight == 0
        return zero | ~oriented(self.module.mask, self.module.transposed) if isinstance(self.module, Masked) else zero

    def check(self) -> None:
        """Raises FfnkitError where the weight cannot be read: empty, quantized, NaN or infinite."""
        check_float(self.stored if self.site else stored_weight(self.module), self.label)
        weight = self.stored.detach()
        if weight.is_meta:
            raise FfnkitError(f"weights of {self.label}", "the model is empty (meta device)", "Load the weights first")
        if not bool(torch.isfinite(weight).all()):
            raise FfnkitError(f"weights of {self.label}", "they hold NaN or infinity", "Repair the weights first")


def prunable(model: nn.Module, asked: str, layers: WhichLayers = "all") -> list[Prunable]:
    """Weights in the order of the modules, each once; never of task heads, poolers, routers or tied embeddings.

    Args:
        asked: "ffn", "attention", "qv", "all" (FFNs and attention), or a regular expression that a whole module name
            must match.
        layers: of which layers FFNs, and query and value, are taken.

    Raises:
        FfnkitError: nothing matches, a linear is edited otherwise, or the expression cannot be read.
    """
    check_untouched(model, f"pruning {type(model).__name__}")
    wanted = _wanted(model, asked, layers)
    never = _never(model)
    found: list[Prunable] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ReparametrizedLinear) and not is_maskable(module) and wanted(name, None):
            raise FfnkitError(f"pruning {name}", f"it is edited already ({module.kind})", "Fold the model first")
        if not is_maskable(module) or not wanted(name, module):
            continue
        weight = stored_weight(module)
        if id(weight) not in seen and not never & {id(weight)}:
            seen.add(id(weight))
            found.append(Prunable(name, "", module))
    if asked in ("ffn", "all"):
        found += [
            Prunable(ffn.name, site, ffn)
            for ffn in select(ffns(model), layers)
            if ffn.layout.experts
            for site in ffn.sites
        ]
    if not found:
        do = "Name ffn, attention, qv, all, or an expression that matches linears of the body"
        raise FfnkitError(f"targets {asked!r}", "no linear that can be pruned matches", do)
    return found


def _wanted(model: nn.Module, asked: str, layers: WhichLayers) -> Any:
    """A function of a module's name and the module that says whether it is meant."""
    if asked not in GROUPS:
        try:
            pattern = re.compile(asked)
        except re.error as error:
            do = "Name ffn, attention, qv, all, or a regular expression over module names"
            raise FfnkitError(f"targets {asked!r}", f"not a regular expression ({error})", do) from None
        return lambda name, _: pattern.fullmatch(name) is not None
    if asked == "qv":
        names = query_value(model, layers)
        return lambda name, _: name in names
    chosen = select(ffns(model), layers) if asked != "attention" else []
    of_ffns = {
        f"{owner}.{ffn.path(site)}" for ffn in chosen if not ffn.layout.experts for owner in ffn.owners
        for site in ffn.sites
    }  # fmt: skip
    attention = set(attention_linears(model))
    if asked == "ffn":
        return lambda name, _: name in of_ffns
    return lambda name, _: name in of_ffns or name in attention


def _never(model: nn.Module) -> set[int]:
    """The ids of weights that are not pruned whatever is asked for."""
    outside = [*head_modules(model).values(), *routers(model).values()]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return {id(p) for module in [*outside, *embeddings] for p in module.parameters()}


# --- inputs -------------------------------------------------------------------------------------------------------


_Sums = defaultdict[Any, ColumnSquares]


@torch.no_grad()
def column_norms(model: nn.Module, batches: Iterable[Batch], found: list[Prunable]) -> dict[str, Tensor]:
    """The norm of each input of each weight over all tokens that count: (in,), or (E, in) of experts; by label.

    One pass over the data; held are the sums alone. Experts' tokens weigh by their squared routing weight; an expert
    that no token reached has norms of one.

    Raises:
        FfnkitError: no batches, or a linear never ran.
    """
    sums: _Sums = defaultdict(ColumnSquares)
    linears = [each for each in found if not each.site]
    experts = {each.name: each.module for each in found if each.site}
    stacks = {block_name(ffn.name): ffn.stack for ffn in ffns(model)}
    places = {each.name: (stacks.get(block_name(each.name), ""), [each.name]) for each in linears}
    places |= {name: (ffn.stack, list(ffn.owners)) for name, ffn in experts.items()}
    masks = TokenMasks(model, places)

    def of_experts(ffn: FFN, acts: Activations) -> None:
        for site in ffn.sites:
            sums[ffn.name, site, acts.expert].update((acts.hidden if site == "down" else acts.input, acts.weights))

    with masks.watching(), _listening(linears, masks, sums), hooked(list(experts.values()), of_experts, masks):
        run(model, batches, before=masks.start)
    return {each.label: _norms(sums, each) for each in found}


def _norms(sums: _Sums, each: Prunable) -> Tensor:
    width = each.shape[-1]
    if not each.site:
        if each.name in sums:
            return sums[each.name].norms()
        if "experts" in each.name.split("."):
            return torch.ones(width, dtype=torch.float64)
        do = "Give inputs of every stack (text, images, decoder inputs)"
        raise FfnkitError("measuring inputs", f"{each.name} did not run on the data given", do)
    ones = torch.ones(width, dtype=torch.float64, device=each.stored.device)
    parts = [sums.get((each.name, each.site, number)) for number in range(each.shape[0])]
    return torch.stack([ones if part is None else part.norms() for part in parts])


@contextmanager
def _listening(linears: list[Prunable], masks: TokenMasks, sums: _Sums) -> Iterator[None]:
    """Hooks on linears while the block runs; tokens that a mask leaves out do not count."""

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            flat = x.reshape(-1, x.shape[-1])
            sums[name].update((flat, masks.of(name, x, quiet=True)))

        return note

    handles = [each.module.register_forward_pre_hook(hook(each.name)) for each in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
