"""The layer of DSEE: a low-rank and a sparse update train beside a frozen weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ffnkit.nn.adapter_layer import AdapterLayer, full_tensor, own_dtypes, product_dtype
from ffnkit.nn.quantized import float_weight, is_quantized_linear, plain_of, quantized_features, was_transposed
from ffnkit.nn.reparametrized import oriented
from ffnkit.ops.entries import Entries

START = 0.02  # standard deviation of V at the start


class SparseLowRank(AdapterLayer):
    """``y = (W + (alpha / r) (U V + S2)) x + b``: U, V and the chosen entries of S2 train.

    Backward keeps the inputs and V x, and refers to W: neither W + S2 nor a gradient of W is there as a whole. Entries
    are gathered from the inputs and added to the outputs; their gradients are gathered from both.

    Attributes:
        up: U (out, r), zero at the start; (len(rows), r) where only some outputs are updated. None with rank 0.
        down: V (r, in), normal of deviation 0.02 at the start. None with rank 0.
        values: (N,): the entries of S2, zero at the start. None without entries.
        index: (N,) int32, ascending: row times in plus column of each value; int64 for weights of 2^31 entries.
        rows: (m,) int32: the outputs that U V updates, or None: all.
        alpha: everything is scaled by alpha / rank; by alpha with rank 0.

    U, V and values are float32 whatever the weight's dtype (float64 over float64).

    Source: DSEE (arXiv 2111.00160), section 3.2, without its mask S1: where W is pruned, ``base`` holds the zeros.
    Differs: S2 is stored as N values and their places, where the released code trains a dense tensor under a mask.
    """

    kind: ClassVar[str] = "dsee"
    up: nn.Parameter | None
    down: nn.Parameter | None
    values: nn.Parameter | None
    index: Tensor | None
    rows: Tensor | None

    def __init__(
        self,
        linear: nn.Linear | Conv1D,
        *,
        rank: int = 0,
        alpha: float = 32.0,
        seed: int = 0,
        index: Tensor | None = None,
        values: Tensor | None = None,
        up: Tensor | None = None,
        down: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        out, inner = quantized_features(linear)
        super().__init__(linear)
        self.rank, self.alpha = rank, float(alpha)
        device = self.base.device
        exact = torch.promote_types(self.base.dtype, torch.float32) if self.base.is_floating_point() else torch.float32
        made: Any = {"device": device, "dtype": exact, "copy": True}
        self.register_buffer("rows", None if rows is None else rows.to(device, torch.int32))
        self.register_buffer("index", None if index is None else index.to(device, index_dtype(out, inner)))
        for name in ("up", "down", "values"):
            self.register_parameter(name, None)
        if rank:
            if down is None:
                down = torch.randn(rank, inner, generator=torch.Generator().manual_seed(seed)) * START
            up = torch.zeros(out if rows is None else len(rows), rank) if up is None else up
            self.up, self.down = nn.Parameter(up.to(**made)), nn.Parameter(down.to(**made))
        if index is not None:
            start = torch.zeros(len(index)) if values is None else values
            self.values = nn.Parameter(start.to(**made))

    @property
    def scale(self) -> float:
        """alpha / r, or alpha with rank 0."""
        return self.alpha / max(self.rank, 1)

    @property
    def trained(self) -> int:
        """How many parameters it trains."""
        return sum(p.numel() for p in (self.up, self.down, self.values) if p is not None)

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each value, int64."""
        entries = _entries(self, self.values)
        assert entries is not None
        return entries.places()

    # --- the update

    @torch.no_grad()
    def update(self) -> Tensor:
        total = self._product()
        if self.values is not None and self.index is not None:
            total.view(-1).index_add_(0, self.index.long(), full_tensor(self.values))
        return total.mul_(self.scale)

    @torch.no_grad()
    def low_rank(self) -> Tensor:
        return self._product().mul_(self.scale)

    def _product(self) -> Tensor:
        """U V, (out, in)."""
        out, inner = self.features
        like = self.values if self.values is not None else self.up
        assert like is not None
        total = torch.zeros(out, inner, dtype=like.dtype, device=like.device)
        if self.up is None or self.down is None:
            return total
        product = full_tensor(self.up) @ full_tensor(self.down)
        return total.add_(product) if self.rows is None else total.index_add_(0, self.rows.long(), product)

    def taken(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Rank and alpha; U, V, values and places."""
        named = {name: getattr(self, name) for name in ("up", "down", "values", "index", "rows")}
        parts = {name: full_tensor(value).detach().clone() for name, value in named.items() if value is not None}
        return {"rank": self.rank, "alpha": self.alpha, "trained": self.trained}, parts

    @torch.no_grad()
    def cut(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        out, inner = self.features
        if self.up is not None and rows is not None:
            mine = rows if self.rows is None else _found(rows, self.rows.long(), out)[1]
            if self.rows is not None:
                self.rows = _found(rows, self.rows.long(), out)[0].to(self.rows.dtype)
            self.up = _part(self.up, mine, 0)
        if self.down is not None and columns is not None:
            self.down = _part(self.down, columns, 1)
        if self.values is not None:
            row, column = self.places()
            row, column = _moved(row, rows, out), _moved(column, columns, inner)
            wide = inner if columns is None else len(columns)
            order = torch.where((row < 0) | (column < 0), torch.iinfo(torch.int64).max, row * wide + column)
            order, by = order.sort()
            left = int((order != torch.iinfo(torch.int64).max).sum())
            tall = out if rows is None else len(rows)
            self.index = order[:left].to(index_dtype(tall, wide))
            self.values = _part(self.values, by[:left], 0)
        self.cut_frozen(rows, columns)

    @torch.compiler.disable  # a compiled model is cut here
    def forward(self, x: Tensor) -> Tensor:
        x = self.weighed(x)
        return _Apply.apply(x, self.up, self.down, self.values, self.bias, self, product_dtype(x))

    def extra_repr(self) -> str:
        entries = 0 if self.values is None else len(self.values)
        return f"rank={self.rank}, entries={entries:,}, scale={self.scale:g}, {super().extra_repr()}"


class QuantizedSparseLowRank(SparseLowRank):
    """The same update beside a quantized weight: the quantized linear itself gives W x and its gradient.

    Folding gives a plain linear in float with the update in it: rounded into few bits, it would be lost in part.
    """

    def _stand_in(self, linear: nn.Linear | Conv1D) -> None:
        self.transposed = False
        self.bias = linear.bias
        linear._parameters["bias"] = None
        self.__dict__["_shell"] = linear
        self.training = linear.training

    @property
    def shell(self) -> Any:
        """The quantized linear, without bias."""
        linear = self.__dict__["_shell"]
        linear._parameters["weight"] = self.base  # which may have been moved to a device
        return linear

    @property
    def features(self) -> tuple[int, int]:
        return quantized_features(self.__dict__["_shell"])

    @property
    def weight(self) -> Tensor:
        """W + D, (out, in), in float32: what W stands for, and the update."""
        total = self.update()
        return self.with_coefficients(total.add_(float_weight(self.shell).to(total)))

    def folded(self, *, masked: bool = False) -> nn.Parameter:
        dtype = getattr(self.shell, "compute_dtype", None) or torch.float32
        return nn.Parameter(oriented(self.weight.to(dtype), was_transposed(self.shell)).contiguous())

    def fold(self, weight: nn.Parameter | None = None) -> nn.Linear | Conv1D:
        return plain_of(self.shell, self.folded() if weight is None else weight, self.bias)

    def restore(self) -> nn.Linear | Conv1D:
        linear = self.shell
        linear._parameters["bias"] = self.bias
        plain: nn.Linear | Conv1D = linear.train(self.training)
        return plain

    def cut(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        raise ValueError("a quantized weight cannot be cut: remove heads and neurons in float, then quantize")

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        x = self.weighed(x)
        y = self.shell(x)
        y = y + _Apply.apply(x, self.up, self.down, self.values, None, self, product_dtype(x)).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def sparse_low_rank(linear: nn.Linear | Conv1D, **given: Any) -> SparseLowRank:
    """The layer that fits a linear, be its weight in float or quantized."""
    return (QuantizedSparseLowRank if is_quantized_linear(linear) else SparseLowRank)(linear, **given)


def index_dtype(out: int, inner: int) -> torch.dtype:
    """The dtype that holds every place of a weight of this size."""
    return torch.int32 if out * inner < 1 << 31 else torch.int64


# --- the product and its gradients


class _Apply(torch.autograd.Function):
    """The product, and the gradients of inputs, U, V, values and bias. Over a quantized weight: of the update alone."""

    @staticmethod
    @own_dtypes
    def forward(
        ctx: Any, x: Tensor, up: Any, down: Any, values: Any, bias: Tensor | None, layer: SparseLowRank, dtype: Any
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        y = _frozen(layer, tokens, values, bias)
        reduced = None
        if up is not None:
            reduced = tokens @ down.to(dtype).T
            if layer.rows is None:
                y.addmm_(reduced, up.to(dtype).T, alpha=layer.scale)
            else:
                y.index_add_(1, layer.rows, reduced @ up.to(dtype).T, alpha=layer.scale)
        ctx.save_for_backward(tokens, reduced, up, down, values)
        ctx.layer, ctx.dtype, ctx.given = layer, x.dtype, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, grad: Tensor) -> Any:
        tokens, reduced, up, down, values = ctx.saved_tensors
        layer: SparseLowRank = ctx.layer
        rows, scale = grad.reshape(-1, grad.shape[-1]), layer.scale
        tokens = tokens.to(rows.dtype)
        x_grad = up_grad = down_grad = value_grad = bias_grad = back = None
        mine = rows if layer.rows is None or up is None else rows.index_select(1, layer.rows)
        if up is not None:
            back = mine @ up.to(rows.dtype)
        if ctx.needs_input_grad[0]:
            x_grad = _frozen_back(layer, rows, values)
            if back is not None:
                x_grad.addmm_(back, down.to(rows.dtype), alpha=scale)
            x_grad = x_grad.view(ctx.given).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            up_grad = (mine.T @ reduced.to(rows.dtype)).to(up.dtype).mul_(scale)
        if ctx.needs_input_grad[2] and back is not None:
            down_grad = (back.T @ tokens).to(down.dtype).mul_(scale)
        if ctx.needs_input_grad[3]:
            entries = _entries(layer, values)
            assert entries is not None
            value_grad = entries.gradient(rows, tokens).to(values.dtype).mul_(scale)
        if ctx.needs_input_grad[4]:
            bias_grad = rows.sum(0)
        return x_grad, up_grad, down_grad, value_grad, bias_grad, None, None


def _frozen(layer: SparseLowRank, tokens: Tensor, values: Tensor | None, bias: Tensor | None) -> Tensor:
    """(W + scale S2) x + b; without W x where the weight is quantized."""
    dtype, entries = tokens.dtype, _entries(layer, values)
    if isinstance(layer, QuantizedSparseLowRank):
        y = tokens.new_zeros(len(tokens), layer.features[0])
    elif entries is not None and _by_blocks(entries, tokens):
        plain = oriented(layer.base, layer.transposed)
        return entries.product(tokens, plain, None if bias is None else bias.to(dtype))
    else:
        plain = oriented(layer.base, layer.transposed).to(dtype)
        y = tokens @ plain.T if bias is None else torch.addmm(bias.to(dtype), tokens, plain.T)
    if entries is not None:
        entries.add(y, tokens)
    return y


def _frozen_back(layer: SparseLowRank, rows: Tensor, values: Tensor | None) -> Tensor:
    """The gradient of the inputs through W + scale S2; without W where the weight is quantized."""
    entries = _entries(layer, values)
    if isinstance(layer, QuantizedSparseLowRank):
        x_grad = rows.new_zeros(len(rows), layer.features[1])
    elif entries is not None and _by_blocks(entries, rows):
        return entries.product_back(rows, oriented(layer.base, layer.transposed))
    else:
        x_grad = rows @ oriented(layer.base, layer.transposed).to(rows.dtype)
    if entries is not None:
        entries.add_back(x_grad, rows)
    return x_grad


def _entries(layer: SparseLowRank, values: Tensor | None) -> Entries | None:
    if values is None:
        return None
    assert layer.index is not None
    return Entries(layer.index, values, layer.features, layer.scale)


def _by_blocks(entries: Entries, tokens: Tensor) -> bool:
    """Whether entries are put into blocks of the weight: where that is cheaper, and loses no bits of theirs.

    On a CPU an entry added to the outputs cost as much for each token as 8 numbers of the weight that are copied; and
    products by blocks, at 500 tokens, as much more than one product as that copy.
    """
    (out, inner), n = entries.shape, len(tokens)
    cheaper = 8 * n * len(entries.index) > out * inner * (1 + n / 500)
    return cheaper and tokens.dtype in (torch.float32, torch.float64)


# --- cutting


def _moved(places: Tensor, kept: Tensor | None, size: int) -> Tensor:
    """Where places stand among those that are kept; -1: gone."""
    if kept is None:
        return places
    to = torch.full((size,), -1, device=places.device)
    to[kept] = torch.arange(len(kept), device=places.device)
    return to[places]


def _found(kept: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of ``rows``: their new places, ascending by the old order, and which of them stay."""
    new = _moved(rows, kept, size)
    stay = (new >= 0).nonzero()[:, 0]
    return new[stay], stay


def _part(parameter: nn.Parameter, kept: Tensor, side: int) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(side, kept).contiguous(), parameter.requires_grad)
