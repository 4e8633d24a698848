"""The layer of SparseGrad: few numbers train, in a basis in which the gradient is sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.adapter_layer import AdapterLayer, full_tensor, own_dtypes, product_dtype
from ffnkit.nn.reparametrized import oriented
from ffnkit.nn.selecting import watched
from ffnkit.ops.entries import Entries
from ffnkit.ops.routes import Route, route

Selection = Literal["fixed", "refresh", "step", "masked-gradient"]


class Bases(nn.Module):
    """V (r, out) and U (c, in): leading rows of orthonormal bases. One module serves all layers that share them."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)  # adapters hold them, once
        self.register_buffer("right", right, persistent=False)
        self.left: Tensor
        self.right: Tensor


class SparseGradLinear(AdapterLayer):
    """``y = (W + V^T S U) x + b`` with S (r, c) zero but for chosen entries, which train.

    V (r, out) and U (c, in) are leading rows of orthonormal bases, as many as the layer's core has rows and columns;
    without bases S has W's own shape. The gradient of S
    is the gradient of W turned into the bases, V G U^T. It is formed from tokens turned first: no gradient of W is
    formed. In which order, and so whether backward keeps U X or X, is what takes the fewest operations
    (``ops.routes``).

    Attributes:
        values: (k,) float32: the chosen entries; (r, c) where they are chosen anew at every step.
        index: (k,) int32: row times c plus column of each value; absent where S trains as a whole.
        bases: V and U in the weight's dtype, of which layers that share them take leading rows, or None.
        core: (r, c).
        settled: (r, c) float32: entries that trained before and stay, with selection "refresh" only.
        energy: (r, c) float32: running squares of the gradient, with selection "refresh" only.

    Source: SparseGrad (arXiv 2410.07383), section 3: W~ = V W U^T and gW~ = V gW U^T.
    Differs: W stays in its own basis, and tokens pass through it as they are; the trajectory is the same for a fixed
        selection. Sums of updates are float32 whatever the weight's dtype.
    """

    kind: ClassVar[str] = "sparsegrad"
    index: Tensor | None
    bases: Bases | None
    settled: Tensor | None
    energy: Tensor | None
    steps: Tensor | None
    _shards: Tensor | None = None

    def __init__(
        self,
        linear: nn.Linear | Conv1D,
        *,
        index: Tensor | None = None,
        bases: Bases | None = None,
        core: Sequence[int] | None = None,
        values: Tensor | None = None,
        settled: Tensor | None = None,
        selection: Selection = "fixed",
        count: int = 0,
        every: int = 0,
        together: str = "",
        order: int = 0,
    ) -> None:
        super().__init__(linear)
        out, inner = self.features
        device, dtype = self.base.device, self.base.dtype
        shape = (out, inner) if bases is None else (len(bases.left), len(bases.right))
        if core is not None:
            shape = (int(core[0]), int(core[1]))
        self.bases = bases
        self.core, self.selection = shape, selection
        self.every, self.together, self.order = every, together, order
        self.count = count or (len(index) if index is not None else shape[0] * shape[1])
        exact = torch.promote_types(dtype, torch.float32)
        start = torch.zeros(shape if index is None else len(index)) if values is None else values
        self.values = nn.Parameter(start.to(device, exact, copy=True))
        self.register_buffer("index", None if index is None else index.to(device, torch.int32))
        blank = torch.zeros(shape, device=device, dtype=exact) if selection == "refresh" else None
        self.register_buffer("settled", blank if settled is None else settled.to(device, exact, copy=True))
        self.register_buffer("energy", None if blank is None else blank.clone())
        self.register_buffer("steps", None if blank is None else torch.zeros((), dtype=torch.int64, device=device))
        self._pending: Tensor | None = None
        self._backward = -1  # the number of the backward pass that it was added to last
        watched(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "values" and hasattr(value, "full_tensor"):  # FSDP2 exchanges them for the whole while it computes
            self.__dict__["_shards"] = value
        super().__setattr__(name, value)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # a copy is seen to as well
        watched(self)

    # --- the update

    def entries(self, values: Tensor | None = None) -> Tensor:
        """S as a whole, (r, c), float32."""
        given = full_tensor(self.values if values is None else values)
        if self.index is None:
            return given.detach()
        rows, columns = self.core
        base = given.new_zeros(rows * columns) if self.settled is None else self.settled.flatten().clone()
        return base.index_put_((self.index.long(),), given.detach()).view(rows, columns)

    def update(self) -> Tensor:
        with torch.no_grad():
            entries = self.entries()
            pair = self.pair(entries.dtype)
            return entries.clone() if pair is None else _formed(entries, *pair)

    @property
    def unstepped(self) -> int:
        return self.values.numel() - self.count if self.selection == "step" else 0

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """V (r, out) and U (c, in) of the core in a dtype, or None."""
        if self.bases is None:
            return None
        return self.bases.left[: self.core[0]].to(dtype), self.bases.right[: self.core[1]].to(dtype)

    def taken(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All entries that are not zero, as a fixed selection."""
        flat = self.entries().flatten()
        index = flat.nonzero()[:, 0].int()
        if self.index is not None:
            index = torch.unique(torch.cat([index, self.index]))  # sorted; those that are 0 still train on
        parts = {"index": index, "values": flat[index.long()]}
        given = {"selection": "fixed", "order": self.order, "together": self.together, "trained": len(index)}
        if self.bases is not None:
            parts |= {"left": self.bases.left, "right": self.bases.right}
            given |= {"core": list(self.core)}
        return given, parts

    @torch.no_grad()
    def cut(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """As ``AdapterLayer.cut``; it has bases of its own from then on, no longer orthonormal where they were cut.

        What was chosen, and all that is kept by places of the core, stays. Without bases entries go with their row or
        column.
        """
        if self.bases is not None:
            left, right = self.bases.left[: self.core[0]], self.bases.right[: self.core[1]]
            left = left if rows is None else left.index_select(1, rows)
            right = right if columns is None else right.index_select(1, columns)
            self.bases = Bases(left.contiguous(), right.contiguous())
        else:
            self._cut_entries(rows, columns)
        self.cut_frozen(rows, columns)

    def _cut_entries(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Without bases: entries in the places that stay."""
        grid = torch.arange(self.core[0] * self.core[1], device=self.values.device).view(self.core)
        grid = grid if rows is None else grid.index_select(0, rows)
        grid = grid if columns is None else grid.index_select(1, columns)
        if self.index is None:
            chosen = grid
        else:
            place = torch.full((self.core[0] * self.core[1],), -1, device=grid.device)
            place[self.index.long()] = torch.arange(len(self.index), device=grid.device)
            stands = place[grid.flatten()]
            self.index = (stands >= 0).nonzero()[:, 0].int()
            chosen = stands[self.index.long()]
        flat = self.values.detach().flatten()
        self.values = nn.Parameter(flat[chosen.flatten()].view(chosen.shape), self.values.requires_grad)
        for name in ("settled", "energy"):
            kept: Tensor | None = getattr(self, name)
            if kept is not None:
                setattr(self, name, kept.flatten()[grid.flatten()].view(grid.shape))
        self.core = (grid.shape[0], grid.shape[1])
        self.count = min(self.count, self.values.numel())
        self._pending = None

    @torch.compiler.disable  # a compiled model is cut here
    def forward(self, x: Tensor) -> Tensor:
        x = self.weighed(x)
        trains = torch.is_grad_enabled() and self.values.requires_grad
        return _Apply.apply(x, self.values, self.bias, self, product_dtype(x), trains)

    def received(self, core: Tensor) -> Tensor:
        """What the gradient (r, c) of S gives to ``values``; "refresh" keeps the whole as long as that is kept."""
        if self.selection == "refresh":
            this = torch._C._current_graph_task_id()
            if self._pending is not None and this != self._backward:
                self._pending = self._kept(self._pending)
            self._pending = core.clone() if self._pending is None else self._pending.add_(core)
            self._backward = this
        return core if self.index is None else core.flatten()[self.index.long()]

    def _kept(self, pending: Tensor) -> Tensor | None:
        """The whole of earlier passes where the optimizer's gradient of them is there; zeroed, it begins anew.

        Whether it is zeros stays on the device: the host waits for nothing.
        """
        held = [g for g in (self.values.grad, None if self._shards is None else self._shards.grad) if g is not None]
        if not held or any(hasattr(grad, "full_tensor") for grad in held):
            return pending if held else None
        return torch.where(torch.stack([grad.any() for grad in held]).any(), pending, 0.0)

    def extra_repr(self) -> str:
        rows, columns = self.core
        return f"trained={self.values.numel():,} of {rows} x {columns}, {self.selection}, {super().extra_repr()}"


def _formed(entries: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """V^T S U, by the order of fewer operations; a tensor of its own."""
    (r, out), (c, inner) = left.shape, right.shape
    if out * c * (r + inner) < inner * r * (c + out):
        return (left.T @ entries) @ right
    return left.T @ (entries @ right)


class _Apply(torch.autograd.Function):
    """The product, and the gradients of inputs, values and bias."""

    @staticmethod
    @own_dtypes
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseGradLinear, dtype: Any, trains: bool
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        run = _Run(layer, len(tokens), values, dtype)
        way, turned = run.way, None
        if way is not None and ((trains and way.gradient != "early") or (way.forward, way.thin) == ("tokens", "left")):
            turned = tokens @ run.right.T
        if way is not None and way.forward == "tokens":
            first, second = run.thin_pair()
            y = functional.linear(tokens, run.plain, bias)
            y.addmm_(tokens @ second.T if way.thin == "right" or turned is None else turned, first.T)
        else:
            y = run.product(tokens, bias)
        kept = tokens if way is None or way.gradient == "early" else turned
        ctx.save_for_backward(kept if trains else None, values, run.thin)
        ctx.layer, ctx.dtype, ctx.given = layer, x.dtype, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, values, thin = ctx.saved_tensors
        layer: SparseGradLinear = ctx.layer
        rows = grad.reshape(-1, grad.shape[-1])
        run = _Run(layer, len(rows), values, rows.dtype, thin)
        way, turned = run.way, None
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        x_grad = value_grad = None
        through = way is not None and needs_x and way.backward == "tokens"
        if way is not None and ((needs_values and way.gradient != "late") or (through and way.thin == "right")):
            turned = rows @ run.left.T
        if needs_x and way is not None and through:
            first, second = run.thin_pair()
            x_grad = rows @ run.plain
            x_grad.addmm_(rows @ first if way.thin == "left" or turned is None else turned, second)
        elif needs_x:
            x_grad = run.product_back(rows)
        if needs_values and run.few is not None:
            value_grad = run.few.gradient(rows, kept).to(values.dtype)
        elif needs_values:
            value_grad = layer.received(run.core_gradient(rows, turned, kept.to(rows.dtype)).to(values.dtype))
        bias_grad = rows.sum(0) if needs_bias else None
        return None if x_grad is None else x_grad.view(ctx.given).to(ctx.dtype), value_grad, bias_grad, None, None, None


class _Run:
    """The matrices of one pass through a layer, in the dtype of its tokens; what has a basis goes by its route.

    Without bases, a choice that stays is added to some rows of W at a time, and only its own gradient is formed.
    """

    def __init__(
        self, layer: SparseGradLinear, tokens: int, values: Tensor, dtype: torch.dtype, thin: Tensor | None = None
    ) -> None:
        self.dtype = dtype
        self.base = oriented(layer.base, layer.transposed)
        self.way: Route | None = None
        self.thin = thin
        self.few: Entries | None = None
        if layer.bases is None and layer.index is not None and layer.selection == "fixed":
            self.few = Entries(layer.index, values, layer.core)
            return
        self.entries = entries = layer.entries(values)
        if layer.bases is None:
            return
        self.way = route(*layer.features, *layer.core, tokens)
        self.pair = layer.pair(entries.dtype)
        if thin is None and self.pair is not None:
            left, right = self.pair
            self.thin = left.T @ entries if self.way.thin == "left" else entries @ right

    @property
    def plain(self) -> Tensor:
        """W (out, in)."""
        return self.base.to(self.dtype)

    @property
    def left(self) -> Tensor:
        """V (r, out)."""
        assert self.pair is not None
        return self.pair[0].to(self.dtype)

    @property
    def right(self) -> Tensor:
        """U (c, in)."""
        assert self.pair is not None
        return self.pair[1].to(self.dtype)

    def thin_pair(self) -> tuple[Tensor, Tensor]:
        """The update as (out, k) and (k, in)."""
        first, second = self._exact_pair()
        return first.to(self.dtype), second.to(self.dtype)

    def _exact_pair(self) -> tuple[Tensor, Tensor]:
        assert self.way is not None and self.pair is not None and self.thin is not None
        return (self.thin, self.pair[1]) if self.way.thin == "left" else (self.pair[0].T, self.thin)

    def weight(self) -> Tensor:
        """W and the update (out, in): summed in the values' precision, then rounded."""
        plain = self.base.to(self.entries.dtype)
        total = plain + self.entries if self.way is None else torch.addmm(plain, *self._exact_pair())
        return total.to(self.dtype)

    def product(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """The outputs, by W and the update together."""
        if self.few is None:
            return functional.linear(tokens, self.weight(), bias)
        return self.few.product(tokens, self.base, bias)

    def product_back(self, rows: Tensor) -> Tensor:
        """The gradient of the inputs, by the same."""
        return rows @ self.weight() if self.few is None else self.few.product_back(rows, self.base)

    def core_gradient(self, rows: Tensor, turned: Tensor | None, kept: Tensor) -> Tensor:
        """V gY^T X U^T (r, c) from gY, V gY where it is there, and X or U X, whichever was kept."""
        if self.way is None:
            return rows.T @ kept
        if self.way.gradient == "late":
            return self.left @ (rows.T @ kept)
        assert turned is not None
        return turned.T @ kept if self.way.gradient == "turned" else (turned.T @ kept) @ self.right.T
