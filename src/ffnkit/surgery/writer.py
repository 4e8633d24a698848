"""The hand that changes a model: edits say what, a writer puts new tensors and modules in the place of old ones.

It never writes into a tensor that is there, so that references are enough to undo all of it (``journal``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.edits.base import Edit
from ffnkit.edits.slicing import set_width
from ffnkit.errors import FfnkitError
from ffnkit.io import files
from ffnkit.io.progress import counted
from ffnkit.model import trainable
from ffnkit.model.attention import Attention, attentions
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns
from ffnkit.model.linear import is_maskable, is_transposed, stored_weight, walk
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.nn.expert_weights import buffer_name, parametrize_weight, parametrized_weights, remove_parametrizations
from ffnkit.nn.grouped_experts import run_uneven_experts
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import ReparametrizedLinear, update_features
from ffnkit.nn.scaled import Scaled
from ffnkit.nn.sparsegrad import Bases
from ffnkit.ops.neurons import Neurons
from ffnkit.surgery import compressed, description, head_config, layers


class ModelWriter:
    """Edits of one model, in memory or on the meta device; see ``edits.base.Writer``.

    Args:
        empty: whether numbers are left out: the model is on the meta device, and edits give shapes.
    """

    def __init__(self, model: Any, *, empty: bool = False) -> None:
        self.model, self.empty = model, empty
        found = ffns(model)
        self._ffns = {ffn.name: ffn for ffn in found}
        self._attentions: dict[str, Attention] | None = None
        self._places: dict[nn.Module, list[str]] | None = None
        self._holders: dict[int, list[tuple[str, nn.Module]]] | None = None
        self._flags = trainable.flags_by_name(model)
        self._gone: list[str] = []
        self._parts: list[str] | None = None
        self._values: dict[str, Tensor] = {}
        self._bases: dict[tuple[Any, ...], Bases] = {}

    # --- finding

    def ffn(self, name: str) -> FFN:
        """The FFN of that name; of FFNs that share their weights any name will do."""
        ffn = self._ffns.get(name) or next((f for f in self._ffns.values() if name in f.tied), None)
        if ffn is None:
            what = f"{type(self.model).__name__} has no such FFN"
            raise FfnkitError(f"the FFN {name}", what, "Make the plan for this model")
        return ffn

    def attention(self, name: str) -> Attention:
        """The attention of that name."""
        if self._attentions is None:
            self._attentions = {each.name: each for each in attentions(self.model)}
        if name not in self._attentions:
            what = f"{type(self.model).__name__} has no such attention"
            raise FfnkitError(f"removing heads of {name}", what, "Make the plan for this model")
        return self._attentions[name]

    def module(self, name: str) -> Any:
        """The module at a path, None where there is none."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def linears_of(self, weight: nn.Parameter) -> list[nn.Module]:
        """The linears that compute with a weight, each once."""
        return [module for module in self._where() if is_maskable(module) and stored_weight(module) is weight]

    def check_untied(self, parameter: nn.Parameter, within: Iterable[nn.Module], asked: str) -> None:
        """Raises FfnkitError where a module outside of ``within`` holds a parameter that is to become another one.

        What is tied stays tied: an edit that does not reach all places of a weight would leave two in the place of
        one, and the file that is saved would bring back only one of them.
        """
        inside = {id(module) for module in within}
        if self._holders is None:
            self._holders = {}
            for path, module in self.model.named_modules():
                for name, held in module._parameters.items():
                    if held is not None:
                        self._holders.setdefault(id(held), []).append((f"{path}.{name}".strip("."), module))
        outside = [path for path, module in self._holders.get(id(parameter), ()) if id(module) not in inside]
        if outside:
            do = "Untie the two first (tie_word_embeddings=False, or weights of their own), or leave this one out"
            raise FfnkitError(asked, f"its weight is tied to {outside[0]}", do)

    # --- writing

    def put(self, old: nn.Parameter, value: Tensor, within: Iterable[nn.Module]) -> nn.Parameter:
        """New numbers in the place of old ones (:func:`put`)."""
        return put(old, value, within)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """A module in the place of another, in every path where that one stands."""
        where = self._where()
        names = where.pop(old)
        for name in names:
            self.model.set_submodule(name, new)
        where.setdefault(new, []).extend(names)

    def resize(self, ffn: FFN, neurons: Neurons) -> None:
        """Give an FFN new neurons, any number of them; every owner of its weights follows."""
        resize(ffn, neurons)

    def attach(self, ffn: FFN, site: str, layer: type[ReparametrizedLinear], *tensors: Tensor) -> None:
        """Put a reparametrized linear in the place of a plain one: the same in every owner, so that they go on sharing.

        Args:
            layer: its class, made of the plain linear and of the tensors. Experts in 3-D parameters bear those that
                are a factor of their inputs, or a mask.
        """
        if layer is Masked:
            self._zero(ffn, site, tensors[0])
        if ffn.layout.experts:
            if layer not in (Scaled, Masked):
                ffn.linear(site)  # says why there is none
            if ffn.layout.transposed:  # factors as the parameters lie: (E, in, 1), or (E, in, out)
                tensors = tuple(t[..., None] if t.ndim == 2 else t.mT.contiguous() for t in tensors)
            factors = [t.clone() for t in tensors]
            for owner in dict.fromkeys(ffn.owners.values()):
                parametrize_weight(owner, ffn.path(site), layer.kind, site, *factors)
                factors = [getattr(owner, buffer_name(layer.kind, site))]
            return
        new: ReparametrizedLinear | None = None
        for linear in [each for each in ffn.linears(site) if not isinstance(each, ReparametrizedLinear)]:
            new = layer(linear, *(t.clone() for t in tensors)) if new is None or layer.own else new
            self.replace(linear, new)

    def _zero(self, ffn: FFN, site: str, mask: Tensor) -> None:
        """Weights that a mask leaves out become zero."""
        if ffn.layout.experts:
            old, holders = ffn.module._parameters[ffn.path(site)], list(dict.fromkeys(ffn.owners.values()))
            turned = ffn.layout.transposed
        else:
            holders = ffn.linears(site)
            old, turned = stored_weight(holders[0]), is_transposed(holders[0])
        assert old is not None
        stored = (mask.mT if turned else mask).to(old.device)
        self.put(old, old.detach().masked_fill(~stored, 0.0), holders)

    def share(self, ffn: FFN, source: str, name: str) -> None:
        """Let the owner ``name`` use the weights of the owner ``source`` of ``ffn``.

        An owner that holds nothing else is replaced as a whole: libraries that exchange its linears (adapters,
        wrappers) then do so for all places at once. Elsewhere the linears are shared, or the weight alone where each
        has something of its own beside it.
        """
        first, owner = ffn.owners[source], self.model.get_submodule(name)
        if owner is not first:
            self._places = None
            if ffn.layout.experts:
                for path in ffn.tensor_names:
                    owner._parameters[path] = first._parameters[path]
                remove_parametrizations(owner)
                for path, buffer in parametrized_weights(first):
                    _, kind, site = buffer.split("_")
                    parametrize_weight(owner, path, kind, site, getattr(first, buffer))
            elif _exchangeable(first, owner, ffn):
                self.model.set_submodule(name, first)
            else:
                for site in ffn.sites:
                    mine: Any = owner.get_submodule(ffn.path(site))
                    theirs: Any = first.get_submodule(ffn.path(site))
                    if site in ffn.differing:
                        mine._parameters["weight"] = theirs._parameters["weight"]
                    else:
                        owner.set_submodule(ffn.path(site), theirs)
        if name != ffn.name:
            ffn.tied[name] = self.model.get_submodule(name)
            self._ffns.pop(name, None)

    def drop_layer(self, name: str) -> None:
        """Take a layer out; once all edits are carried out, since the names behind it change."""
        self._gone.append(name)

    # --- updates

    def before_updates(self) -> None:
        """Note what trains now: edits before may have made parameters."""
        trainable.renew(self.model, self._flags)
        trainable.remember(self.model)

    def bases(self, left: Tensor, right: Tensor, like: Tensor) -> Bases:
        """Bases on the device and in the dtype of a weight; those made of the same tensors are one module."""
        kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        key = (id(left), id(right), *kind.values())
        if key not in self._bases:
            self._bases[key] = Bases(left.to(**kind), right.to(**kind))
        return self._bases[key]

    def let_train(self, parts: Sequence[str], values: Mapping[str, Tensor]) -> None:
        """At the end these parts of the model train beside the updates, and nothing else."""
        self._parts = [*(self._parts or ()), *parts]
        self._values |= values

    def keep_noted(self, parameter: nn.Parameter, index: Tensor, axis: int) -> None:
        """What is noted of a parameter from before the updates keeps these places of an axis, as the parameter does."""
        parts, before = trainable.noted(self.model)
        names = [name for name, held in self.model.named_parameters() if held is parameter] if before else []
        if before and any(name in before for name in names):
            kept = {n: before[n].index_select(axis, index.to(before[n].device)) for n in names if n in before}
            trainable.note(self.model, parts, before | kept)

    # --- carrying out

    def check(self, edits: Iterable[Edit]) -> None:
        """Raises FfnkitError where the model does not bear one of the edits; reads only."""
        for edit in edits:
            edit.check(self)

    def carry_out(self, edits: Iterable[Edit]) -> None:
        """All of the edits, in order, and then what follows from them: numbers of layers, config, what trains."""
        edits, found = tuple(edits), list(self._ffns.values())
        if compressed.places(edits):
            compressed.leave_name(self.model)
        keys, original = description.width_keys(self.model, found), description.original_widths(self.model, found)
        with torch.no_grad():
            for edit in edits if self.empty else counted(edits, "applying"):
                edit.perform(self)
            self._settle(keys, original)

    def _settle(self, keys: description.Keys, original: dict[str, int]) -> None:
        trainable.renew(self.model, self._flags)
        if self._gone:
            renamed = layers.without_layers(self.model, self._gone)
            keys, original = layers.moved(keys, renamed, self._gone), layers.moved(original, renamed, self._gone)
        head_config.settle(self.model)
        description.update_config(self.model, keys, original)
        run_uneven_experts(self.model)
        if self._parts is not None:
            let_train(self.model, self._parts)
            self.write_values(self._values)

    def write_values(self, values: Mapping[str, Tensor]) -> None:
        """New parameters of these values by name. Raises FfnkitError for one that is not there, or of another shape."""
        own = dict(self.model.named_parameters())
        for name, value in values.items():
            if name not in own or own[name].shape != value.shape:
                here = "not there" if name not in own else f"of shape {tuple(own[name].shape)}"
                do = "Load the model with the same task head"
                raise FfnkitError(f"writing {name} of shape {tuple(value.shape)}", f"it is {here}", do)
        for name, value in values.items():
            put(own[name], value, ())

    def _where(self) -> dict[nn.Module, list[str]]:
        """Every path of each module."""
        if self._places is None:
            self._places = {}
            for name, module in walk(self.model):
                self._places.setdefault(module, []).append(name)
        return self._places


