"""What an export says of what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ffnkit.checkpoint.speed import Speed


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: the folder. bytes: of its weights. compact_bytes: of the model's own tensors in compact form.
        padded: names of FFNs that zeros bring to the width of the widest beside them, or to a multiple.
        output_error: largest relative difference of the outputs after reloading, None where they could not be compared;
            the weights are compared in any case.
        padded_heads: names of attentions that got zeros in the place of heads that were removed.
        not_compared: why outputs could not be compared, "" where they were.
        dtype: in which it opens. recast: names of tensors that lie in the file in another one, as in the model.
        target: "standard" or "nemotron-nas". parameters, compact_parameters: in the file, and of the model itself.
        padding, padding_bytes: numbers, and their bytes, that are zeros of padding in FFNs.
        engines: what opens it, in words. speed: tokens a second, None where it was not measured.
    """

    path: str
    bytes: int
    compact_bytes: int
    padded: tuple[str, ...]
    output_error: float | None
    padded_heads: tuple[str, ...] = ()
    not_compared: str = ""
    dtype: str = ""
    recast: tuple[str, ...] = ()
    target: str = "standard"
    parameters: int = 0
    compact_parameters: int = 0
    padding: int = 0
    padding_bytes: int = 0
    engines: tuple[str, ...] = ()
    speed: Speed | None = None

    def __str__(self) -> str:
        checked = f"weights equal, outputs could not be compared ({self.not_compared})"
        checked = checked if self.output_error is None else f"outputs equal to {self.output_error:.1e}"
        padded = f", {len(self.padded)} FFNs padded with zeros" if self.padded else ""
        padded += f", {len(self.padded_heads)} attentions padded with heads of zeros" if self.padded_heads else ""
        recast = f" ({len(self.recast)} tensors, stored in another dtype, too)" if self.recast else ""
        lines = [
            f"{self.path}: {self.bytes / 1e6:.2f} MB {self.target} ({self.compact_bytes / 1e6:.2f} MB compact)"
            f"{padded}; reloaded in {self.dtype}{recast}, {checked}"
        ]
        if self.padding:
            share = self.padding / self.parameters
            cost = f"{self.padding:,} of {self.parameters:,} parameters ({share:.1%})"
            lines.append(f"padding costs {cost}, {self.padding_bytes / 1e6:.2f} MB")
        lines += [f"opens in: {engine}" if not n else f"          {engine}" for n, engine in enumerate(self.engines)]
        return "\n".join([*lines, *(self.speed.lines() if self.speed is not None else ())])

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**vars(self), "speed": self.speed.to_dict() if self.speed is not None else None}
