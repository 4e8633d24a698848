"""Linears whose own weight stays as it is while a small update of it trains."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented
from ffnkit.nn.shrinking import shrinking

F = TypeVar("F", bound=Callable[..., Any])


class AdapterLayer(ReparametrizedLinear):
    """``y = (W + D) (c (.) x) + b`` with W frozen, an update D that is never kept as a whole, and mostly without c.

    The weight that the layer stood in for is untouched, so taking the update away gives back its very bits in every
    dtype. The state dict shows the sum under the name ``weight``, beside what D is made of: what saves the model
    without knowing of this layer saves a model that computes the same. Reading such a state dict back takes the parts
    of D only; the weight below has to be there already, and is told apart by its fingerprint.

    Attributes:
        base: W as it is stored, (out, in), or (in, out) where a Conv1D was replaced.
        coefficients: (units,) factors c of the inputs that train, in float32 at least, or None; a unit is in / units
            inputs that follow each other. l1: how much each step of an optimizer draws them towards zero, relative to
            the learning rate.

    Differs: l1 is a step of its own behind the optimizer's, the soft threshold by lr * l1 (proximal gradient), not a
        part of the loss: adaptive optimizers would scale it away, and nothing would ever reach zero.
    """

    coefficients: nn.Parameter | None

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.base: nn.Parameter = linear.weight  # type: ignore[assignment]
        self.__dict__["_trained"] = self.base.requires_grad
        self._stand_in(linear)
        self.base.requires_grad_(False)
        # only its name counts here: the state dict holds it, computed when it is written
        self.register_buffer("fingerprint", torch.zeros(2, dtype=torch.int64))
        self.register_parameter("coefficients", None)
        self.l1 = 0.0

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self.coefficients is not None:
            shrinking(self)  # a copy is seen to as well

    @abstractmethod
    def update(self) -> Tensor:
        """D, (out, in), in float32 at least."""

    def low_rank(self) -> Tensor | None:
        """The low-rank part of D alone, as :meth:`update` gives it; None where D has no such part."""
        return None

    @abstractmethod
    def cut(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Keep only these outputs and inputs, in place; the update loses what belongs to the others.

        Args:
            rows, columns: int64 places of the outputs and the inputs that stay, in their new order; None: all.
        """

    @abstractmethod
    def taken(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings and tensors that make this update anew; the tensors are no views of what trains."""

    @property
    def added(self) -> list[nn.Parameter]:
        """What stands beside the weight and its bias."""
        return [p for name, p in self.named_parameters(recurse=False) if name not in ("base", "bias")]

    @property
    def unstepped(self) -> int:
        """How many of the numbers that train a step of the optimizer leaves as they are."""
        return 0

    # --- coefficients

    def use_coefficients(self, values: Tensor, l1: float = 0.0) -> None:
        """Let factors of the inputs train.

        Args:
            values: (units,), of which each stands for as many inputs as the others. l1: see the class.
        """
        if self.features[1] % len(values):
            raise ValueError(f"{len(values)} coefficients for {self.features[1]} inputs")
        exact = torch.promote_types(self.base.dtype, torch.float32) if self.base.is_floating_point() else torch.float32
        self.coefficients = nn.Parameter(values.to(self.base.device, exact, copy=True))
        self.l1 = float(l1)
        shrinking(self)

    def weighed(self, x: Tensor) -> Tensor:
        """The inputs (.., in) times their coefficients, in their own dtype."""
        if self.coefficients is None:
            return x
        factors = self.coefficients.to(x.dtype)
        return (x.unflatten(-1, (len(factors), -1)) * factors[:, None]).flatten(-2)

    @torch.no_grad()
    def by_input(self) -> Tensor | None:
        """(in,) the coefficient of each input, or None."""
        if self.coefficients is None:
            return None
        values = full_tensor(self.coefficients).detach()
        return values.repeat_interleave(self.features[1] // len(values))

    def with_coefficients(self, weight: Tensor) -> Tensor:
        """(out, in): columns times their coefficients."""
        factors = self.by_input()
        return weight if factors is None else weight * factors.to(weight)

    def made_of(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings and tensors of the update (:meth:`taken`) and of the coefficients."""
        given, parts = self.taken()
        if self.coefficients is not None:
            values = full_tensor(self.coefficients).detach().clone()
            given = given | {"trained": given["trained"] + len(values), "l1": self.l1}
            parts = parts | {"coefficients": values}
        return given, parts

    @property
    def stored(self) -> nn.Parameter:
        return self.base

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self.base.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def weight(self) -> Tensor:
        """(W + D) c as the replaced layer stored it, computed anew; in W's dtype, rounded once."""
        with torch.no_grad():
            total = self.update()
            total += oriented(full_tensor(self.base), self.transposed).to(total)
            total = self.with_coefficients(total)
        return oriented(total, self.transposed).to(self.base.dtype)

    def merged(self, *, masked: bool) -> Tensor:
        """(W + D) c as it is stored; with ``masked`` zero wherever W is: a pruned weight stays as sparse as it was."""
        weight = self.weight.contiguous()
        return weight.masked_fill_(full_tensor(self.base) == 0, 0.0) if masked else weight

    def folded(self, *, masked: bool = False) -> nn.Parameter:
        """The weight with the update in it (:meth:`merged`)."""
        return nn.Parameter(self.merged(masked=masked), self.__dict__["_trained"])

    def restore(self) -> nn.Linear | Conv1D:
        """The plain layer with the very weight that was there before."""
        self.base.requires_grad_(self.__dict__["_trained"])
        return self._plain(self.base)

    @torch.no_grad()
    def cut_frozen(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Cut weight, bias and coefficients, and tell the emptied layer its new sides."""
        if self.coefficients is not None and columns is not None:
            each = self.features[1] // len(self.coefficients)
            units = columns.view(-1, each)[:, 0] // each
            kept = self.coefficients.index_select(0, units)
            self.coefficients = nn.Parameter(kept.detach(), self.coefficients.requires_grad)
        weight = oriented(self.base, self.transposed)
        weight = weight if rows is None else weight.index_select(0, rows)
        weight = weight if columns is None else weight.index_select(1, columns)
        self.base = nn.Parameter(oriented(weight, self.transposed).contiguous(), False)
        if self.bias is not None and rows is not None:
            self.bias = nn.Parameter(self.bias.index_select(0, rows), self.bias.requires_grad)
        shell: Any = self.__dict__["_shell"]
        out, inner = self.features
        if isinstance(shell, nn.Linear):
            shell.out_features, shell.in_features = out, inner
        else:
            shell.nf, shell.nx = out, inner

    # --- state dict

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix + "base" in destination:
            del destination[prefix + "base"]
            destination[prefix + "weight"] = self.base if self.base.is_meta else sharded_as(self.weight, self.base)
            destination[prefix + "fingerprint"] = fingerprint(full_tensor(self.base))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        known = state_dict.get(prefix + "fingerprint")
        own = {k: v for k, v in state_dict.items() if k not in (prefix + "weight", prefix + "fingerprint")}
        if known is not None and not torch.equal(known.cpu(), fingerprint(full_tensor(self.base))):
            errors.append(f"{prefix}base: the update was made for another weight than the one that is here")
        own[prefix + "base"] = self.base
        own[prefix + "fingerprint"] = self.fingerprint
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + "weight" in unexpected:
            unexpected.remove(prefix + "weight")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear computes in with these inputs: autocast's where it is on, else theirs."""
    kind = x.device.type
    cast = x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def own_dtypes(function: F) -> F:
    """A pass of an autograd function without autocast, which would change single products of those it holds."""

    @functools.wraps(function)
    def without(ctx: Any, *given: Any) -> Any:
        kind = given[0].device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return function(ctx, *given)

    return cast(F, without)


def full_tensor(tensor: Tensor) -> Tensor:
    """What lies in shards over several processes, as a whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor: Any) -> Tensor:
    """This process's shard of what lies in shards, which shares its memory."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def sharded_as(whole: Tensor, tensor: Any) -> Tensor:
    """A whole in the shards of another tensor, where that lies in shards."""
    if not hasattr(tensor, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, tensor.device_mesh, tensor.placements)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The layers of this kind by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what updates are made of: the entries of plain layers, the sums among them."""
    every = model.named_modules(remove_duplicate=False)
    places = {f"{name}.": module for name, module in every if isinstance(module, AdapterLayer)}
    kept = {place + key for place in places for key in ("weight", "bias")}
    state = model.state_dict()
    first: dict[int, str] = {}
    for place, module in places.items():  # one sum for all places of a layer, which are stored once
        own = first.setdefault(id(module), place)
        if own == place:  # a sum may lie transposed, which files of shared tensors do not bear
            state |= {key: state[key].contiguous() for key in (f"{place}weight", f"{place}bias") if key in state}
        state |= {place + key: state[own + key] for key in ("weight", "bias") if own + key in state}
    return {name: value for name, value in state.items() if name in kept or not name.startswith(tuple(places))}


def fingerprint(weight: Tensor) -> Tensor:
    """(2,) int64 that tells weights apart: two sums over all of their bits, the second one weighed by place.

    Equal for equal bits, whatever the device. It is no proof against a forger.
    """
    if weight.is_meta:
        return torch.zeros(2, dtype=torch.int64)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if hasattr(weight.data, "__tensor_flatten__"):  # of several tensors: quantized numbers, and their scales
        inner = weight.data.__tensor_flatten__()[0]
        return torch.stack([fingerprint(getattr(weight.data, name)) for name in inner]).sum(0)
    flat = weight.detach().as_subclass(Tensor).contiguous().view(-1)
    sums = torch.zeros(2, dtype=torch.int64, device=weight.device)
    for number, part in enumerate(flat.split(1 << 20)):
        bits = part.view(kinds[part.element_size()]).long()
        place = torch.arange(1, len(bits) + 1, device=bits.device)
        sums[0] += bits.sum()
        sums[1] += (bits * place).sum() * (2 * number + 1)
    return sums.cpu()
