"""Where the FFNs of a model are and how to read and write them: the only file that knows families.

A family is a row of ``LAYOUTS``. Everything else sees :class:`FFN` and
:class:`~ffnkit.ops.neurons.Neurons`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffnkit.errors import FfnkitError
from ffnkit.nn.adapted import Adapted
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.nn.scaled import Scaled
from ffnkit.nn.served import broadcast, buffer_name, served
from ffnkit.nn.special import Special
from ffnkit.ops.neurons import Neurons

Linear = nn.Linear | Conv1D | Special


@dataclass(frozen=True)
class Layout:
    """One way in which model families write an FFN: dotted paths from the module that owns its linears.

    Attributes:
        name: what the row is called in ``inspect``.
        up, down: the linears from d to ff and back.
        gate: the gate's linear; the name of ``up`` again where one linear holds the gate in its first half of rows.
        experts: the paths are 3-D parameters, (E, rows, columns), not linears.
        transposed: of experts: the parameters lie as (E, in, out), applied as ``x @ weight``.
        up_first: where one linear holds both, its first half is up and its second the gate.
        owner: the row holds for classes of this name only; "" for all.
    """

    name: str
    up: str
    down: str
    gate: str | None = None
    experts: bool = False
    transposed: bool = False
    up_first: bool = False
    owner: str = ""

    @property
    def fused(self) -> bool:
        return self.gate == self.up


# Gated rows come first: a gated FFN also has an up and a down.
LAYOUTS: list[Layout] = [
    Layout("gated", "up_proj", "down_proj", gate="gate_proj"),  # LLaMA, OLMo, Mistral, Qwen, Gemma, shared experts
    Layout(
        "Phi-4 audio", "gate_up_proj", "down_proj", gate="gate_up_proj", up_first=True, owner="Phi4MultimodalAudioMLP"
    ),
    Layout("gated fused", "gate_up_proj", "down_proj", gate="gate_up_proj"),  # Phi-3, GLM
    Layout("gated experts", "gate_up_proj", "down_proj", gate="gate_up_proj", experts=True),  # Mixtral, OLMoE
    Layout(
        "gated experts transposed", "gate_up_proj", "down_proj", gate="gate_up_proj", experts=True, transposed=True
    ),  # Llama 4, Aria
    Layout("gated experts apart", "up_proj", "down_proj", gate="gate_proj", experts=True),  # Inkling's shared experts
    Layout("experts", "up_proj", "down_proj", experts=True),
    Layout("LFM2", "w3", "w2", gate="w1"),
    Layout("T5 gated", "wi_1", "wo", gate="wi_0"),
    Layout("T5", "wi", "wo"),  # also every expert of Switch
    Layout("ModernBERT", "Wi", "Wo", gate="Wi"),
    Layout("BERT", "intermediate.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa, BEiT, Swin
    Layout("wav2vec2", "intermediate_dense", "output_dense"),
    Layout("DistilBERT", "lin1", "lin2"),
    Layout("GPT-2", "c_fc", "c_proj"),  # Conv1D in GPT-2, Linear in GPT-Neo and StarCoder2
    Layout("fc", "fc1", "fc2"),  # ViT, CLIP, OPT, BART, Marian, mBART, Whisper, Phi
    Layout("GPT-NeoX", "dense_h_to_4h", "dense_4h_to_h"),  # also BLOOM, Falcon
    Layout("GPT-J", "fc_in", "fc_out"),
    Layout("ALBERT", "ffn", "ffn_output"),
    Layout("plain", "up_proj", "down_proj"),  # Nemotron, MPT
]

# The names under which owners remember their width; kept true when a width changes.
WIDTH_ATTRIBUTES = (
    "intermediate_size",
    "intermediate_dim",
    "moe_intermediate_size",
    "expert_dim",
    "ffn_dim",
    "inner_dim",
)


@dataclass(eq=False)
class FFN:
    """One feed-forward block of a model, read and written in place.

    Attributes:
        name: the owner's path in the model; of FFNs that share their weights, the first one's.
        module: the owner. layout: the row of ``LAYOUTS`` it matches.
        stack: "encoder", "decoder", "text", ... where the model has several stacks, else "".
        layer: the number of the layer in its stack.
        active: share of the tokens that pass through (top-k / E for routed experts, else 1).
        twins: further owners that hold the very same parameters, by name.
    """

    name: str
    module: nn.Module
    layout: Layout
    stack: str = ""
    layer: int = 0
    active: float = 1.0
    twins: dict[str, nn.Module] = field(default_factory=dict)

    # --- shape

    @property
    def gated(self) -> bool:
        return self.layout.gate is not None

    @property
    def linear_in_up(self) -> bool:
        """Whether a gated FFN's output is linear in up, so that up and down may trade a factor.

        Clamps (``limit``, ``swiglu_limit``) and gates of a family's own making, such as (up + 1) * glu, are not.
        """
        owner = self.module
        config = getattr(owner, "config", None)
        limits = (getattr(place, name, None) for place in (owner, config) for name in ("limit", "swiglu_limit"))
        own_gate = getattr(type(owner), "_apply_gate", None)
        usual = own_gate is None or own_gate.__module__ == "transformers.integrations.moe"
        return usual and all(limit is None for limit in limits)

    @property
    def experts(self) -> int:
        return self._weight("down").shape[0] if self.layout.experts else 0

    @property
    def width(self) -> int:
        """ff, the number of neurons."""
        return self._features("down")[1]

    @property
    def d(self) -> int:
        return self._features("down")[0]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions of the linears for one token, routed experts by their share of tokens."""
        matrices = 3 if self.gated else 2
        return 2.0 * matrices * self.width * self.d * (max(self.experts, 1) * self.active)

    # --- parts

    @property
    def owners(self) -> dict[str, nn.Module]:
        """Every owner of these weights by name, this one first."""
        return {self.name: self.module, **self.twins}

    def path(self, site: str) -> str:
        """Path of a site ("up", "gate", "down") below the owner."""
        path = getattr(self.layout, site)
        if path is None:
            raise FfnkitError(
                f"site '{site}' of {self.name}", f"a '{self.layout.name}' FFN has none", "Name up or down"
            )
        return str(path)

    def linear(self, site: str, owner: nn.Module | None = None) -> Linear:
        """The linear at a site. Raises FfnkitError for experts, whose weights are parameters of the owner."""
        if self.layout.experts:
            raise FfnkitError(
                f"the linear '{site}' of {self.name}",
                f"{self.experts} experts share one 3-D parameter",
                "Use a method that edits weights, or a model with separate experts",
            )
        return (owner or self.module).get_submodule(self.path(site))  # type: ignore[return-value]

    def parameters(self) -> list[nn.Parameter]:
        """The FFN's parameters, each once."""
        if self.layout.experts:
            return [self.module._parameters[self.path(site)] for site in self.sites]  # type: ignore[misc]
        modules = dict.fromkeys(self.linear(site) for site in self.sites)
        return [parameter for module in modules for parameter in module.parameters(recurse=False)]

    @property
    def sites(self) -> tuple[str, ...]:
        return ("up", "gate", "down") if self.gated and not self.layout.fused else ("up", "down")

    @property
    def scale(self) -> Tensor | None:
        """The fixed factor in front of down, (ff,) or (E, ff), where a method keeps one apart."""
        if self.layout.experts:
            factor: Tensor | None = getattr(self.module, buffer_name("scaled", "down"), None)
            return factor if factor is None or factor.ndim == 2 else factor.squeeze(-1)
        down = self.linear("down")
        return down.scale if isinstance(down, Scaled) else None

    @property
    def special(self) -> dict[str, dict[str, Any]]:
        """What stands in the place of plain weights, by site: {"down": {"kind": "scaled"}, ...}; folding ends it."""
        if self.layout.experts:
            known = (buffer.split("_")[1:] for _, buffer in served(self.module))
            return {site: {"kind": kind} for kind, site in known}
        linears = {site: self.linear(site) for site in self.sites}
        return {
            site: {"kind": linear.kind, **({"rank": linear.rank} if isinstance(linear, LowRank) else {})}
            for site, linear in linears.items()
            if isinstance(linear, Special) and not isinstance(linear, Adapted)
        }

    # --- weights

    def read(self) -> Neurons:
        """The weights as neurons: views of the parameters where they are plain, so bitwise what the model holds.

        Factors kept apart are multiplied in and thin pairs multiplied out (copies then).
        """
        return self._neurons(self._effective)

    def raw(self) -> Neurons:
        """The weights as neurons, a factor that stands apart left out."""
        return self._neurons(self._oriented)

    def _neurons(self, weight: Callable[[str], Tensor]) -> Neurons:
        up, up_bias = weight("up"), self._bias("up")
        gate = gate_bias = None
        if self.layout.fused:
            gate, up = self._halves(up, -2)
            if up_bias is not None:
                gate_bias, up_bias = self._halves(up_bias, -1)
        elif self.gated:
            gate, gate_bias = weight("gate"), self._bias("gate")
        return Neurons(up, weight("down"), gate, up_bias, gate_bias, self._bias("down"))

    def _halves(self, value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """(gate, up) of a tensor that holds both."""
        first, second = value.chunk(2, dim=dim)
        return (second, first) if self.layout.up_first else (first, second)

    def fuse(self, gate: Tensor, up: Tensor, dim: int) -> Tensor:
        """One tensor of gate and up, in the order that the family has."""
        return torch.cat((up, gate) if self.layout.up_first else (gate, up), dim=dim)

    @torch.no_grad()
    def write(self, neurons: Neurons) -> None:
        """Write weights of the same shape in place. Raises FfnkitError on another shape or special linears."""
        self.check_plain(f"writing {self.name}")
        mine, given = self.raw().tensors(), neurons.tensors()
        shapes = {name: tuple(value.shape) for name, value in mine.items()}
        if shapes != {name: tuple(value.shape) for name, value in given.items()}:
            found = {name: tuple(value.shape) for name, value in given.items()}
            raise FfnkitError(
                f"writing {self.name} of {shapes}", f"neurons of {found}", "Give neurons of its own shape"
            )
        for name, value in mine.items():
            value.copy_(given[name])

    def check_plain(self, asked: str) -> None:
        """Raises FfnkitError where something special stands in the place of plain weights."""
        if self.special:
            kinds = ", ".join(f"{site} is {value['kind']}" for site, value in self.special.items())
            do = "Fold the model first (ffnkit.fold), then go on"
            raise FfnkitError(asked, f"{self.name} is edited already ({kinds})", do)
        if not self.layout.experts and any(isinstance(self.linear(site), Adapted) for site in self.sites):
            do = "Fold the model first (ffnkit.fold), or take the adapter away"
            raise FfnkitError(asked, f"an update trains beside the weights of {self.name}", do)

    def _weight(self, site: str, owner: nn.Module | None = None) -> Tensor:
        if self.layout.experts:
            parameter = (owner or self.module)._parameters[self.path(site)]
            assert parameter is not None
            return parameter
        return self.linear(site, owner).weight  # type: ignore[return-value]

    def _identity(self, site: str) -> int:
        """What FFNs that share this site's weights have in common."""
        if self.layout.experts:
            return id(self._weight(site))
        return id(next(self.linear(site).parameters(recurse=False)))

    def _features(self, site: str) -> tuple[int, int]:
        """(out, in)."""
        if self.layout.experts:
            return tuple(self._oriented(site).shape[-2:])  # type: ignore[return-value]
        return _shape(self.linear(site))

    def _oriented(self, site: str) -> Tensor:
        """The weight as (out, in)."""
        weight = self._weight(site)
        transposed = self.layout.transposed if self.layout.experts else is_transposed(self.linear(site))
        return weight.mT if transposed else weight

    def _effective(self, site: str) -> Tensor:
        """The weight as (out, in) with every factor in it."""
        if self.layout.experts:
            weight = self._weight(site)
            for name, buffer in served(self.module):
                if name == self.path(site):
                    weight = weight * broadcast(getattr(self.module, buffer))
            return weight.mT if self.layout.transposed else weight
        linear, weight = self.linear(site), self._oriented(site)
        if isinstance(linear, Masked):
            return weight * (linear.mask.mT if linear.transposed else linear.mask)
        return weight * linear.scale.to(weight.dtype) if isinstance(linear, Scaled) else weight

    def _bias(self, site: str) -> Tensor | None:
        return None if self.layout.experts else self.linear(site).bias


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight lies as (in, out)."""
    return isinstance(linear, Conv1D) or (isinstance(linear, Special) and linear.transposed)


def is_linear(module: object) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, Special))


def _shape(linear: Any) -> tuple[int, int]:
    if isinstance(linear, Special):
        return linear.features
    if isinstance(linear, nn.Linear) and not linear.weight.is_floating_point():  # several numbers may lie in a byte
        return linear.out_features, linear.in_features
    rows, columns = linear.weight.shape
    return (columns, rows) if is_transposed(linear) else (rows, columns)


def features(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear of any kind."""
    return _shape(linear)


def output_width(linear: nn.Module) -> int:
    """Columns of what a linear gives."""
    return _shape(linear)[0]


def activations(ffn: FFN) -> list[Callable[[Tensor], Tensor]]:
    """Functions that may be the FFN's activation, the likely ones first; who asks compares with what was observed."""
    from transformers.activations import ACT2FN

    near = [*vars(ffn.module).values(), *ffn.module.children()]
    near += [value for child in ffn.module.children() for value in (*vars(child).values(), *child.children())]
    own = [value for value in near if callable(value) and not is_linear(value)]
    return [*own, *(ACT2FN[name] for name in ("gelu", "relu", "silu", "gelu_new", "quick_gelu", "relu2", "tanh"))]


# --- finding ------------------------------------------------------------------------------------------------------


def ffns(model: nn.Module) -> list[FFN]:
    """Every FFN of the model in the order of its modules; FFNs that share their weights are one.

    Raises FfnkitError where no layout matches, naming the mirrored linears of the model and the row to add.
    """
    found: list[FFN] = []
    by_weights: dict[tuple[int, ...], FFN] = {}
    for name, module in _named_modules(model):
        layout = _match(module)
        if layout is None:
            continue
        ffn = FFN(name, module, layout)
        key = tuple(ffn._identity(site) for site in ffn.sites)
        if key in by_weights:
            by_weights[key].twins[name] = module
        else:
            by_weights[key] = ffn
            found.append(ffn)
    if not found:
        raise _unknown(model)
    place(found)
    _share(model, found)
    return found


def has_ffns(model: nn.Module) -> bool:
    return any(_match(module) is not None for module in model.modules())


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules with repeats: a module that hangs in two places is named twice."""
    yield from model.named_modules(remove_duplicate=False)


def _match(module: nn.Module, *, middle: bool = False) -> Layout | None:
    """The row that a module fits; with ``middle`` also where something works on the hidden neurons in between."""
    for layout in LAYOUTS:
        if layout.owner not in ("", type(module).__name__):
            continue
        paths = (layout.up, layout.gate or layout.up, layout.down)
        if layout.experts:
            if _are_experts(module, layout, paths):
                return layout
            continue
        linears = [descend(module, path) for path in paths]
        if not all(is_linear(linear) for linear in linears):
            continue
        (ff, d), gate_shape, (out, inner) = (_shape(linear) for linear in linears)
        if layout.fused:
            ff //= 2
        elif gate_shape != (ff, d):
            continue
        # The output may have another width than the input in a few models; those are no plain FFNs.
        if (out, inner) == (d, ff) and (middle or not _has_middle(module, linears, ff, d)):
            return layout
    return None


def _are_experts(module: nn.Module, layout: Layout, paths: tuple[str, str, str]) -> bool:
    """Whether 3-D parameters have the shapes of a row; biases and alternating rows of gate and up are not known."""
    up, gate, down = (module._parameters.get(path) for path in paths)
    if up is None or gate is None or down is None or not up.ndim == gate.ndim == down.ndim == 3:
        return False
    if any(module._parameters.get(f"{path}_bias") is not None for path in paths):
        return False
    if gate.shape != up.shape or not getattr(module, "is_concatenated", True):
        return False
    (number, rows, d), (_, out, inner) = (p.mT.shape if layout.transposed else p.shape for p in (up, down))
    return (number, out, inner) == (down.shape[0], d, rows // 2 if layout.fused else rows)


def _has_middle(owner: nn.Module, linears: list[Any], ff: int, d: int) -> bool:
    """Whether something with weights of its own works on the hidden neurons, such as a norm or a convolution.

    Then neurons are no independent paths from up to down, and narrowing them changes it.
    """
    if ff == d:
        return False
    own = {id(linear) for linear in linears}
    for module in owner.modules():
        if id(module) in own or is_linear(module):
            continue
        if any(len(p.shape) in (1, 3, 4) and p.shape[0] == ff for p in module.parameters(recurse=False)):
            return not any(id(child) in own for child in module.children())
    return False


def descend(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below another, None where there is none."""
    current: nn.Module | None = module
    for part in path.split("."):
        current = current._modules.get(part) if current is not None else None
    return current


class Placed(Protocol):
    """Something that hangs in a layer of a stack."""

    name: str
    stack: str
    layer: int


def place(found: Sequence[Placed]) -> None:
    """Set stack and layer from the path: what stands before the first number is the stack, the number the layer."""
    prefixes: list[tuple[str, ...]] = []
    counters: dict[tuple[str, ...], int] = defaultdict(int)
    for ffn in found:
        parts = ffn.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        prefix = tuple(parts[:number]) if number is not None else ()
        ffn.layer = int(parts[number]) if number is not None else counters[prefix]
        counters[prefix] += 1
        prefixes.append(prefix)
    distinct = list(dict.fromkeys(prefixes))
    if len(distinct) == 1:
        return
    for ffn, prefix in zip(found, prefixes, strict=True):
        others = [other for other in distinct if other != prefix]
        own = [part for part in prefix if all(part not in other for other in others)]
        word = next((p for p in own if p in ("encoder", "decoder")), own[0] if own else ".".join(prefix))
        ffn.stack = re.sub(r"_(model|tower|transformer|module)$", "", word)


def block_name(ffn: str) -> str:
    """The layer that holds an FFN: its path up to the first number; "" where there is none."""
    parts = ffn.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _share(model: nn.Module, found: list[FFN]) -> None:
    """Set the share of tokens that reach each routed expert."""
    for ffn in found:
        parent = ffn.name.rpartition(".")[0]
        if ffn.layout.experts:
            shared = "shared" in ffn.name.rpartition(".")[2]  # every token passes
            ffn.active = 1.0 if shared else _top_k(model, ffn.module) / ffn.experts
        elif parent.rpartition(".")[2] == "experts":
            container = model.get_submodule(parent)
            ffn.active = _top_k(model, container) / max(len(list(container.children())), 1)


def _top_k(model: nn.Module, owner: nn.Module) -> int:
    config = getattr(owner, "config", None) or getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for each in configs:
        for key in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "num_selected_experts"):
            if isinstance(getattr(each, key, None), int):
                return int(getattr(each, key))
    return 1


