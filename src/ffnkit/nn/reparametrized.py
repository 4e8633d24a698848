"""What the reparametrized linears have in common: they stand in a plain layer's place and give it back when folded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class ReparametrizedLinear(nn.Module, ABC):
    """A linear that trains otherwise than a plain one. It keeps the names ``weight`` and ``bias``.

    It is no subclass of ``nn.Linear`` on purpose: an adapter that merged itself into ``weight`` would change the
    outputs. Libraries that look for linears leave it alone or say so.

    Attributes:
        kind: its name in checkpoints.
        own: whether what stands beside the weight is of its place alone where several places share the weight.
        transposed: whether the weight lies as (in, out), as in a Conv1D.
        bias: (out,) or None, taken over from the plain layer.
    """

    kind: ClassVar[str]
    own: ClassVar[bool] = False
    transposed: bool
    bias: nn.Parameter | None

    def _stand_in(self, linear: nn.Linear | Conv1D) -> None:
        """Take the place of ``linear`` and empty it.

        The emptied layer itself comes back when folding (Falcon and others use classes of their own). It is kept out
        of the submodules, so that it appears in no state dict and in no search for linears.
        """
        self.transposed = isinstance(linear, Conv1D)
        self.bias = linear.bias
        linear._parameters.update(weight=None, bias=None)
        self.__dict__["_shell"] = linear
        self.training = linear.training

    def _plain(self, weight: nn.Parameter) -> nn.Linear | Conv1D:
        """The layer that was replaced, around ``weight`` and the present bias."""
        plain: nn.Linear | Conv1D = self.__dict__["_shell"]
        plain._parameters.update(weight=weight, bias=self.bias)
        update_features(plain)  # it may have lost rows or columns since
        return plain.train(self.training)

    @property
    def stored(self) -> nn.Parameter:
        """The parameter by which layers that share their weights are told."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    @abstractmethod
    def features(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def flops(self) -> float:
        """Multiplications and additions for one token."""
        out, inner = self.features
        return 2.0 * out * inner

    @property
    def thin(self) -> tuple[str, ...]:
        """The names of the linears that it is made of, below it."""
        return ()

    @abstractmethod
    def folded(self) -> nn.Parameter:
        """The weight of the plain layer with equal outputs, as it is stored: a new one, or the very one here."""

    def fold(self, weight: nn.Parameter | None = None) -> nn.Linear | Conv1D:
        """The plain layer with equal outputs.

        Args:
            weight: what :meth:`folded` gave, where several layers over one weight are to share it.
        """
        return self._plain(self.folded() if weight is None else weight)

    def row(self) -> dict[str, Any]:
        """What a config says of it."""
        return {"kind": self.kind}

    def extra_repr(self) -> str:
        out, inner = self.features
        return f"out={out}, in={inner}, bias={self.bias is not None}, transposed={self.transposed}"


def update_features(linear: Any) -> None:
    """Make the sides that a plain linear remembers those of its weight."""
    rows, columns = linear.weight.shape
    if hasattr(linear, "nf"):
        linear.nf, linear.nx = columns, rows
    elif hasattr(linear, "out_features"):
        linear.out_features, linear.in_features = rows, columns


def oriented(weight: Tensor, transposed: bool) -> Tensor:
    """A stored weight as (out, in), or an (out, in) weight as it is stored."""
    return weight.mT if transposed else weight


def is_reparametrized(module: Any) -> bool:
    """Whether a module is a reparametrized linear, or the owner of experts whose class serves a factor."""
    return isinstance(module, ReparametrizedLinear) or hasattr(type(module), "ffnkit_served")
