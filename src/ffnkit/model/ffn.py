"""One feed-forward block of a model, read and written in place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.errors import FfnkitError
from ffnkit.model.config_values import config_value
from ffnkit.model.families.ffns import Layout
from ffnkit.model.linear import (
    Linear,
    bare_weight,
    check_editable,
    features,
    flops,
    parameters,
    stored_weight,
    true_weight,
    unwrapped,
)
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.expert_weights import broadcast, buffer_name, parametrized_weights
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.nn.scaled import Scaled
from ffnkit.ops.local import Activation, Gating
from ffnkit.ops.neurons import Neurons


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
    tied: dict[str, nn.Module] = field(default_factory=dict)

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
        limits = (
            config_value(place, name, self.layer) for place in (owner, config) for name in ("limit", "swiglu_limit")
        )
        own_gate = getattr(type(owner), "_apply_gate", None)
        usual = own_gate is None or own_gate.__module__ == "transformers.integrations.moe"
        return usual and all(limit is None for limit in limits)

    @property
    def experts(self) -> int:
        return self._tensor("down").shape[0] if self.layout.experts else 0

    @property
    def width(self) -> int:
        """ff, the number of neurons."""
        return self.features_of("down")[1]

    @property
    def d(self) -> int:
        return self.features_of("down")[0]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def own_parameters(self) -> int:
        """Numbers in its weights and biases, without those that train beside them."""
        return self.num_parameters - sum(p.numel() for update in self._updates() for p in update.added)

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions of the linears for one token, routed experts by their share of tokens."""
        if not self.layout.experts:
            return sum(flops(self.linear(site)) for site in self.sites) * self.active
        matrices = 3 if self.gated else 2
        return 2.0 * matrices * self.width * self.d * self.experts * self.active

    # --- parts

    @property
    def owners(self) -> dict[str, nn.Module]:
        """Every owner of these weights by name, this one first."""
        return {self.name: self.module, **self.tied}

    @property
    def differing(self) -> tuple[str, ...]:
        """Sites at which each owner has something of its own beside the weight that they share."""
        if self.layout.experts:
            return ()
        linears = {site: self.linear(site) for site in self.sites}
        return tuple(s for s, linear in linears.items() if isinstance(linear, ReparametrizedLinear) and linear.own)

    def is_own(self, name: str) -> bool:
        """Whether a tensor, by its name below an owner, is that owner's alone where several share the weights."""
        places = tuple(f"{self.path(site)}." for site in self.differing)
        return name.startswith(places) and not name.endswith(".weight") if places else False

    def apart(self) -> list[FFN]:
        """Each owner as an FFN of its own, this one first: their weights differ where :attr:`differing` says so."""
        return [replace(self, name=name, module=module, tied={}) for name, module in self.owners.items()]

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

    def linears(self, site: str) -> list[Any]:
        """Every linear at a site, in all owners, each once."""
        return list(dict.fromkeys(owner.get_submodule(self.path(site)) for owner in self.owners.values()))

    def parameters(self) -> list[nn.Parameter]:
        """The FFN's parameters, each once; those that places which share it have of their own too."""
        if self.layout.experts:
            return [self.module._parameters[name] for name in self.tensor_names]  # type: ignore[misc]
        found = (p for site in self.sites for linear in self.linears(site) for p in parameters(linear))
        return list(dict.fromkeys(found))

    @property
    def tensor_names(self) -> list[str]:
        """Of experts: the parameters by their names below the owner, weights and then biases."""
        paths = [self.path(site) for site in self.sites]
        biases = [f"{path}_bias" for path in paths]
        return [*paths, *(name for name in biases if self.module._parameters.get(name) is not None)]

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
            known = (buffer.split("_")[1:] for _, buffer in parametrized_weights(self.module))
            return {site: {"kind": kind} for kind, site in known}
        linears = {site: self.linear(site) for site in self.sites}
        return {
            site: linear.row()
            for site, linear in linears.items()
            if isinstance(linear, ReparametrizedLinear) and not isinstance(linear, AdapterLayer)
        }

    # --- weights

    def read(self) -> Neurons:
        """The weights as neurons: views of the parameters where they are plain, so bitwise what the model holds.

        Factors kept apart are multiplied in and thin pairs multiplied out (copies then).
        """
        return self._neurons(self._effective)

    def raw(self) -> Neurons:
        """The weights as neurons, a factor that stands apart left out."""
        return self._neurons(self.oriented)

    def _neurons(self, weight: Callable[[str], Tensor]) -> Neurons:
        up, up_bias = weight("up"), self._bias("up")
        gate = gate_bias = None
        if self.layout.fused:
            gate, up = self.halves(up, -2)
            if up_bias is not None:
                gate_bias, up_bias = self.halves(up_bias, -1)
        elif self.gated:
            gate, gate_bias = weight("gate"), self._bias("gate")
        return Neurons(up, weight("down"), gate, up_bias, gate_bias, self._bias("down"))

    def halves(self, value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """(gate, up) of a tensor that holds both."""
        if self.layout.interleaved:
            first, second = value.unflatten(dim, (-1, 2)).unbind(dim)
        else:
            first, second = value.chunk(2, dim=dim)
        return (second, first) if self.layout.up_first else (first, second)

    def fuse(self, gate: Tensor, up: Tensor, dim: int) -> Tensor:
        """One tensor of gate and up, in the order that the family has."""
        both = (up, gate) if self.layout.up_first else (gate, up)
        if self.layout.interleaved:
            return torch.stack(both, dim=dim).flatten(dim - 1, dim)
        return torch.cat(both, dim=dim)

    def site_values(self, neurons: Neurons) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight (out, in) and bias of neurons by the path of each linear or parameter."""
        values = {self.path("down"): (neurons.down, neurons.down_bias)}
        if self.layout.fused:
            assert neurons.gate is not None
            bias = None
            if neurons.up_bias is not None and neurons.gate_bias is not None:
                bias = self.fuse(neurons.gate_bias, neurons.up_bias, -1)
            values[self.path("up")] = (self.fuse(neurons.gate, neurons.up, -2), bias)
        else:
            values[self.path("up")] = (neurons.up, neurons.up_bias)
            if neurons.gate is not None:
                values[self.path("gate")] = (neurons.gate, neurons.gate_bias)
        return values

    @torch.no_grad()
    def write(self, neurons: Neurons) -> None:
        """Write weights of the same shape in place. Raises FfnkitError on another shape or reparametrized linears."""
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

    @property
    def updated(self) -> bool:
        """Whether an update, or coefficients, train beside a weight of the FFN."""
        return bool(self._updates())

    def _updates(self) -> list[AdapterLayer]:
        linears = [] if self.layout.experts else [self.linear(site) for site in self.sites]
        return [m for linear in linears for m in linear.modules() if isinstance(m, AdapterLayer)]

    def check_unedited(self, asked: str, but: Collection[str] = ()) -> None:
        """Raises FfnkitError where a factor, a thin pair or a mask stands in the place of plain weights.

        Args:
            but: kinds that may.
        """
        special = {site: row for site, row in self.special.items() if row["kind"] not in but}
        if special:
            kinds = ", ".join(f"{site} is {value['kind']}" for site, value in special.items())
            do = "Fold the model first (ffnkit.fold), then go on"
            if self.tied and self.differing:
                do = "Share with extras=false, or fold the model (ffnkit.fold): each layer then has an FFN of its own"
            raise FfnkitError(asked, f"{self.name} is edited already ({kinds})", do)
        for site in self.sites if not self.layout.experts else ():
            for owner in self.owners:
                check_editable(self.linear(site, self.owners[owner]), f"{owner}.{self.path(site)}".strip("."), asked)

    def check_plain(self, asked: str, but: Collection[str] = ()) -> None:
        """Raises FfnkitError where something special stands in the place of plain weights, or an update beside them.

        Args:
            but: kinds that may.
        """
        self.check_unedited(asked, but)
        if self.updated:
            do = "Fold the model first (ffnkit.fold), or take the adapter away"
            raise FfnkitError(asked, f"an update trains beside the weights of {self.name}", do)

    def _tensor(self, site: str) -> nn.Parameter:
        """The parameter of all experts at a site."""
        parameter = self.module._parameters[self.path(site)]
        assert parameter is not None
        return parameter

    def identity(self, site: str) -> int:
        """What FFNs that share this site's weights have in common."""
        if self.layout.experts:
            return id(self._tensor(site))
        return id(stored_weight(self.linear(site)))

    def features_of(self, site: str) -> tuple[int, int]:
        """(out, in)."""
        if self.layout.experts:
            return tuple(self.oriented(site).shape[-2:])  # type: ignore[return-value]
        return features(self.linear(site))

    def oriented(self, site: str) -> Tensor:
        """The weight as (out, in)."""
        if not self.layout.experts:
            return bare_weight(self.linear(site))
        return self._tensor(site).mT if self.layout.transposed else self._tensor(site)

    def _effective(self, site: str) -> Tensor:
        """The weight as (out, in) with every factor in it."""
        if self.layout.experts:
            weight: Tensor = self._tensor(site)
            for name, buffer in parametrized_weights(self.module):
                if name == self.path(site):
                    weight = weight * broadcast(getattr(self.module, buffer))
            return weight.mT if self.layout.transposed else weight
        return true_weight(self.linear(site))

    def _bias(self, site: str) -> Tensor | None:
        if self.layout.experts:
            return self.module._parameters.get(f"{self.path(site)}_bias")
        return unwrapped(self.linear(site)).bias


def _mixes(value: Any) -> bool:
    """Whether a module mixes features or tokens, as no activation does: it holds a matrix."""
    return isinstance(value, nn.Module) and any(parameter.ndim > 1 for parameter in value.parameters())


def activations(ffn: FFN) -> list[Activation]:
    """Functions that may be the FFN's activation, the likely ones first; who asks compares with what was observed."""
    from transformers.activations import ACT2FN

    own_gate = getattr(ffn.module, "_apply_gate", None)
    if ffn.layout.fused and own_gate is not None and not ffn.linear_in_up:
        return [Gating(lambda gate, up: own_gate(ffn.fuse(gate, up, -1)))]
    near = [*vars(ffn.module).values(), *ffn.module.children()]
    near += [value for child in ffn.module.children() for value in (*vars(child).values(), *child.children())]
    own = [value for value in near if callable(value) and not _mixes(value)]
    return [*own, *(ACT2FN[name] for name in ("gelu", "relu", "silu", "gelu_new", "quick_gelu", "relu2", "tanh"))]