def put(old: nn.Parameter, value: Tensor, within: Iterable[nn.Module]) -> nn.Parameter:
    """New numbers in the place of old ones; what comes back is the parameter that holds them.

    Of the same shape they become the parameter's data: an optimizer that has it goes on, and so do all that share it.
    Else a new parameter takes its place wherever these modules hold it; it trains where that one did. The old tensor
    itself keeps its bits.
    """
    new = files.held(value.detach().to(device=old.device, dtype=old.dtype).contiguous())
    if new.data_ptr() == old.data_ptr() and not new.is_meta:
        new = new.clone()
    if new.shape == old.shape:
        old.data = new
        return old
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    if getattr(old, "_is_hf_initialized", False):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in dict.fromkeys(within):
        for name, held in module._parameters.items():
            if held is old:
                module._parameters[name] = parameter
    return parameter


def resize(ffn: FFN, neurons: Neurons) -> None:
    """Give an FFN new neurons, any number of them; every owner of its weights follows."""
    owners = list(dict.fromkeys(ffn.owners.values()))
    for path, (weight, bias) in ffn.site_values(neurons).items():
        if ffn.layout.experts:
            old = ffn.module._parameters[path]
            assert old is not None
            put(old, weight.mT if ffn.layout.transposed else weight, owners)
            beside = ffn.module._parameters.get(f"{path}_bias")
            if beside is not None and bias is not None:
                put(beside, bias, owners)
            continue
        linears = list(dict.fromkeys(owner.get_submodule(path) for owner in owners))
        first: Any = linears[0]
        old_bias = first.bias
        put(first.weight, weight.mT if is_transposed(first) else weight, linears)
        if bias is not None:
            put(old_bias, bias, linears)
        for linear in linears:
            update_features(linear)
    set_width(ffn, neurons.ff)


