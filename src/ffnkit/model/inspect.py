"""What a model's FFNs are and what they weigh."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from torch import nn

from ffnkit.model.attention import ROLES, Attention, attention_linears, attention_modules, attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import JOINED, are_joined, ffns, mirrored, with_middle
from ffnkit.model.linear import features, flops, is_linear, stored_weight, unwrapped, walk
from ffnkit.model.targets import ranges
from ffnkit.model.trainable import body, head_modules
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.lowrank import LowRank


@dataclass(frozen=True)
class Row:
    """One FFN. ``shared_with`` names further places that hold the same weights."""

    name: str
    stack: str
    layer: int
    layout: str
    d: int
    width: int
    gated: bool
    experts: int
    parameters: int
    share: float
    flops_per_token: float
    shared_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionRow:
    """One attention block.

    Attributes:
        name, stack, layer, layout: as of an FFN. cross: whether keys come from another stack.
        heads, kv_heads, head_dim: query heads, heads of key and value, width of one.
        heads_before: the query heads that the config speaks of, where some were removed since; else ``heads``.
        parameters: of its linears, and of what goes with heads.
        why: why single heads cannot be removed, "" where they can.
    """

    name: str
    stack: str
    layer: int
    layout: str
    cross: bool
    heads: int
    kv_heads: int
    head_dim: int
    heads_before: int
    parameters: int
    why: str = ""

    @classmethod
    def of(cls, found: Attention) -> AttentionRow:
        """The row of one attention."""
        before = found.kept.of[0] if found.kept else found.heads
        counts = (found.heads, found.kv_heads, found.head_dim, before, found.num_parameters)
        return cls(found.name, found.stack, found.layer, found.layout.name, found.cross, *counts, found.why)

    @property
    def shape(self) -> str:
        """In words, without the layer."""
        place = " ".join(word for word in (self.stack, "cross-attention" if self.cross else "attention") if word)
        before = f" of {self.heads_before}" if self.heads_before != self.heads else ""
        shared = f", {self.kv_heads} of key and value" if self.kv_heads != self.heads else ""
        why = f"; heads cannot be removed: {self.why}" if self.why else ""
        return f"{place}: {self.heads}{before} heads of {self.head_dim}{shared}{why}"


@dataclass(frozen=True)
class LeftOut:
    """Weights that look like a part of FFNs, but that ffnkit does not edit.

    Attributes:
        name: where they hang; ``*`` stands for numbers. count: in how many places.
        shapes: of the weights in one place, by name. parameters: of all places. share: of the model's.
        why: what keeps ffnkit from them.
    """

    name: str
    count: int
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    share: float
    why: str

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in self.shapes.items())
        return f"{self.count} x {self.name} ({shapes}), {self.share:.1%} of the parameters: {self.why}"


@dataclass(frozen=True)
class Inventory:
    """Every FFN of a model.

    Attributes:
        model: class name. rows: one an FFN, in order.
        parameters: of the whole model, each once. ffn_parameters: in FFNs, each once.
        flops_per_token: 2 x the weights of the linears, convolutions and experts that a token passes (routed experts
            by top-k / E, shared FFNs as often as they run), attention scores and embeddings left out. In two-stack
            models: one token of each stack.
        ffn_flops_per_token: the FFNs' part.
        left_out: weights that look like a part of FFNs, but that ffnkit does not edit.
        added: numbers of updates and adapters, which stand beside the weights; among the parameters.
        attention: one row an attention block of a known layout.
    """

    model: str
    rows: tuple[Row, ...]
    parameters: int
    ffn_parameters: int
    flops_per_token: float
    ffn_flops_per_token: float
    left_out: tuple[LeftOut, ...] = ()
    attention: tuple[AttentionRow, ...] = ()
    added: int = 0

    @property
    def ffn_share(self) -> float:
        return self.ffn_parameters / self.parameters

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ffn_share": self.ffn_share}

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {self.ffn_parameters:,} ({self.ffn_share:.1%}) in FFNs"
        ]
        name_width = max(len(row.name) for row in self.rows)
        for row in self.rows:
            experts = f"{row.experts} experts of " if row.experts else ""
            shape = f"{experts}{row.d} x {row.width}{' gated' if row.gated else ''}"
            shared = f"  shared with {', '.join(row.shared_with)}" if row.shared_with else ""
            lines.append(
                f"  {row.name:<{name_width}}  {shape:<24}  {row.parameters:>12,}  {row.share:>6.1%}"
                f"  {row.flops_per_token / 1e6:>10.3f} MFLOPs/token{shared}"
            )
        total, ffn = self.flops_per_token / 1e6, self.ffn_flops_per_token / 1e6
        lines.append(f"  {total:.3f} MFLOPs a token in linears, {ffn:.3f} in FFNs ({ffn / max(total, 1e-12):.1%})")
        lines += self._attention_lines()
        lines += [f"  beside the weights: updates and adapters of {self.added:,} parameters"] if self.added else []
        lines += [f"  left out: {left}" for left in self.left_out]
        return "\n".join(lines)

    def _attention_lines(self) -> list[str]:
        """A line for all layers whose attention has one shape."""
        by_shape: dict[str, list[AttentionRow]] = {}
        for row in self.attention:
            by_shape.setdefault(row.shape, []).append(row)
        lines = []
        for shape, rows in by_shape.items():
            layers = ranges(sorted({row.layer for row in rows}))
            lines.append(f"  layers {layers} {shape}, {sum(row.parameters for row in rows):,} parameters")
        return lines


def inspect(model: nn.Module) -> Inventory:
    """Every FFN of a model with its shape, its share of the parameters and its FLOPs a token.

    Works on an empty model (meta device) too. Raises FfnkitError for a model without a known FFN.
    """
    found = ffns(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = tuple(
        Row(
            ffn.name,
            ffn.stack,
            ffn.layer,
            ffn.layout.name,
            ffn.d,
            ffn.width,
            ffn.gated,
            ffn.experts,
            ffn.num_parameters,
            ffn.num_parameters / total,
            ffn.flops_per_token,
            tuple(ffn.tied),
        )
        for ffn in found
    )
    ffn_flops = sum(ffn.flops_per_token * len(ffn.owners) * _runs(model, ffn) for ffn in found)
    return Inventory(
        model=type(model).__name__,
        rows=rows,
        parameters=total,
        ffn_parameters=sum(row.parameters for row in rows),
        flops_per_token=ffn_flops + _other_flops(model, found),
        ffn_flops_per_token=ffn_flops,
        left_out=left_out(model, found),
        attention=tuple(AttentionRow.of(each) for each in attentions(model)),
        added=added_parameters(model),
    )


def added_parameters(model: nn.Module) -> int:
    """How many numbers stand beside a model's weights: updates, adapters behind linears, a prefix."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parts: list[nn.Parameter] = []
        if isinstance(module, AdapterLayer):
            parts = module.added
        elif "base_layer" in module._modules:
            below = {id(p) for p in module.get_submodule("base_layer").parameters()}
            parts = [p for p in module.parameters() if id(p) not in below]
        elif "prompt_encoder" in module._modules:
            parts = list(module.get_submodule("prompt_encoder").parameters())
        found |= {id(p): p for p in parts}
    return sum(p.numel() for p in found.values())