def _unknown(model: nn.Module) -> FfnkitError:
    """The error for a model without a known FFN, with the mirrored linears that it has."""
    name = type(model).__name__
    between = next((path for path, module in model.named_modules() if _match(module, middle=True)), None)
    if between is not None:
        found = f"in '{between}' a norm or a convolution works on the hidden neurons, so none can go alone"
        return FfnkitError(f"the FFNs of {name}", found, "Use a model without one")
    deep = [p for p, value in model.named_parameters() if "expert" in p and (value.ndim == 3 or p[-7:] != ".weight")]
    if deep:
        found = f"its experts lie in parameters of a form that is not known, such as {deep[0]}"
        return FfnkitError(f"the FFNs of {name}", found, "Use a model of another family")
    pairs = list(mirrored(model))
    if not pairs:
        return FfnkitError(f"the FFNs of {name}", "it has no pair of linears d -> ff -> d", "Name a transformer model")
    owner, up, down = pairs[0]
    (ff, d) = _shape(model.get_submodule(f"{owner}.{up}" if owner else up))
    return FfnkitError(
        f"the FFNs of {name}",
        f"no layout is known, but {len(pairs)} pairs of mirrored linears, the first in "
        f"'{owner or 'the model itself'}': {up} ({d} -> {ff}) and {down} ({ff} -> {d})",
        f'If they are its FFNs, add the row: ffnkit.blocks.LAYOUTS.append(Layout("{name}", up="{up}", down="{down}"))',
    )


