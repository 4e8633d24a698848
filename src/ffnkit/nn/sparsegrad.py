"""The layer of SparseGrad: few numbers train, in a basis in which the gradient is sparse."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.adapted import Adapted, whole
from ffnkit.nn.selecting import watched
from ffnkit.nn.special import oriented

Selection = Literal["fixed", "refresh", "step"]


class Bases(nn.Module):
    """V (r, out) and U (c, in): leading rows of orthonormal bases. One module serves all layers that share them."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)  # adapters hold them, once
        self.register_buffer("right", right, persistent=False)
        self.left: Tensor
        self.right: Tensor


class SparseGradLinear(Adapted):
    """``y = (W + V^T S U) x + b`` with S (r, c) zero but for chosen entries, which train.

    V (r, out) and U (c, in) are leading rows of orthonormal bases; without them S has W's own shape. The gradient of S
    is the gradient of W turned into the bases, V G U^T. It is formed from tokens turned first, (V gY)^T (U X): no
    gradient of W is formed, and backward keeps U X in place of the inputs.

    Attributes:
        values: (k,) float32: the chosen entries; (r, c) where they are chosen anew at every step.
        index: (k,) int32: row times c plus column of each value; absent where S trains as a whole.
        bases: V and U in the weight's dtype, or None.
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

    def __init__(
        self,
        linear: nn.Linear | Conv1D,
        *,
        index: Tensor | None = None,
        bases: Bases | None = None,
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
        watched(self)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # a copy is seen to as well
        watched(self)

    # --- the update

    def entries(self, values: Tensor | None = None) -> Tensor:
        """S as a whole, (r, c), float32."""
        given = self.values if values is None else values
        if self.index is None:
            return given.detach()
        rows, columns = self.core
        base = self.values.new_zeros(rows * columns) if self.settled is None else self.settled.flatten().clone()
        return base.index_put_((self.index.long(),), given.detach()).view(rows, columns)

    def update(self) -> Tensor:
        with torch.no_grad():
            return _update(self.entries(whole(self.values)), self.bases)

    def taken(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All entries that are not zero, as a fixed selection."""
        flat = self.entries().flatten()
        index = flat.nonzero()[:, 0].int()
        if self.index is not None:
            index = torch.unique(torch.cat([index, self.index]))  # sorted; those that are 0 still train on
        parts = {"index": index, "values": flat[index.long()]}
        if self.bases is not None:
            parts |= {"left": self.bases.left, "right": self.bases.right}
        return {"selection": "fixed", "order": self.order, "together": self.together, "trained": len(index)}, parts

    @torch.compiler.disable  # a compiled model is cut here
    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        trains = torch.is_grad_enabled() and self.values.requires_grad
        return _Apply.apply(x, self.values, self.bias, self, dtype, trains)

    def received(self, core: Tensor) -> Tensor:
        """What the gradient (r, c) of S gives to ``values``."""
        if self.selection == "refresh":
            self._pending = core if self._pending is None else self._pending.add_(core)
        return core if self.index is None else core.flatten()[self.index.long()]

    def extra_repr(self) -> str:
        rows, columns = self.core
        return f"trained={self.values.numel():,} of {rows} x {columns}, {self.selection}, {super().extra_repr()}"


def _update(entries: Tensor, bases: Bases | None) -> Tensor:
    """V^T S U in the dtype of S, by whichever order takes fewer operations; a tensor of its own."""
    if bases is None:
        return entries.clone()
    left, right = bases.left.to(entries.dtype), bases.right.to(entries.dtype)
    (r, out), (c, inner) = left.shape, right.shape
    if out * c * (r + inner) < inner * r * (c + out):
        return (left.T @ entries) @ right
    return left.T @ (entries @ right)


class _Apply(torch.autograd.Function):
    """The product, and the gradients of inputs, values and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseGradLinear, dtype: Any, trains: bool
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        entries, bases, plain = layer.entries(values), layer.bases, oriented(layer.base, layer.transposed)
        turned = None
        if trains:
            turned = tokens if bases is None else tokens @ bases.right.to(dtype).T
        if bases is not None and _through_tokens(layer, len(tokens)):
            turned = tokens @ bases.right.to(dtype).T if turned is None else turned
            y = tokens @ plain.to(dtype).T
            y += (turned @ entries.to(dtype).T) @ bases.left.to(dtype)
        else:
            weight = _update(entries, bases)
            weight += plain
            y = tokens @ weight.to(dtype).T
        if bias is not None:
            y += bias.to(dtype)
        ctx.save_for_backward(turned if trains else None, values)
        ctx.layer, ctx.dtype, ctx.given = layer, x.dtype, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        turned, values = ctx.saved_tensors
        layer: SparseGradLinear = ctx.layer
        rows = grad.reshape(-1, grad.shape[-1])
        dtype, bases = rows.dtype, layer.bases
        back = rows if bases is None else rows @ bases.left.to(dtype).T
        x_grad = bias_grad = value_grad = None
        if ctx.needs_input_grad[0]:
            entries, plain = layer.entries(values), oriented(layer.base, layer.transposed)
            if bases is None:
                weight = _update(entries, None)
                weight += plain
                x_grad = rows @ weight.to(dtype)
            else:
                x_grad = rows @ plain.to(dtype)
                x_grad += (back @ entries.to(dtype)) @ bases.right.to(dtype)
            x_grad = x_grad.view(ctx.given).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            value_grad = layer.received((back.T @ turned.to(dtype)).to(values.dtype))
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0)
        return x_grad, value_grad, bias_grad, None, None, None


def _through_tokens(layer: SparseGradLinear, tokens: int) -> bool:
    """Whether turning so many tokens takes fewer operations than forming the weight."""
    (r, c), (out, inner) = layer.core, layer.features
    weight = min(out * c * (r + inner), inner * r * (c + out)) + 2 * out * inner
    return tokens * (r * c + r * out) < weight