def _exchangeable(first: nn.Module, owner: nn.Module, ffn: FFN) -> bool:
    """Whether two owners hold nothing but an FFN, and are told alike in all else (a layer's number would differ)."""
    inside = {id(p) for site in ffn.sites for p in first.get_submodule(ffn.path(site)).parameters()}
    facts = [{k: v for k, v in vars(m).items() if type(v) in (int, float, str, bool)} for m in (first, owner)]
    return (
        not ffn.differing
        and type(first) is type(owner)
        and facts[0] == facts[1]
        and all(id(p) in inside for p in first.parameters())
        and not [name for name, _ in first.named_buffers() if not name.startswith(tuple(map(ffn.path, ffn.sites)))]
    )


# --- what trains beside updates


def let_train(model: nn.Module, parts: list[str]) -> None:
    """What updated linears train and these parts of the model, and nothing else; parts of earlier updates train on."""
    known, old = trainable.noted(model)
    parts = list(dict.fromkeys([*known, *parts]))
    chosen = {id(p) for p in trainable.parts_of(model, parts)}
    for layer in adapter_layers(model).values():
        chosen -= {id(layer.base)}
        chosen |= {id(p) for p in layer.added}
    trainable.train_only(model, lambda parameter: id(parameter) in chosen)
    before = {name: p.detach().clone() for name, p in beside(model).items()} if "rest" not in parts else None
    if before is not None:  # what trained already is as it was before the first update came
        own = dict(model.named_parameters())
        under = {name: name if name in own else f"{name.removesuffix('.weight')}.base" for name in old or ()}
        before |= {under[name]: value for name, value in (old or {}).items()}
    trainable.note(model, parts, before)


def beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains beside the updates, by name."""
    inside = {id(p) for layer in adapter_layers(model).values() for p in (layer.base, *layer.added)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


def parts_beside(model: nn.Module) -> list[str]:
    """The parts that were let train beside the updates."""
    return list(trainable.noted(model)[0])
