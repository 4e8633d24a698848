"""Zeros in single weights that stay zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ffnkit.edits.base import Edit, Own, Quantities, Stage, Writer, notes
from ffnkit.edits.fields import Bits, Sizes
from ffnkit.edits.slicing import check_ffn_untied
from ffnkit.errors import FfnkitError
from ffnkit.io.files import spooled
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import check_float, is_maskable, is_transposed, stored_weight
from ffnkit.nn.adapter_layer import AdapterLayer
from ffnkit.nn.masked import Masked
from ffnkit.nn.reparametrized import ReparametrizedLinear, oriented
from ffnkit.ops.masks import packed, unpacked


@dataclass(frozen=True, eq=False)
class Mask(Edit):
    """Weights of a linear, or of experts, become zero and stay zero.

    Attributes:
        target: the FFN; or, with site "", the path of a linear anywhere in the model.
        site: "up", "gate", "down", or "". shape: of the weight, (.., out, in).
        bits: uint8, the mask's bits packed row by row, the first one highest; ones stay.
    """

    site: Annotated[str, Field(pattern="^(up|gate|down|)$")]
    shape: Sizes
    bits: Bits

    kind: ClassVar[str] = "Mask"
    layer: ClassVar[type[ReparametrizedLinear]] = Masked
    stage: ClassVar[Stage] = Stage.MASK
    precedence: ClassVar[int] = 5

    @classmethod
    def of(cls, target: str, site: str, mask: Tensor) -> Mask:
        """The edit that keeps the weights where ``mask`` (bool, as the weight lies in (.., out, in)) is true."""
        return cls(target, site=site, shape=list(mask.shape), bits=spooled(packed(mask)))

    @classmethod
    def blank(cls, ffn: FFN, site: str, row: dict[str, Any]) -> Mask:
        """The edit with all weights kept: the structure that a config describes."""
        return cls._whole(ffn.name, site, ffn.oriented(site))

    @classmethod
    def blank_linear(cls, name: str, linear: nn.Module) -> Mask:
        """The same for a linear anywhere."""
        return cls._whole(name, "", oriented(stored_weight(linear), is_transposed(linear)))

    @classmethod
    def _whole(cls, target: str, site: str, weight: Tensor) -> Mask:
        with torch.device("cpu"):
            return cls.of(target, site, torch.ones(weight.shape, dtype=torch.bool))

    @property
    def touched(self) -> tuple[str, ...]:
        return (self.target,) if self.site else ()  # a linear's mask changes no FFN's shape

    @property
    def repeats(self) -> bool:
        return not self.site  # what two masks keep stays

    @property
    def asked(self) -> str:
        return f"masking {self.target}"

    @property
    def kept(self) -> int:
        """How many weights stay."""
        parts = np.array_split(self.bits.numpy(), 1 + len(self.bits) // (1 << 20))
        return sum(int(np.unpackbits(part).sum()) for part in parts)  # bits past the end are zeros

    @property
    def zeros(self) -> tuple[int, int]:
        total = math.prod(self.shape)
        return total - self.kept, total

    def check_fields(self) -> str:
        total = math.prod(self.shape)
        if len(self.bits) != -(-total // 8):
            return f"{len(self.bits)} bytes are no mask of {' x '.join(map(str, self.shape))}"
        if total % 8 and int(self.bits[-1]) & (0xFF >> total % 8):
            return "its bits go on past its end"
        return ""

    def mask(self) -> Tensor:
        """The mask, bool."""
        return unpacked(self.bits, self.shape)

    # --- how it prints

    @classmethod
    def becomes(cls: type[Own], edits: Sequence[Own], name: str) -> str:
        counts = [edit.zeros or (0, 0) for edit in edits]
        total = sum(whole for _, whole in counts)
        return f"{total - sum(zero for zero, _ in counts):,} of {total:,} weights not zero"

    @classmethod
    def lines(cls: type[Own], edits: Sequence[Own], quantities: Quantities) -> list[str]:
        """A line for each linear that gets zeros, and one for all weights that do."""
        masks = cast(Sequence[Mask], edits)
        linears = [edit for edit in masks if not edit.site]
        if not linears:
            return []
        sizes = {id(edit): edit.zeros for edit in masks}
        width = max(len(edit.target) for edit in linears)
        lines = []
        for edit in linears:
            zero, total = sizes[id(edit)]
            shape = " x ".join(map(str, edit.shape))
            share = 1 - (total - zero) / max(total, 1)
            lines.append(f"  {edit.target:<{width}}  {shape}, {share:.1%} zero{notes(quantities, edit.target)}")
        zero, total = (sum(size[place] for size in sizes.values()) for place in (0, 1))
        share_all = f"{zero:,} of {total:,} weights zero ({1 - (total - zero) / max(total, 1):.1%})"
        return [*lines, f"  masks: {share_all}; they are stored and multiplied as before: no memory or time is saved"]

    # --- what it does

    def check(self, writer: Writer) -> None:
        if self.site:
            check_ffn_untied(writer, writer.ffn(self.target), self.asked)
            return
        asked = self.asked
        linear = writer.module(self.target)
        if linear is None:
            what = f"{type(writer.model).__name__} has no such module"
            raise FfnkitError(asked, what, "Make the plan for this model")
        if not is_maskable(linear):
            edited = isinstance(linear, ReparametrizedLinear)
            found = f"it is edited already ({linear.kind})" if edited else f"it is a {type(linear).__name__}"
            raise FfnkitError(asked, found, "Fold the model first (ffnkit.fold)" if edited else "Name linears")
        weight = stored_weight(linear)
        check_float(weight, self.target)
        alike = [other for other in writer.linears_of(weight) if getattr(other, "bias", None) is linear.bias]
        writer.check_untied(weight, alike, asked)

    def perform(self, writer: Writer) -> None:
        if self.site:
            ffn = writer.ffn(self.target)
            self._check_shape(ffn.oriented(self.site))
            writer.attach(ffn, self.site, self.layer, self.mask())
        else:
            self._mask_linear(writer)

    def _check_shape(self, weight: Tensor) -> None:
        if tuple(weight.shape) != tuple(self.shape):
            what = f"it is {tuple(weight.shape)} where the mask is {tuple(self.shape)}"
            raise FfnkitError(self.asked, what, "Make the plan for this model")

    def _mask_linear(self, writer: Writer) -> None:
        """Zeros wherever the linear's weight stands.

        A plain linear becomes :class:`~ffnkit.nn.masked.Masked`; a masked one loses further weights; below an update
        the frozen weight itself gets the zeros, and needs no mask.
        """
        linear = writer.module(self.target)
        old = stored_weight(linear)
        self._check_shape(oriented(old, is_transposed(linear)))
        with torch.device("cpu"):
            mask = self.mask()
        places = writer.linears_of(old)
        stored = oriented(mask, is_transposed(linear)).to(old.device)
        weight = writer.put(old, old.detach().masked_fill(~stored, 0.0), places)
        masked = [module for module in places if isinstance(module, Masked)]
        for each in masked:
            each.mask = each.mask & stored
        for module in (place for place in places if not isinstance(place, AdapterLayer | Masked)):
            masked = masked or [Masked(cast(Any, module), mask)]  # one in all places, which the file holds once
            writer.replace(module, masked[0])
        assert stored_weight(writer.module(self.target)) is weight