def middle_layout(module: nn.Module) -> Layout | None:
    """The row that a module would fit, were there not something that works on its hidden neurons; else None."""
    return _match(module, middle=True) if _match(module) is None else None


def mirrored(model: nn.Module, *, without: Container[int] = ()) -> Iterator[tuple[str, str, str]]:
    """(owner, up, down) of linears d -> ff and ff -> d with ff > d that hang close together.

    Also d -> 2 ff and ff -> d, where one linear may hold gate and up.

    Args:
        without: ids of weights that are not asked for.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and id(next(module.parameters(recurse=False))) not in without
    }
    groups: dict[str, list[str]] = defaultdict(list)
    for name in linears:
        parts = name.split(".")
        groups[".".join(parts[:-1])].append(name)
        if len(parts) > 2:
            groups[".".join(parts[:-2])].append(name)
    used: set[str] = set()
    for owner in sorted(groups, key=lambda o: -o.count(".")):
        for up in groups[owner]:
            ff, d = _shape(linears[up])
            for down in groups[owner]:
                if up not in used and down not in used and ff > d and _shape(linears[down]) in ((d, ff), (d, ff / 2)):
                    used |= {up, down}
                    start = len(owner) + 1 if owner else 0
                    yield owner, up[start:], down[start:]


# --- selecting ----------------------------------------------------------------------------------------------------

AnyPlaced = TypeVar("AnyPlaced", bound=Placed)


def select(found: list[AnyPlaced], layers: str) -> list[AnyPlaced]:
    """The FFNs, or whatever else hangs in layers, that a layer expression names.

    ``"all"``, ``"last:8"``, ``"first:4"``, ``"4-11"``, ``"4,5,9"``, mixtures with commas; ``"encoder:"`` or
    ``"decoder:"`` (or another stack's name) before a part holds for it and the parts after it. Without it every
    stack is meant, layer numbers counted within each.

    Raises FfnkitError on an expression that cannot be read or names layers that do not exist.
    """
    by_stack: dict[str, list[int]] = defaultdict(list)
    for ffn in found:
        if ffn.layer not in by_stack[ffn.stack]:
            by_stack[ffn.stack].append(ffn.layer)
    chosen: set[tuple[str, int]] = set()
    stacks = list(by_stack)
    for part in str(layers).replace(" ", "").split(","):
        expression = part
        head, colon, rest = part.partition(":")
        if colon and head not in ("last", "first"):
            if head not in by_stack or head == "":
                raise _no_layers(layers, by_stack, f"there is no stack '{head}'")
            stacks, expression = [head], rest
        numbers = {(stack, n) for stack in stacks for n in _numbers(expression, by_stack[stack])}
        missing = _missing(expression, [by_stack[stack] for stack in stacks])
        if missing or not numbers:
            raise _no_layers(layers, by_stack, missing or f"'{part}' is not a layer expression")
        chosen |= numbers
    return [ffn for ffn in found if (ffn.stack, ffn.layer) in chosen]


def _numbers(expression: str, present: list[int]) -> set[int]:
    count = max(present) + 1
    if expression == "all":
        return set(present)
    if match := re.fullmatch(r"(last|first):(\d+)", expression):
        amount = int(match[2])
        wanted = range(count - amount, count) if match[1] == "last" else range(amount)
    elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", expression):
        wanted = range(int(match[1]), int(match[2] or match[1]) + 1)
    else:
        return set()
    return set(wanted) & set(present)


def _missing(expression: str, stacks: list[list[int]]) -> str:
    """What an expression asks for that no stack has, or ""."""
    count = max(max(present) for present in stacks) + 1
    if match := re.fullmatch(r"(?:last|first):(\d+)", expression):
        return f"'{expression}' asks for {match[1]} layers" if not 1 <= int(match[1]) <= count else ""
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", expression):
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            return f"the range '{expression}' runs backwards"
        for number in (low, high):
            if not any(number in present for present in stacks):
                return f"layer {number} has no FFN"
    return ""


def _no_layers(layers: str, by_stack: dict[str, list[int]], found: str) -> FfnkitError:
    have = "; ".join(f"{stack + ': ' if stack else ''}{ranges(sorted(n))}" for stack, n in by_stack.items())
    do = f"The model has FFNs in layers {have}. Write all, last:N, first:N, A-B, A,B,C"
    if len(by_stack) > 1:
        do += f", with {' or '.join(stack + ':' for stack in by_stack)} before it"
    return FfnkitError(f"layers '{layers}'", found, do)


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: "0-5" where none is missing, else "0,2,5"."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def resolve_width(width: int | float, ff: int, name: str) -> int:
    """The number of neurons that a setting asks for: an int counts neurons, a float is a share (1.0 = all).

    Raises FfnkitError unless 1 <= result <= ff and a share lies in (0, 1].
    """
    asked = f"width {width} for {name}"
    if isinstance(width, bool) or not isinstance(width, (int, float)):
        raise FfnkitError(asked, f"a {type(width).__name__}", "Give a number of neurons (int) or a share (float)")
    if isinstance(width, float):
        if not 0 < width <= 1:
            raise FfnkitError(asked, "a share must be above 0 and at most 1.0", f"Give a share, or an int up to {ff}")
        return max(1, round(width * ff))
    if not 1 <= width <= ff:
        raise FfnkitError(asked, f"the FFN has {ff} neurons", f"Give an int from 1 to {ff}, or a share up to 1.0")
    return width