# --- what is left out ---------------------------------------------------------------------------------------------

_NO_FFN = re.compile(r"mamba|mixer|embed|position|proj(ection|ector)|router|connector", re.IGNORECASE)
_WIDEST = 16  # ff / d of an FFN at most; bottlenecks of other uses go further
Place = tuple[str, dict[str, nn.Parameter], str]  # owner, weights by name below it, why


def left_out(model: nn.Module, found: list[FFN]) -> tuple[LeftOut, ...]:
    """Weights placed like those of FFNs that none of the FFNs ``found`` covers.

    These are experts of a form that is not known (alternating rows of gate and up, biases, more experts than weights),
    FFNs with a norm, a convolution or a further linear in between, and mirrored linears, d -> ff and ff -> d, outside
    of attention.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    covered = {id(p) for ffn in found for p in ffn.parameters()}
    groups: dict[Any, list[dict[str, nn.Parameter]]] = {}
    for owner, weights, why in chain(_unknown_experts(model), _with_middle(model), _mirrored(model, covered)):
        fresh = {name: p for name, p in weights.items() if id(p) not in covered and p.ndim > 1}
        covered |= {id(p) for p in fresh.values()}
        shapes = tuple((name, tuple(p.shape)) for name, p in fresh.items())
        if fresh:
            groups.setdefault((re.sub(r"(?<![^._])\d+(?![^.])", "*", owner), shapes, why), []).append(fresh)
    rows = []
    for (name, shapes, why), places in groups.items():
        size = sum(p.numel() for place in places for p in place.values())
        rows.append(LeftOut(name, len(places), dict(shapes), size, size / total, why))
    return tuple(rows)


def _unknown_experts(model: nn.Module) -> Iterator[Place]:
    """Modules named after experts."""
    attention = tuple(f"{name}." for name in attention_modules(model))
    for path, module in model.named_modules():
        named = re.fullmatch(r"(shared_)?experts?", path.rpartition(".")[2]) or type(module).__name__.endswith(
            "Experts"
        )
        if named and not _NO_FFN.search(path) and not path.startswith(attention):
            yield path, dict(module.named_parameters()), "experts of a form that is not known"


def _with_middle(model: nn.Module) -> Iterator[Place]:
    for path, module, layout in with_middle(model):
        names = (f"{site}.weight" for site in dict.fromkeys((layout.up, layout.gate or layout.up, layout.down)))
        weights = {name: module.get_parameter(name) for name in names}
        yield path, weights, JOINED


def _mirrored(model: nn.Module, covered: set[int]) -> Iterator[Place]:
    modules, attention = dict(model.named_modules()), set(attention_linears(model))
    for owner, *pair in mirrored(model, without=covered):
        paths = [f"{owner}.{name}" if owner else name for name in pair]
        near = [type(modules[path.rpartition(".")[0]]).__name__ for path in paths]
        weights = {f"{name}.weight": stored_weight(modules[path]) for name, path in zip(pair, paths, strict=True)}
        if any(isinstance(modules[path], LowRank) for path in paths):
            continue
        narrow, wide = sorted(features(modules[paths[0]]))
        if wide > _WIDEST * narrow or not attention.isdisjoint(paths):
            continue
        if not any(_NO_FFN.search(text) for text in (*paths, *near)):
            joined = are_joined(model, owner, *pair)
            yield owner, weights, JOINED if joined else "mirrored linears of no known row"


def body_flops(model: nn.Module) -> float:
    """FLOPs a token in the linears of a model's body: as :func:`inspect`, without heads, poolers, output embeddings."""
    found = ffns(model)
    total = sum(neuron_flops(model, ffn) * ffn.width for ffn in found) + _other_flops(model, found)
    base = body(model)
    inside = {id(module) for module in base.modules()} if base is not model else {id(m) for m in model.modules()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    ends = tuple(f"{name}." for name in head_modules(model))
    for name, module in walk(model):
        outside = id(module) not in inside or module is output or f"{name}.".startswith(ends)
        if outside:
            total -= _flops(module)
    return total


def neuron_flops(model: nn.Module, ffn: FFN) -> float:
    """FLOPs a token of one hidden neuron, wherever its FFN runs; experts' neurons of one number together."""
    return ffn.flops_per_token / ffn.width * len(ffn.owners) * _runs(model, ffn)


def unit_flops(model: nn.Module, attention: Attention) -> float:
    """FLOPs a token in the weights that go with one unit of an attention, wherever it runs."""
    out, inner = features(attention.linear("o"))
    weights, counts = out * inner // attention.units, attention.counts
    for role in ROLES:
        if counts[role] >= attention.units:  # else one key and value for all: they stay
            columns = features(attention.linear(role))[1]
            weights += columns * attention.head_dim * counts[role] // attention.units
    for _, what, owner in attention.following():
        if isinstance(what, nn.Module) and (owner is None or counts[owner] >= attention.units):
            weights += math.prod(features(what)) // attention.units
    found = ffns(model)
    runs = max(_runs(model, ffn) for ffn in found)
    repeated = runs > 1 and attention.name.startswith(tuple(f"{name}." for ffn in found for name in ffn.owners))
    return 2.0 * weights * (1 + len(attention.tied)) * (runs if repeated else 1)


def _runs(model: nn.Module, ffn: FFN) -> int:
    """How often one module runs in a pass."""
    if not ffn.layout.runs:
        return 1
    layers, *numbers = (int(getattr(model.config, key)) for key in ffn.layout.runs)
    return layers // math.prod(numbers)


def _other_flops(model: nn.Module, found: list[FFN]) -> float:
    """2 x the weights of every linear and convolution outside the FFNs; each convolution at one output position."""
    inside = {
        id(module)
        for ffn in found
        if not ffn.layout.experts
        for owner in ffn.owners.values()
        for site in ffn.sites
        for module in unwrapped(owner.get_submodule(ffn.path(site))).modules()
    }
    runs = max(_runs(model, ffn) for ffn in found)
    layers = {name for ffn in found for name in ffn.owners} if runs > 1 else set()
    total = 0.0
    for name, module in walk(model):
        if id(module) not in inside:
            repeated = runs if any(name.startswith(layer + ".") for layer in layers) else 1
            total += _flops(module) * repeated
    return total


def _flops(module: nn.Module) -> float:
    """FLOPs a token in a module's own weight, if it is a linear or a convolution; what it wraps counts by itself."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return 2.0 * module.weight.numel()
    return flops(module) if is_linear(module) and unwrapped(module) is module else 0.0
